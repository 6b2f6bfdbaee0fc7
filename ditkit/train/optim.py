"""Optimisers with decay groups and a learning rate that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .came import CAME
from .distributed import World, local
from .recipe import TrainerRecipe


def learning_rate(cfg: TrainerRecipe, step: int) -> float:
    """Rate of update ``step`` (from 0): linear warm-up, then constant, or half a cosine down to 0 at the end."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decayed(model: nn.Module) -> set[str]:
    """Names of the trained matrices that weight decay applies to: not vectors, not tables of embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {n for n, p in model.named_parameters() if p.requires_grad and p.dim() >= 2 and id(p) not in tables}


@torch.no_grad()
def clip_gradients(model: nn.Module, limit: float, world: World) -> Tensor:
    """The norm of all gradients, 0-dim; gradients are scaled down to norm ``limit`` where they exceed it (0: never).

    Squares are added in float64, so that the norm does not depend on how many processes the gradients are spread over.
    """
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads, 2, torch.float64))
    norm = world.total(norms.square().sum()).sqrt().float()
    if limit:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Optimizers:
    """AdamW or CAME for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon's rate is scaled to AdamW's size of update (2502.16982, section 2.2), so one learning rate serves both. torch computes
    it in bfloat16, which CPUs without AVX-512 do very slowly.
    """

    def __init__(self, model: nn.Module, cfg: TrainerRecipe) -> None:
        self.cfg, self.rate = cfg, cfg.learning_rate
        self.names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = {n for n, p in params if cfg.optimizer == "muon" and n.startswith("blocks.") and p.dim() == 2}
        decay = decayed(model)
        groups: list[list[Tensor]] = [[p for n, p in params if n not in matrices and (n in decay) is flag] for flag in (True, False)]
        self.all: list[torch.optim.Optimizer] = []
        if any(groups):
            make = _came if cfg.optimizer == "came" else _adamw
            self.all.append(make([(group, wd) for group, wd in zip(groups, (cfg.weight_decay, 0.0)) if group], cfg))
        if matrices:
            muon = [p for n, p in params if n in matrices]
            self.all.append(torch.optim.Muon(muon, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
        self._materialise()

    @property
    def skips_on_device(self) -> bool:
        """Whether ``step`` can leave the weights alone because of a tensor, without asking the host."""
        return all(isinstance(o, torch.optim.AdamW) and o.defaults["fused"] for o in self.all)

    def set_rate(self, step: int) -> None:
        """Set the learning rate of update ``step`` (from 0)."""
        self.rate = learning_rate(self.cfg, step)
        for group in (g for o in self.all for g in o.param_groups):
            group["lr"] = self.rate

    def step(self, accepted: Tensor | None = None) -> None:
        """One update. ``accepted``: 0-dim tensor; where it is 0 weights and state stay (only if ``skips_on_device``)."""
        for o in self.all:
            if accepted is not None:
                o.grad_scale, o.found_inf = None, 1.0 - accepted  # type: ignore[attr-defined]
            o.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for o in self.all:
            o.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state, as "parameter.key" -> tensor; they can be copied into."""
        found = {}
        for p, state in self._states():
            found.update({f"{self.names[id(p)]}.{key}": value for key, value in state.items() if key != "step"})
        return found

    def counts(self) -> dict[str, int]:
        """Updates made so far, by parameter: one that had no gradient at a step was not updated."""
        counted = [(self.names[id(p)], state["step"]) for p, state in self._states() if "step" in state]
        values = torch.stack([count for _, count in counted]).tolist() if counted else []
        return {name: int(value) for (name, _), value in zip(counted, values)}

    def restore_counts(self, counts: Mapping[str, int]) -> None:
        """From ``counts``."""
        for p, state in self._states():
            if "step" in state:
                state["step"].fill_(counts[self.names[id(p)]])

    def _states(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        return ((p, o.state[p]) for o in self.all for g in o.param_groups for p in g["params"])

    def _materialise(self) -> None:
        """Make the state now, as the first step would: a checkpoint can then be read into it."""
        for o in self.all:
            for p in (p for g in o.param_groups for p in g["params"]):
                if isinstance(o, torch.optim.AdamW):
                    on_device = p.device if o.defaults["fused"] else None
                    o.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
                    o.state[p]["exp_avg"], o.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                elif isinstance(o, CAME):
                    o.begin(p)
                else:
                    o.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _adamw(groups: list[tuple[list[Tensor], float]], cfg: TrainerRecipe) -> torch.optim.AdamW:
    fused = all(p.device.type in ("cpu", "cuda") for group, _ in groups for p in group)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": wd} for group, wd in groups],
        lr=cfg.learning_rate,
        betas=(cfg.betas[0], cfg.betas[1]),
        fused=fused,
    )


def _came(groups: list[tuple[list[Tensor], float]], cfg: TrainerRecipe) -> CAME:
    betas = (cfg.betas[0], cfg.betas[1], cfg.betas[2] if len(cfg.betas) > 2 else 0.9999)
    return CAME([{"params": group, "weight_decay": wd} for group, wd in groups], lr=cfg.learning_rate, betas=betas)
