"""A data set whose conditioning is its captions: tokens for an encoder that is learned along, states of one that is frozen.

What a frozen encoder says of the captions is computed before the first step and kept (``TextCache``); tokens are cut at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ditkit.conditioning import TextEncoder, network_inputs, takes_text
from ditkit.conditioning.cache import TextCache
from ditkit.conditioning.inputs import check_encoder, told_framing, told_size
from ditkit.core.errors import ConfigError
from ditkit.data import Dataset

log = logging.getLogger("ditkit")
MANY, FEW = 4096, 1000  # captions looked at together; captions of an endless set that are looked at


class Captioned:
    """``batch(ids)``: ``x``, and what the model is told, without labels.

    Args:
        data: a data set with captions.
        model: that is told them; with ``model.encoder`` it gets tokens.
        encoder: the same, or a frozen one.
        size: height and width of the pictures, where the model is told them.

    Raises:
        DitkitError: a caption is too long, unless the encoder's settings say to cut it; the first such caption is named.
    """

    num_classes, labels = 0, ()

    def __init__(self, data: Dataset, model: Any, encoder: TextEncoder, size: tuple[int, int]) -> None:
        self.data, self.model, self.encoder, self.size = data, model, encoder, size
        self.name, self.shape = data.name, data.shape
        self.groups = getattr(data, "groups", None)
        self.learned = model.encoder is encoder
        self._cache = None if self.learned else TextCache(encoder.to(next(model.parameters()).device))
        if self._cache is not None:
            self._scan(self._cache)
        else:  # a caption that is too long is named now, not at the step that meets it
            endless = not hasattr(data, "has_captions")  # made when asked for, which takes time
            for ids in self._parts(FEW if endless else len(data)):
                encoder.tokenize(self.captions(ids))

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Samples by their number."""
        return self._with_words(indices, self.data.batch(indices)["x"])

    @property
    def augmented(self) -> Callable[..., dict[str, Tensor]] | None:
        """As the data set's own, where its samples change from step to step."""
        inner = getattr(self.data, "augmented", None)
        return None if inner is None else lambda ids, **step: self._with_words(ids, inner(ids, **step)["x"], **step)

    def captions(self, indices: np.ndarray) -> list[str]:
        """The caption of each sample."""
        found: list[str] = self.data.captions(indices)  # type: ignore[attr-defined]
        return found

    def told(self, captions: list[str]) -> dict[str, Tensor]:
        """What the model is called with for these captions, on the CPU."""
        if self._cache is None:
            tokens = self.encoder.tokenize(captions)
            return {"tokens": tokens.tokens, "mask": tokens.mask}
        return network_inputs(self.model, self._cache.encode(captions), self.encoder.config.masked)

    def sizes(self, indices: np.ndarray, shape: tuple[int, ...], **step: int) -> dict[str, Tensor]:
        """What a network with micro-conditions is told of samples of ``shape``, in pixels: of originals where the data know them."""
        factor = self.size[0] // self.shape[1]  # of a codec
        framing = getattr(self.data, "framing", None)
        if framing is None:
            return told_size(self.model, self.size, self.size, len(indices))
        return told_framing(self.model, framing(indices, **step), (shape[-2] * factor, shape[-1] * factor))

    def _with_words(self, indices: np.ndarray, x: Tensor, **step: int) -> dict[str, Tensor]:
        return {"x": x, **self.told(self.captions(indices)), **self.sizes(indices, x.shape, **step)}

    def none(self, model: Any, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands for no caption, for a batch like this one: the empty caption, or what the network says."""
        if self.encoder.null_caption == "model":
            found: dict[str, Tensor] = model.null(**cond)
            return found
        return {name: _like(value, cond[name]) for name, value in self.told([""]).items()} | _sizes(cond)

    def _scan(self, cache: TextCache) -> None:
        """Encode all captions."""
        new = sum(cache.add(self.captions(ids)) for ids in self._parts(len(self)))
        cache.add([""], progress=False)
        log.info("captions of %s: %d encoded, the others found in %s", self.name, new, cache.folder)

    def _parts(self, count: int) -> Iterator[np.ndarray]:
        count = min(count, len(self))
        return (np.arange(i, min(i + MANY, count)) for i in range(0, count, MANY))


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device).expand(len(other), *value.shape[1:])


def _sizes(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: cond[name] for name in ("size", "aspect") if name in cond}


def check_told(model: Any, encoder: TextEncoder | None, data: Any) -> None:
    """Raise ConfigError unless network, encoder and data fit: captions for a network that is told captions."""
    if takes_text(model) and encoder is None:
        raise ConfigError(f"backbone {model.name} is told captions, and the recipe has no encoder", hint="encoder: {name: bytes}")
    if not takes_text(model) and encoder is not None:
        raise ConfigError(
            f"backbone {model.name} is told class labels, and the recipe has an encoder", hint="leave it out, or choose pixart"
        )
    if encoder is not None:
        check_encoder(model, encoder)
    if encoder is not None and not getattr(data, "has_captions", hasattr(data, "captions")):
        raise ConfigError(f"data set {data.name!r} has no captions", allowed="scenes, or pictures with name.txt beside name.png")


def examples(data: Any, count: int) -> tuple[str, ...]:
    """Some captions, to sample with: the first ones that differ."""
    found = data.captions(np.arange(min(len(data), 4 * count)))
    return tuple(dict.fromkeys(found))[:count]


__all__ = ["Captioned", "check_told", "examples"]
