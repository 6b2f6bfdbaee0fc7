"""What of a text a backbone takes, read from the names of its ``prepare``: ``text``, ``mask``, ``pooled``, ``t5``, ``size``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.core.errors import DitkitError

if TYPE_CHECKING:
    import numpy as np

    from .text import Text, TextEncoder


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
    check_width(model, *(None if u is None else u.shape[-1] for u in (text.states, text.pooled, text.t5)))  # type: ignore[arg-type]
    found = {"text": text.states}
    if masked and "mask" in known:
        found["mask"] = text.mask
    if "pooled" in known and text.pooled is not None:
        found["pooled"] = text.pooled
    if "t5" in known and text.t5 is not None:
        found["t5"] = text.t5
        if masked and text.t5_mask is not None:
            found["t5_mask"] = text.t5_mask
    return found


def check_width(model: Any, dim: int, pooled_dim: int | None, t5_dim: int | None = None) -> None:
    """Raise DitkitError where an encoder's states, pooled vector or second text are not what the network was built for."""
    known = wants(model)
    hint = "this is another model's encoder: give the one that the network was trained with"
    missing = "bytes, or a CLIP model, have one", "the encoder 'hunyuan' has one"
    _check(model, "the text encoder's states have width", "text_dim", dim, hint)
    for name, what, width, have in (("pooled", "a pooled text", pooled_dim, missing[0]), ("t5", "a second text", t5_dim, missing[1])):
        if name not in known:
            continue
        if width is None:
            raise DitkitError(f"{model.name} is told {what} too, and the text encoder has none", hint=have)
        _check(model, f"the {what.removeprefix('a ')} has width", f"{name}_dim", width, hint)


def check_encoder(model: Any, encoder: TextEncoder) -> None:
    """``check_width`` of what an encoder will say, before it reads any weights; and the lengths of texts that have only one."""
    second = encoder.t5_shape
    check_width(model, encoder.dim, encoder.pooled_dim, None if second is None else second[1])
    if second is None or "t5" not in wants(model):
        return
    for key, length in (("text_length", encoder.length), ("t5_length", second[0])):
        if (wanted := getattr(model.config, key, length)) != length:
            raise DitkitError(f"the encoder's {key} is {length}", allowed=f"{wanted}, the {key} of {model.name}", hint="set its lengths")


def _check(model: Any, what: str, key: str, width: int, hint: str) -> None:
    if (wanted := getattr(model.config, key, width)) != width:
        raise DitkitError(f"{what} {width}", allowed=f"{wanted}, the {key} of {model.name}", hint=hint)


def told_size(model: Any, size: tuple[int, int], trained: tuple[int, int], count: int) -> dict[str, Tensor]:
    """``size`` in pixels, for a network with micro-conditions; nothing for others.

    Args:
        size: height and width of the pictures.
        trained: of the training data, which Hunyuan-DiT is told as the size of the original.

    Returns:
        (count, 2), height and width; or (count, 6), those of the original, of the picture, and the corner of a crop.
    """
    if _told_size(model):
        told: tuple[int, ...] = size
    elif _told_crop(model):
        told = (*trained, *size, 0, 0)
    else:
        return {}
    return {"size": torch.tensor([told], dtype=torch.float32).expand(count, -1)}


def told_framing(model: Any, framing: np.ndarray, size: tuple[int, int]) -> dict[str, Tensor]:
    """What a network with micro-conditions is told of training pictures; nothing for others.

    Args:
        framing: (B, 4), height and width of each original, top and left of what is shown of it (``Pictures.framing``).
        size: height and width of the pictures as they are shown.

    Returns:
        PixArt: the originals' sizes, and the aspect (B, 1) of what is shown. Hunyuan-DiT: (B, 6) as in ``told_size``.
    """
    original, top_left = torch.from_numpy(framing).float().split(2, 1)
    shown = torch.tensor([size], dtype=torch.float32).expand(len(framing), -1)
    if _told_size(model):
        return {"size": original, "aspect": shown[:, :1] / shown[:, 1:]}
    return {"size": torch.cat([original, shown, top_left], 1)} if _told_crop(model) else {}


def _told_size(model: Any) -> bool:
    return "size" in wants(model) and bool(getattr(model.config, "micro_conditions", False))


def _told_crop(model: Any) -> bool:
    return "size" in wants(model) and bool(getattr(model.config, "size_and_style", False))
