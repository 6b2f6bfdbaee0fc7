"""Windows in strips over 4 gloo processes, forked from one that has torch loaded. Run by test_strips.py: strips_worker.py STORE OUT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.mmdit import MMDiT
from ditkit.core.backbone import Backbone
from ditkit.core.view import with_methods
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.methods.strips import Strips

WORLD = 4


def networks() -> dict[str, Backbone]:
    """8 rows of tokens each: strips of 2, of which the inner ones have neighbours on both sides."""
    shape = dict(input_size=(16, 8), in_channels=2, out_channels=2, dim=24, depth=2, num_heads=2)
    torch.manual_seed(0)
    dit = DiT(**shape, num_classes=3)  # type: ignore[arg-type]
    mmdit = MMDiT(**shape, text_dim=8, pooled_dim=8, position_size=8)  # type: ignore[arg-type]
    return {"dit": draw_parameters(dit).eval(), "mmdit": draw_parameters(mmdit).eval()}


@torch.no_grad()
def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    errors = {}
    for name, model in networks().items():
        x, t, cond = model.example()
        cond.pop("mask", None)
        for radius in (1.0, 2.0, 3.0):
            one, four = (with_methods(model, m(radius=radius))(x, t, **cond) for m in (CLEAR, Strips))
            errors[f"{name}, radius {radius}, process {rank}"] = float((four - one).norm() / one.norm())
    Path(f"{out}.{rank}").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, sys.argv[1:3], WORLD, start_method="fork")
    found = [json.loads(Path(f"{sys.argv[2]}.{rank}").read_text()) for rank in range(WORLD)]
    Path(sys.argv[2]).write_text(json.dumps({k: v for part in found for k, v in part.items()}))
