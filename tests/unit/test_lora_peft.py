"""LoRA against the real libraries: PEFT's layers on the same weights, diffusers' DiT with what we write."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.files import read_tensors
from ditkit.core.view import with_methods
from ditkit.interop.lora import load_lora, save_lora
from ditkit.interop.lora_factors import Factors
from ditkit.methods.adaptation.lora import LoRA
from ditkit.testing.trajectory import relative, sample

LINEARS = {"ada": "norm1.linear", "proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}  # ours -> diffusers'


@pytest.fixture
def dit() -> DiT:
    return DiT.tiny()


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def injected(model: Any, **values: Any) -> Any:
    """PEFT's own injection, with every number of the adapter drawn."""
    wrapped = peft().get_peft_model(model, peft().LoraConfig(**values))
    with torch.no_grad():
        for k, (name, p) in enumerate(wrapped.named_parameters()):
            if "lora_" in name:
                p.copy_(0.1 * drawn(tuple(p.shape), k))
    return wrapped


@pytest.mark.parametrize(
    "values",
    [
        dict(
            r=4,
            lora_alpha=6,
            target_modules=["qkv", "mlp.fc2", "img.ada"],
            rank_pattern={r"blocks.1.*qkv": 7},
            alpha_pattern={"mlp.fc2": 3},
        ),
        dict(r=9, lora_alpha=5, target_modules=r"blocks\.[0-2]\..*proj", use_rslora=True),
    ],
    ids=["patterns", "rslora"],
)
def test_peft_on_the_same_weights_gives_the_same_output(dit: DiT, tmp_path: Path, values: dict[str, Any]) -> None:
    """What PEFT saved, read as a layer at the seam, is what PEFT's swapped modules compute; and the other way round."""
    theirs = injected(copy.deepcopy(dit), **values)
    theirs.save_pretrained(tmp_path)
    loaded = load_lora(tmp_path, dit)
    assert loaded.report.format == "peft"
    view = with_methods(dit, loaded.lora)
    out = sample(theirs.base_model.model)
    assert not torch.equal(out, sample(dit))
    assert relative(sample(view), out) < 1e-6
    file = save_lora(tmp_path / "back", loaded.lora, dit, "peft", "ditkit")
    back = peft().PeftModel.from_pretrained(copy.deepcopy(dit), file.parent)
    assert relative(sample(back.base_model.model), out) < 1e-6


def test_one_linear_layer_as_peft_computes_it() -> None:
    linear, x = torch.nn.Linear(8, 24), drawn((5, 8), 3)
    theirs = injected(torch.nn.Sequential(linear), r=3, lora_alpha=2, target_modules=["0"])
    layer = theirs.base_model.model[0]
    f = Factors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0)
    assert relative((x @ f.delta().T + layer.base_layer(x)).detach(), theirs(x).detach()) < 1e-6


def test_diffusers_dit_takes_what_is_written(dit: DiT, tmp_path: Path) -> None:
    """diffusers' own reader of the metadata, PEFT's injection into its DiT, and every weight change equal to ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
    lora = LoRA(rank=3, alpha=2.0, ranks={"blocks.1.img.qkv": 5, "fc1": 2}, alphas={"blocks.3.img.fc2": 9.0})
    lora.build(dit)
    with torch.no_grad():
        for k, p in enumerate(lora.parameters()):
            p.copy_(drawn(tuple(p.shape), k))
    file = save_lora(tmp_path, lora, dit)
    config = {k.removeprefix("transformer."): v for k, v in _load_sft_state_dict_metadata(str(file)).items()}
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=4, sample_size=8, num_embeds_ada_norm=5
    )
    peft().inject_adapter_in_model(peft().LoraConfig(**config), theirs)
    state = {k.removeprefix("transformer."): u for k, u in read_tensors(file).items()}
    result = peft().set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    for i, block in enumerate(theirs.transformer_blocks):
        deltas = {n: block.get_submodule(theirs_name).get_delta_weight("default") for n, theirs_name in LINEARS.items()}
        deltas["qkv"] = torch.cat([getattr(block.attn1, n).get_delta_weight("default") for n in ("to_q", "to_k", "to_v")])
        for name, delta in deltas.items():
            assert relative(lora.delta(f"blocks.{i}.img.{name}").detach(), delta.detach()) < 1e-6
