"""What of a text a backbone takes, read from the names of its ``prepare``: ``text``, ``mask``, ``pooled``, ``size``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.core.errors import DitkitError

if TYPE_CHECKING:
    from .text import Text


def wants(model: Any) -> frozenset[str]:
    """Names of the conditioning that ``model.prepare`` knows."""
    return frozenset(inspect.signature(type(model).prepare).parameters) - {"self"}


def takes_text(model: Any) -> bool:
    """Whether it is told captions; otherwise class labels, as a network that could be either is without a ``text_dim``."""
    return "text" in wants(model) and getattr(model.config, "text_dim", 0) is not None


def network_inputs(model: Any, text: Text, masked: bool = True) -> dict[str, Tensor]:
    """What ``model.prepare`` takes of these prompts.

    Args:
        masked: padding is hidden; False: the mask stays away, and the network sees all L tokens.

    Raises:
        DitkitError: the model is told labels, or what the encoder does not give, or states of another width.
    """
    known = wants(model)
    if not takes_text(model):
        raise DitkitError(f"{model.name} is told class labels, not captions", allowed="class_labels")
    if text.states.dim() != 3 or text.mask.shape != text.states.shape[:2]:
        raise DitkitError(f"states are {tuple(text.states.shape)}, their mask {tuple(text.mask.shape)}", allowed="(B, L, D) and (B, L)")
    check_width(model, text.states.shape[-1], None if text.pooled is None else text.pooled.shape[-1])
    found = {"text": text.states}
    if masked and "mask" in known:
        found["mask"] = text.mask
    if "pooled" in known and text.pooled is not None:
        found["pooled"] = text.pooled
    return found


def check_width(model: Any, dim: int, pooled_dim: int | None) -> None:
    """Raise DitkitError where an encoder's states or pooled vector are not what the network was built for."""
    hint = "this is another model's encoder: give the one that the network was trained with"
    if (wanted := getattr(model.config, "text_dim", dim)) != dim:
        raise DitkitError(f"the text encoder's states have width {dim}", allowed=f"{wanted}, the text_dim of {model.name}", hint=hint)
    if "pooled" not in wants(model):
        return
    if pooled_dim is None:
        raise DitkitError(f"{model.name} is told a pooled text too, and the text encoder has none", hint="bytes, or a CLIP model, have one")
    if (wanted := getattr(model.config, "pooled_dim", pooled_dim)) != pooled_dim:
        raise DitkitError(f"the pooled text has width {pooled_dim}", allowed=f"{wanted}, the pooled_dim of {model.name}", hint=hint)


def told_size(model: Any, height: int, width: int, count: int) -> dict[str, Tensor]:
    """``size`` (count, 2) in pixels, for a network with micro-conditions; nothing for others."""
    if "size" not in wants(model) or not getattr(model.config, "micro_conditions", False):
        return {}
    return {"size": torch.tensor([[height, width]], dtype=torch.float32).expand(count, -1)}
