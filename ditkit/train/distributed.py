"""One process or many, under ``torchrun``: who is who, the sharded model (FSDP2), the few numbers that all must agree on.

Each process trains on its own rows of the global batch; the parameters are sharded over all of them, or over groups that are
replicas of one another (HSDP). Run with gloo on CPUs in the tests; NCCL has not been run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.loading import choose


@dataclass(frozen=True)
class World:
    """The processes of a run. With one of them every method below is trivial."""

    rank: int
    size: int
    device: torch.device
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes logs, pictures and the bundle."""
        return self.rank == 0

    def shard(self, model: Backbone) -> None:
        """Shard the blocks, then the rest; parameters become distributed tensors."""
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        # a block passes the conditioning on as it is, which FSDP has made a view; nobody writes into it
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        model.__dict__.pop("_root", None)  # the base that a view was made of would keep whole parameters alive

    def exchange_gradients(self, model: nn.Module, now: bool) -> None:
        """Whether the next backward pass reduces gradients over processes (the last micro-batch) or only adds them up."""
        if self.size > 1:
            model.set_requires_gradient_sync(now)  # type: ignore[operator]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes that share one copy of the model, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(value, group=self.mesh.get_group(self.mesh.mesh_dim_names[-1]))
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self._gather(flag))

    def any_name(self, name: str) -> str:
        """The first process's answer that is not empty."""
        return next((n for n in self._gather(name) if n), "")

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def tell(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


def connect(device: str = "auto", replicas: int = 1) -> World:
    """The world as ``torchrun`` set it up in the environment, or one process.

    Raises:
        DitkitError: the device does not exist, or the processes cannot be split into that many replicas.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    _, place = choose("float32", device)
    if place.type == "cuda" and size > 1:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if size == 1:
        if replicas != 1:
            raise DitkitError(f"trainer.replicas is {replicas} for one process", allowed="1", hint="start with torchrun")
        return World(0, 1, place)
    if size % replicas:
        raise DitkitError(f"trainer.replicas is {replicas} for {size} processes", allowed=f"divisors of {size}")
    from torch.distributed.device_mesh import init_device_mesh

    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    shape, names = ((size,), ("shard",)) if replicas == 1 else ((replicas, size // replicas), ("replicate", "shard"))
    return World(rank, size, place, init_device_mesh(place.type, shape, mesh_dim_names=names))


def local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Distributed tensors gathered to whole ones on the CPU, one after the other; all processes must call it."""
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().cpu() for name, t in tensors}
