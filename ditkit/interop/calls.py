"""What diffusers' pipelines call their transformer with, in our words: of each family a reader of the arguments of its ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditkit.backbones.lumina import Lumina
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.nn.patches import patchify, unpatchify
from ditkit.nn.positions import coordinates


class Call(NamedTuple):
    """One evaluation of the network."""

    x: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) network time
    cond: dict[str, Any]  # as ``prepare`` takes it
    restore: Callable[[Tensor], Tensor] = lambda output: output  # our output -> theirs
    setting: Hashable = None  # what the call changes in the network itself, for ``Reader.view``


@dataclass(frozen=True)
class Reader:
    """Of one family.

    Attributes:
        read: the model and the arguments of diffusers' ``forward`` -> Call.
        times: entries of the scheduler's ``timesteps`` -> what the pipeline tells the network then; the scheduler; the dtype of x.
        view: the model and a call's ``setting`` -> the model with it.
        flow: the scheduler's times are of a flow: t T; a Gaussian process's are indices n, t = (n + 1) / T.
    """

    read: Callable[..., Call]
    times: Callable[[Tensor, Any, torch.dtype], Tensor] = lambda steps, scheduler, dtype: steps
    view: Callable[[Any, Any], Backbone] = lambda model, setting: model
    flow: bool = False

    def public(self, steps: Tensor, scheduler: Any) -> Tensor:
        """Entries of the scheduler's ``timesteps`` as public time: 1 is noise, 0 is data."""
        return (steps if self.flow else steps + 1) / scheduler.config.num_train_timesteps


def _nothing_else(rest: dict[str, Any]) -> None:
    """Raises DitkitError for an argument that our networks do not take (control, adapters, attention scales), unless it is empty."""
    for name, value in rest.items():
        if value is not None and not (isinstance(value, dict) and not value):
            raise DitkitError(f"the pipeline gives its transformer {name}", allowed="calls without it: ditkit's network has no such input")


def _dit(model: Backbone, hidden_states: Tensor, timestep: Any = None, class_labels: Any = None, **rest: Any) -> Call:
    _nothing_else(rest)
    return Call(hidden_states, timestep, {"y": class_labels})


def _pixart(
    model: Backbone,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    timestep: Any = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    encoder_attention_mask: Tensor | None = None,
    **rest: Any,
) -> Call:
    _nothing_else(rest)
    told = {"text": encoder_hidden_states, "mask": _mask(encoder_attention_mask)}
    if model.config.micro_conditions:  # pipelines give sizes to every network of 128 latent pixels
        added = added_cond_kwargs or {}
        told |= {"size": added.get("resolution"), "aspect": added.get("aspect_ratio")}
    return Call(hidden_states, timestep, told)


def _mmdit(
    model: Backbone,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    pooled_projections: Any = None,
    timestep: Any = None,
    **rest: Any,
) -> Call:
    _nothing_else(rest)
    return Call(hidden_states, timestep, {"text": encoder_hidden_states, "pooled": pooled_projections})


def _flux(
    model: Backbone,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    pooled_projections: Any = None,
    timestep: Any = None,
    img_ids: Any = None,
    txt_ids: Any = None,
    guidance: Tensor | None = None,
    controlnet_blocks_repeat: bool = False,
    **rest: Any,
) -> Call:
    """Patches are packed, and say where they stand in ``img_ids`` (N, 3)."""
    _nothing_else(rest)
    grid, patch = _grid(img_ids, txt_ids), model.config.patch_size
    x = unpatchify(hidden_states, grid, patch, "channels first")
    told = {"text": encoder_hidden_states, "pooled": pooled_projections, "guidance": guidance}
    return Call(x, timestep.float(), told, lambda output: patchify(output, patch))


_grids = WeakIdKeyDictionary()  # img_ids -> rows and columns: a pipeline gives the same tensor at every step


def _grid(img_ids: Tensor, txt_ids: Tensor) -> tuple[int, int]:
    """Rows and columns of a picture whose patches stand at (0, row, column), all of them, in order; the text at 0."""
    if img_ids in _grids:
        found: tuple[int, int] = _grids[img_ids]
        return found
    img, text = (ids[0] if ids.dim() == 3 else ids for ids in (img_ids, txt_ids))
    h, w = (int(n) + 1 for n in img[-1, 1:])
    if h * w != len(img) or not torch.equal(img.float(), coordinates((1, h, w))[0].to(img.device, torch.float32)) or bool(text.any()):
        raise DitkitError("the pipeline places its patches otherwise than row by row, or its text elsewhere than at 0")
    _grids[img_ids] = (h, w)
    return h, w


def _lumina(
    model: Backbone,
    hidden_states: Tensor,
    timestep: Any = None,
    encoder_hidden_states: Any = None,
    encoder_mask: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    **rest: Any,
) -> Call:
    """``image_rotary_emb`` (rows, columns, head / 2) is complex, for at least the grid at hand, and stretched for larger pictures."""
    more = dict(cross_attention_kwargs or {})
    base = more.pop("base_sequence_length", None)
    _nothing_else({**rest, **{f"cross_attention_kwargs[{name!r}]": value for name, value in more.items()}})
    assert isinstance(model, Lumina)
    h, w = (side // model.config.patch_size for side in hidden_states.shape[2:])
    told: dict[str, Any] = {"text": encoder_hidden_states, "mask": _mask(encoder_mask)}
    if image_rotary_emb is not None:
        turned = image_rotary_emb[:h, :w].flatten(0, 1)[None].to(hidden_states.device)
        own = model.rope.table((h, w), hidden_states.device)
        rope = tuple(u.float().repeat_interleave(2, -1) for u in (turned.real, turned.imag))
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rope, own)):
            told["rope"] = rope
    return Call(hidden_states, timestep, told, setting=None if base == h * w else base)


def _sharpened(model: Lumina, base: int | None) -> Lumina:
    """Attention as sharp as among ``base`` tokens."""
    how = model.config.extrapolation.to_dict()
    return model if base is None else model.extrapolating(**{**how, "proportional": True, "base_tokens": base})


def _hunyuan(
    model: Backbone,
    hidden_states: Tensor,
    timestep: Any = None,
    encoder_hidden_states: Any = None,
    text_embedding_mask: Tensor | None = None,
    encoder_hidden_states_t5: Any = None,
    text_embedding_mask_t5: Tensor | None = None,
    image_meta_size: Tensor | None = None,
    style: Any = None,
    image_rotary_emb: Any = None,
    **rest: Any,
) -> Call:
    """There is one style, and rotary positions follow from the picture's size."""
    _nothing_else(rest)
    told = {"text": encoder_hidden_states, "t5": encoder_hidden_states_t5}
    told |= {"mask": _mask(text_embedding_mask), "t5_mask": _mask(text_embedding_mask_t5)}
    if model.config.size_and_style:  # pipelines give sizes to every network
        told["size"] = image_meta_size
    return Call(hidden_states, timestep, told)


def _mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


READERS = {
    "dit": Reader(_dit),
    "pixart": Reader(_pixart),
    "mmdit": Reader(_mmdit, flow=True),
    "flux": Reader(_flux, lambda steps, scheduler, dtype: (steps.to(dtype) / 1000).float(), flow=True),
    "lumina": Reader(_lumina, lambda steps, scheduler, dtype: 1 - steps / scheduler.config.num_train_timesteps, _sharpened, flow=True),
    "hunyuan": Reader(_hunyuan, lambda steps, scheduler, dtype: steps.to(dtype)),
}
