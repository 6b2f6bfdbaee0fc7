"""Parity on the GPU: the golden files of the tests, our network against itself on the CPU, and diffusers where it is installed.

fp32 runs without TF32. Each figure is a relative L2 error; the limits are those of the tests, 1e-5 in fp32 and 2e-2 in bf16.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, open_bundle, write_bundle
from ditkit.core.run import Run
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import Process

TESTS = Path(__file__).resolve().parents[1] / "tests" / "parity"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NETWORKS = ("dit", "dit-nosigma", "sit")
BF16_OUTPUTS = ("out/y", "out/y_frac_t")  # guidance multiplies the rounding of a difference, by the scale of the file


def check(device: str) -> dict[str, Any]:
    """All checks, each with name, error, limit and whether it passed, and what could not be run."""
    missing: list[str] = []
    with _exact_fp32():
        checks = [*_goldens(device, missing), *_trajectories(device, missing), *_itself(device), *_diffusers(device, missing)]
    return {"checks": checks, "not run": missing}


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """No TF32, neither in products nor in convolutions."""
    earlier = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(earlier[0])
        torch.backends.cudnn.allow_tf32 = earlier[1]


def _entry(name: str, error: float, dtype: torch.dtype) -> dict[str, Any]:
    return {"name": name, "error": error, "limit": LIMITS[dtype], "passed": error <= LIMITS[dtype]}


def _relative(got: Tensor, want: Tensor) -> float:
    a, b = got.detach().double().cpu(), want.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _golden_module(missing: list[str]) -> Any:
    """``tests/parity/golden.py``, which needs pytest; None without either."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    try:
        import golden
    except ImportError as error:
        missing.append(f"golden files: {error}")
        return None
    return golden


def _open(golden: Any, name: str, device: str, missing: list[str]) -> Any:
    """A golden file whose tensors are on the device."""
    path = golden.FOLDER / f"{name}.safetensors"
    if not path.is_file():
        missing.append(f"golden file {path.name}: not there")
        return None
    g = golden.Golden(path)
    g._tensors = {key: value.to(device) for key, value in g._tensors.items()}
    return g


def _process(name: str, learned: bool) -> Process:
    if name == "sit":
        return Flow(network_time="sit", discard_half=learned)
    return Gaussian(variance="learned" if learned else "fixed_large")


def _goldens(device: str, missing: list[str]) -> Iterator[dict[str, Any]]:
    """Every output of the released networks in fp32, and the plain ones in bf16."""
    golden = _golden_module(missing)
    for name in NETWORKS if golden else ():
        g = _open(golden, name, device, missing)
        for key in g.starting("out") if g else ():
            yield _entry(f"{name} {key} fp32", _relative(_compute(golden, g, name, key, device, torch.float32), g[key]), torch.float32)
            if key in BF16_OUTPUTS:
                got = _compute(golden, g, name, key, device, torch.bfloat16)
                yield _entry(f"{name} {key} bf16", _relative(got, g[key]), torch.bfloat16)


def _compute(golden: Any, g: Any, name: str, key: str, device: str, dtype: torch.dtype) -> Tensor:
    from released_dit import compute

    model = golden.load_dit(g).to(device, dtype)
    held = dict(g._tensors)
    g._tensors = {**held, "in/x": held["in/x"].to(dtype)}
    made_here = key in ("out/y_train_drop", "out/label_force_drop")  # these build tensors from numbers in the file
    try:
        with torch.device(device) if made_here else nullcontext():
            return compute(g, model, _process(name, g.config["learn_sigma"]), key)
    finally:
        g._tensors = held


def _trajectories(device: str, missing: list[str]) -> Iterator[dict[str, Any]]:
    """FORA on whole trajectories of the released sampler."""
    golden = _golden_module(missing)
    g = _open(golden, "harmonica-fora", device, missing) if golden else None
    if g is None:
        return
    import test_harmonica_fora as released

    released.G = g
    released.load_dit = lambda g: golden.load_dit(g).to(device)
    for variant in released.VARIANTS:
        x, _, _ = released.trajectory(variant, batched=True)
        yield _entry(f"harmonica-fora {variant} trajectory fp32", _relative(x, g[f"out/{variant}/x"]), torch.float32)


def _small() -> DiT:
    torch.manual_seed(0)
    return draw_parameters(DiT(input_size=(16, 16), dim=192, depth=4, num_heads=6, num_classes=10)).eval()


@torch.no_grad()
def _itself(device: str) -> Iterator[dict[str, Any]]:
    """The same weights on the CPU in fp32 and on the device, guided in two passes and in one."""
    want = _guided_output(_small(), batched=False)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for batched in (False, True):
            got = _guided_output(_small().to(device, dtype), batched)
            yield _entry(f"CPU fp32 against {device} {name}, {'batched' if batched else 'two-pass'} guidance", _relative(got, want), dtype)


def _guided_output(model: DiT, batched: bool) -> Tensor:
    first = next(model.parameters())
    x, _, cond = model.example(4)
    cond = {k: v.to(first.device) for k, v in cond.items()}
    guidance = Guidance(scale=1.5, channels=3, batched=batched)
    return guided(model, Gaussian(variance="learned"), guidance, Run(model), cond, model.null(**cond))(x.to(first), 0.3)


def _diffusers(device: str, missing: list[str]) -> Iterator[dict[str, Any]]:
    """diffusers' DiTTransformer2DModel on the same random weights, as ``ditkit verify`` compares them."""
    from ditkit.core.errors import MissingDependency
    from ditkit.interop.verify import against_diffusers

    model = _small()
    parts = {"backbone": Part(name="dit", config=model.config.to_dict()), "process": Part(name="gaussian", config={"variance": "learned"})}
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(folder, BundleConfig(**parts, data=DataCard(name="noise", shape=(4, 16, 16))), model.state_dict())
        opened = open_bundle(folder)
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            weights = {key: value.clone() for key, value in nn.Module.state_dict(model).items()}
            try:
                error = against_diffusers(opened, weights, dtype, device)
            except (MissingDependency, ImportError) as absent:
                missing.append(f"diffusers: {absent}")
                return
            yield _entry(f"diffusers DiTTransformer2DModel {name}", error, dtype)
