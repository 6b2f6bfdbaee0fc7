"""On 2 gloo processes: views under FSDP2, where one sharded root is teacher (no method active) and student; windows in strips. Run by
test_sharding.py.

python -m torch.distributed.run --nproc_per_node 2 shard_worker.py OUT.json CASE
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.flux import Flux
from ditkit.backbones.mmdit import MMDiT
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.view import keep_blocks, with_methods
from ditkit.methods.adaptation.lora import LoRA
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.strips import Strips

CASES = ("lora", "teacher_student", "pruned")


def make(case: str) -> tuple[Backbone, Backbone]:
    """The base and the view that is trained."""
    torch.manual_seed(0)
    base: Backbone = draw_parameters(DiT(input_size=(8, 8), in_channels=4, out_channels=4, dim=32, depth=4, num_heads=4, num_classes=7))
    if case == "pruned":
        return base, keep_blocks(base, [0, 1, 3])
    for p in base.parameters():
        p.requires_grad_(False)
    view = with_methods(base, LoRA(rank=4), FORA(interval=2))
    for n, p in view.methods.named_parameters():
        if n.endswith("B"):  # at zero, Adam would turn rounding noise of A's zero gradient into steps
            torch.nn.init.normal_(p, std=0.1)
    return base, view


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, 8, 8, generator=g), torch.rand(8, generator=g) * 999, torch.arange(8) % 7


def train(case: str, view: Backbone, x: Tensor, t: Tensor, y: Tensor, steps: int = 4) -> Tensor:
    """Mean losses of some AdamW steps."""
    optimizer = torch.optim.AdamW(
        [p for p in view.parameters() if p.requires_grad], 1e-2, eps=1e-3
    )  # a usual eps would turn rounding noise of zero gradients into steps
    losses = []
    for _ in range(steps):
        active = set() if case == "pruned" else {"lora"}
        if case == "teacher_student":
            with torch.no_grad():
                target = 0.9 * view(x, t, y=y, run=Run(view, active=()))
        else:
            target = torch.ones_like(x)
        loss = (view(x, t, y=y, run=Run(view, active=active)) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def shard(view: Backbone, mesh: Any) -> None:
    """Blocks, then the view: one root."""
    for block in view.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(view, mesh=mesh)


def main(case: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, t, y = batch()
    mine = [u.chunk(world)[rank] for u in (x, t, y)]
    _, alone = make(case)
    one = train(case, alone, x, t, y)
    _, view = make(case)
    reference, _ = make(case)
    with torch.no_grad():
        expected = (keep_blocks(reference, [0, 1, 3]) if case == "pruned" else reference)(mine[0], mine[1], y=mine[2])
    whole = sum(p.numel() for p in view.parameters())
    shard(view, init_device_mesh("cpu", (world,)))
    with torch.no_grad():
        off = view(mine[0], mine[1], y=mine[2], run=Run(view, active=()))
    view.reshard()  # type: ignore[operator]  # the root stays whole after a forward: an optimiser made now would hold the wrong tensors
    held = sum(p.to_local().numel() for p in view.parameters())  # type: ignore[attr-defined]
    many = train(case, view, *mine)
    dist.all_reduce(many)
    drift = max(float((a.full_tensor() - b).abs().max().detach()) for a, b in zip(view.parameters(), alone.parameters()))  # type: ignore[attr-defined]
    return {
        "off_is_base": torch.equal(off, expected),
        "loss": float((many / world - one).abs().max()),
        "weights": drift,
        "held": held,
        "whole": whole,
        "shared": shared_update(view, alone, mine),
        "state": state_survives(case, view),
    }


def shared_update(view: Backbone, alone: Backbone, inputs: list[Tensor]) -> bool:
    """A weight of the base changed in the sharded root is seen by both of its roles, as in one process."""
    x, t, y = inputs
    outputs = []
    for model in (view, alone):
        for n, p in model.named_parameters():
            if n == "blocks.0.parts.img.proj.bias":
                with torch.no_grad():
                    (p.to_local() if model is view else p).add_(0.5)  # type: ignore[attr-defined]
        roles = [(), None] if model.methods else [None]
        with torch.no_grad():
            outputs.append([model(x, t, y=y, run=Run(model, active=a)) for a in roles])
        if model is view:
            view.reshard()  # type: ignore[operator]
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outputs))


def state_survives(case: str, view: Backbone) -> bool:
    """Save by DCP, scramble, load: the same weights; and a further view of the sharded model is refused."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    before = {k: v.full_tensor().clone() for k, v in get_model_state_dict(view).items()}
    dcp.save({"model": get_model_state_dict(view)}, checkpoint_id=folder[0])
    with torch.no_grad():
        for p in view.parameters():
            p.mul_(2)
    state = {"model": get_model_state_dict(view)}
    dcp.load(state, checkpoint_id=folder[0])
    set_model_state_dict(view, state["model"])
    after = {k: v.full_tensor() for k, v in get_model_state_dict(view).items()}
    return all(torch.equal(before[k], after[k]) for k in before)


def strips() -> dict[str, float]:
    """A window over two strips against the window in one process: the relative error of the output."""
    errors = {}
    for name, model in (("mmdit", MMDiT.tiny()), ("flux", Flux.tiny()), ("dit", DiT.tiny())):
        x, t, cond = model.example()
        cond.pop("mask", None)
        for radius, how in ((1.0, "auto"), (2.0, "gathered"), (2.5, "dense")):
            with torch.no_grad():
                one, two = (with_methods(model, m)(x, t, **cond) for m in (CLEAR(radius=radius), Strips(radius=radius, how=how)))
            errors[f"{name}, radius {radius}"] = float((two - one).norm() / one.norm())
    return errors


def thin_strips() -> str:
    """What is said of a halo that is wider than a strip: 3 rows of 2."""
    model = DiT.tiny()
    x, t, cond = model.example()
    try:
        with_methods(model, Strips(radius=4.0))(x, t, **cond)
    except DitkitError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {case: main(case) for case in CASES}
    results |= {"strips": strips(), "thin": thin_strips()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
