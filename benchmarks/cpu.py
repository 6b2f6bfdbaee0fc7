"""DiT-S/2 on a CPU against diffusers, same weights, interleaved: one forward of batch 2, and one training step of batch 8.

    python benchmarks/cpu.py                 # writes benchmarks/cpu_MACHINE_DATE.json and .txt; about 5 minutes
    python benchmarks/cpu.py --tiny          # a small network, captured and not compiled, in half a minute

Every output is compared with diffusers' before anything is timed. The roof is measured in the same run, at the model's own shapes.
Look at the load: beside other jobs, two threads wait for each other and all figures are several times too high.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.core.backbone import Backbone
from ditkit.core.files import atomic_file, write_json
from ditkit.core.run import Run
from ditkit.core.view import compile_view, with_methods
from ditkit.eval.bench import Candidate, run_bench
from ditkit.eval.counters import count_forward
from ditkit.eval.roof import products_alone
from ditkit.eval.table import table
from ditkit.interop.dit import config_to_diffusers, diffusers_table
from ditkit.interop.verify import quiet_imports
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.int8 import Int8

ROOF = "products and attention alone"
STEPS = 12  # of a run with FORA
TINY = dict(input_size=(8, 8), dim=64, depth=2, num_heads=2, num_classes=10)


def models(tiny: bool) -> tuple[DiT, Any]:
    """Ours and diffusers', with the same random weights of a trained network's size."""
    torch.manual_seed(0)
    ours = draw_parameters(DiT(**(TINY if tiny else DiT.sizes["DiT-S/2"]), time_freq_shift=1, mlp_norm_eps=1e-5)).eval()  # type: ignore[arg-type]
    for name, p in ours.named_parameters():
        if ".ada." in name:
            p.data.mul_(0.3)
    with quiet_imports():
        from diffusers import DiTTransformer2DModel
    settings = {k: v for k, v in config_to_diffusers(ours.config).items() if not k.startswith("_")}
    theirs = DiTTransformer2DModel(**settings).eval()
    theirs.load_state_dict(diffusers_table(ours.config).export(ours.state_dict()), strict=False)
    return ours, theirs


def forward_rows(ours: DiT, theirs: Any, backend: str, batch: int = 2) -> list[Candidate]:
    """One evaluation of the network, no gradients; with FORA, one of a run of ``STEPS``."""
    x, t, cond = ours.example(batch)
    prepared = ours.prepare(**cond)
    cost = count_forward(ours, batch)

    def call(view: Backbone) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: view(x, t, prepared))

    def run(view: Backbone) -> Callable[[], Tensor]:
        def call() -> Tensor:
            trajectory = Run(view, STEPS)
            return [view(x, t, prepared, run=trajectory) for _ in trajectory.steps()][-1]

        return torch.no_grad()(call)

    compiled = torch.compile(theirs, fullgraph=True, dynamic=False, backend=backend)
    quantised = with_methods(ours, Int8())
    views = {
        "ours, eager": (ours, 1e-5),
        "ours, compiled by block": (compile_view(ours, "block", backend=backend), 1e-5),
        "ours, compiled by step": (compile_view(ours, "step", backend=backend), 1e-5),
        "ours, int8, compiled by step": (compile_view(quantised, "step", backend=backend), None),
    }
    if backend == "inductor" and importlib.util.find_spec("openvino"):
        views["ours, OpenVINO by step"] = (compile_view(ours, "step", engine="openvino"), 1e-5)
    y = cond["y"]
    rows = [
        Candidate("diffusers, eager", torch.no_grad()(lambda: theirs(x, t, class_labels=y).sample), batch, cost),
        Candidate("diffusers, compiled", torch.no_grad()(lambda: compiled(x, t, class_labels=y).sample), batch, cost, tolerance=1e-5),
    ]
    rows += [Candidate(name, call(view), batch, cost, tolerance=bound) for name, (view, bound) in views.items()]
    products, nothing = products_alone(cost), torch.zeros_like(rows[0].call())
    note = "no output: what no compiler can save at these shapes, on this machine, while the others ran"
    rows.append(Candidate(ROOF, lambda: (products(), nothing)[1], batch, notes=(note,)))
    for interval in (2, 3):
        view = compile_view(with_methods(ours, FORA(interval=interval)), "block", num_steps=STEPS, backend=backend)
        full = Run(view, STEPS).finish()["fora"]["full_steps"]
        note = f"FORA {interval}: {full} of {STEPS} steps compute the blocks; all see the same input, so the error says nothing"
        rows.append(Candidate(f"ours, FORA {interval}, by block", run(view), batch * STEPS, notes=(note,)))
    return rows


def training_rows(ours: DiT, theirs: Any, backend: str, batch: int = 8) -> list[Candidate]:
    """Forward, backward and AdamW on a fixed batch; the loss is what is compared."""
    x, t, cond = ours.example(batch)
    target = torch.randn_like(theirs(x, t, class_labels=cond["y"]).sample)

    def step(predict: Callable[[], Tensor], module: Any) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(module.parameters(), 0.0, weight_decay=0.0)  # rate 0: every call does the same

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(predict(), target)
            loss.backward()
            optimizer.step()
            return loss.detach().view(1, 1)

        return call

    compiled = compile_view(ours, "block", backend=backend)
    return [
        Candidate("training step, diffusers, eager", step(lambda: theirs(x, t, class_labels=cond["y"]).sample, theirs), batch),
        Candidate("training step, ours, compiled by block", step(lambda: compiled(x, t, **cond), ours), batch, tolerance=1e-5),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    command = "python benchmarks/cpu.py" + (" --tiny" if args.tiny else "")
    args.out.mkdir(parents=True, exist_ok=True)
    backend = "eager" if args.tiny else "inductor"
    ours, theirs = models(args.tiny)
    results: dict[str, Any] = {}
    texts: list[str] = []
    for part, rows, repeats in (
        ("forward", forward_rows, args.repeats),
        ("training", training_rows, max(1, args.repeats // 3)),
    ):
        result = run_bench(rows(ours, theirs, backend), suite="cpu", repeats=repeats, warmups=2, command=command, progress=not args.tiny)
        results[part] = result.to_dict()
        texts.append(table(result))
        path = args.out / f"cpu_{result.machine.slug}_{result.date}.json"
        write_json(path, results)
        with atomic_file(path.with_suffix(".txt")) as file:
            file.write(("\n\n".join(texts) + "\n").encode())
        sys.stdout.write(f"{texts[-1]}\n{path}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
