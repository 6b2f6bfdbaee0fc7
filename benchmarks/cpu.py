"""DiT-S/2 on a CPU against diffusers, same weights, interleaved: one forward of batch 2, and one training step of batch 8.

    python benchmarks/cpu.py                 # writes benchmarks/cpu_MACHINE_DATE.json and prints a table; about 5 minutes
    python benchmarks/cpu.py --tiny          # the same on a small network, in seconds (what the tests run)

Every output is compared with diffusers' before anything is timed. The roof is measured in the same run, at the model's own shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.core.backbone import Backbone
from ditkit.core.files import write_json
from ditkit.core.view import compile_view, with_methods
from ditkit.eval.bench import Candidate, run_bench
from ditkit.eval.counters import count_forward
from ditkit.eval.table import table
from ditkit.interop.dit import config_to_diffusers, diffusers_table
from ditkit.interop.verify import quiet_imports
from ditkit.methods.efficiency.int8 import Int8

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


def forward_rows(ours: DiT, theirs: Any, batch: int = 2) -> list[Candidate]:
    """One evaluation of the network, no gradients."""
    x, t, cond = ours.example(batch)
    prepared = ours.prepare(**cond)
    cost = count_forward(ours, batch)

    def call(view: Backbone) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: view(x, t, prepared))

    compiled = torch.compile(theirs, fullgraph=True, dynamic=False)
    quantised = with_methods(ours, Int8())
    views = {
        "ours, eager": (ours, 1e-5),
        "ours, compiled by block": (compile_view(ours, "block"), 1e-5),
        "ours, compiled by step": (compile_view(ours, "step"), 1e-5),
        "ours, int8, compiled by step": (compile_view(quantised, "step"), None),
    }
    y = cond["y"]
    rows = [
        Candidate("diffusers, eager", torch.no_grad()(lambda: theirs(x, t, class_labels=y).sample), batch, cost),
        Candidate("diffusers, compiled", torch.no_grad()(lambda: compiled(x, t, class_labels=y).sample), batch, cost, tolerance=1e-5),
    ]
    return rows + [Candidate(name, call(view), batch, cost, tolerance=bound) for name, (view, bound) in views.items()]


def training_rows(ours: DiT, theirs: Any, batch: int = 8) -> list[Candidate]:
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

    compiled = compile_view(ours, "block")
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
    ours, theirs = models(args.tiny)
    results: dict[str, Any] = {}
    for part, rows, repeats in (
        ("forward", forward_rows, args.repeats),
        ("training", training_rows, max(1, args.repeats // 3)),
    ):
        result = run_bench(rows(ours, theirs), suite="cpu", repeats=repeats, warmups=2, command=command, progress=not args.tiny)
        results[part] = result.to_dict()
        path = args.out / f"cpu_{result.machine.slug}_{result.date}.json"
        write_json(path, results)
        sys.stdout.write(f"{table(result)}\n{path}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
