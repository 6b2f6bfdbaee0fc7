"""``from_pretrained`` never holds the uncompressed model: live bytes of tensors are counted, at every operation, while one is loaded."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditkit.backbones.dit import DiT
from ditkit.bundle import BundleConfig, DataCard, Part, write_bundle
from ditkit.core.view import with_methods
from ditkit.interop import dit
from ditkit.loading import fill
from ditkit.methods import FORA, Int8
from ditkit.pipeline import Pipeline

SHAPE: dict[str, Any] = dict(input_size=(8, 8), in_channels=4, out_channels=4, dim=64, depth=28, num_heads=4)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that somebody still holds: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() in self._known or not storage.nbytes():
            return
        self._known.add(storage.data_ptr())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())

    def _gone(self, place: int, count: int) -> None:
        self._known.discard(place)
        self.now -= count


def held(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(u.nbytes for u in [*model.parameters(), *model.buffers()])


@pytest.fixture(scope="module")
def base() -> DiT:
    torch.manual_seed(0)
    return DiT(**SHAPE)


def bundle(folder: Path, model: DiT, dtype: torch.dtype) -> Path:
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()),
        process=Part(name="gaussian", config={"variance": "fixed_small"}),
        data=DataCard(name="noise", shape=(4, 8, 8)),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    write_bundle(folder, config, {name: value.to(dtype) for name, value in model.state_dict().items()})
    return folder


def diffusers_folder(folder: Path, model: DiT, dtype: torch.dtype) -> Path:
    """A transformer alone, whose q, k and v are apart."""
    weights = dit.diffusers_table(model.config).export(model.state_dict())
    folder.mkdir()
    save_file({name: value.to(dtype, copy=True) for name, value in weights.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(dit.config_to_diffusers(model.config)))
    return folder


@pytest.mark.parametrize(
    ("layout", "stored", "dtype", "methods"),
    [
        (bundle, torch.bfloat16, "float32", [Int8(kernel="dequantise")]),
        (bundle, torch.float32, "bfloat16", []),
        (diffusers_folder, torch.float32, "bfloat16", [Int8(kernel="dequantise"), FORA()]),
    ],
    ids=["bf16 to int8", "fp32 to bf16", "a diffusers folder in fp32 to int8 and bf16"],
)
def test_the_peak_is_the_result_and_a_layer(tmp_path: Path, base: DiT, layout: Any, stored: torch.dtype, dtype: str, methods: Any) -> None:
    folder = layout(tmp_path / "m", base, stored)
    with Live() as live:
        pipe = Pipeline.from_pretrained(folder, dtype=dtype, device="cpu", methods=methods)
    result = held(pipe.model)
    assert live.now == pytest.approx(result, rel=0.02), "what is counted is what is held"
    assert live.peak <= 1.2 * result
    if methods:
        assert result < 0.6 * held(base)
        same = with_methods(nn.Module.to(DiT(base.config), getattr(torch, dtype)), Int8(kernel="dequantise")).state_dict()
        assert {k: (v.shape, v.dtype) for k, v in pipe.model.state_dict().items()} == {k: (v.shape, v.dtype) for k, v in same.items()}


class Tabled(DiT):
    """A network with a buffer that no file holds."""

    def __init__(self, config: Any = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.register_buffer("table", torch.arange(7.0), persistent=False)


def test_computed_buffers_cost_no_second_model(base: DiT) -> None:
    with torch.device("meta"):
        model = Tabled(base.config)

    state = base.state_dict()

    class Weights:
        shapes = {name: tuple(value.shape) for name, value in state.items()}

        def read(self, name: str) -> Tensor:
            return state[name].clone()

    with Live() as live:
        full = fill(model, Weights(), torch.float32, torch.device("cpu"))
    assert torch.equal(full.table, torch.arange(7.0))
    assert live.peak <= 1.2 * held(full)
