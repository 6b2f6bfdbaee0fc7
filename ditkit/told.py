"""What the pictures of a call are made from: class labels or prompts, as the conditioning that the network takes.

Tensors hold a row for each label or prompt; picture k takes row ``rows[k]``, in the order p0, p0, p1, p1 for all of them alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ditkit.bundle import BundleConfig, EncoderPart
from ditkit.conditioning import encoder_from
from ditkit.conditioning.inputs import check_encoder, network_inputs, takes_text, told_size
from ditkit.conditioning.text import LongPrompts, Text, TextEncoder, check_prompts
from ditkit.core import registry
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.request import expand_labels, images_in_all, whole


@dataclass(frozen=True)
class Told:
    """Conditioning of the pictures of a call."""

    cond: dict[str, Tensor]  # name -> (P, ...)
    null: dict[str, Tensor] | None  # the same for none of it; None where nothing is guided
    rows: list[int]  # picture -> row
    record: dict[str, Any] = field(default_factory=dict)  # in words, for what is saved

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Of some of the pictures: the conditioning, and the null conditioning."""
        rows = self.rows[part]
        return _take(self.cond, rows), None if self.null is None else _take(self.null, rows)


def _take(cond: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: value[torch.tensor(rows, device=value.device)] for name, value in cond.items()}


@dataclass(frozen=True)
class Asked:
    """What a caller gave of labels and prompts; ``examples``: the captions for a call that gives none."""

    class_labels: int | Sequence[int] | None = None
    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    prompt_embeds: Text | None = None
    negative_prompt_embeds: Text | None = None
    long_prompts: LongPrompts | None = None
    examples: Sequence[str] = ()
    trained: tuple[int, int] | None = None  # height and width of the training data

    def captions(self, model: Any, encoder: TextEncoder | None, size: tuple[int, int]) -> Captions | None:
        """The text side; None for a model that is told labels. Raises DitkitError where the caller gave what the model is not told."""
        words = {k: v for k, v in vars(self).items() if k not in ("class_labels", "examples", "trained", "long_prompts") and v is not None}
        if not takes_text(model):
            if words:
                raise DitkitError(f"{model.name} is told class labels, and {', '.join(words)} is given", allowed="class_labels")
            return None
        if self.class_labels is not None:
            raise DitkitError(f"{model.name} is told captions, and class_labels is given", allowed="prompt", hint="prompt='a red circle'")
        for text, states in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if text in words and states in words:
                raise DitkitError(f"{text} and {states} are both given", allowed="one of them")
        prompt = words.get("prompt", words.get("prompt_embeds", list(self.examples)))
        if isinstance(prompt, list | tuple) and not prompt:
            raise DitkitError(f"{model.name} is told captions, and none is given", allowed="prompt", hint="prompt='a red circle'")
        negative = words.get("negative_prompt", self.negative_prompt_embeds)
        return Captions(model, encoder, prompt, negative, size, self.trained or size, self.long_prompts)

    def told(
        self,
        model: Any,
        encoder: TextEncoder | None,
        images: tuple[int | None, int | None],
        size: tuple[int, int],
        guided: bool,
        device: torch.device,
    ) -> Told:
        """The conditioning. ``images``: pictures in all, or for each prompt or label; None: one for each."""
        captions = self.captions(model, encoder, size)
        if captions is not None:
            return captions.told(images_in_all(*images, captions.count), guided, device)
        labels = self.class_labels
        count = model.config.num_classes if labels is None else len(labels) if isinstance(labels, Sequence | Tensor) else 1
        return labels_told(model, labels, images_in_all(*images, count), guided, device)


def labels_told(model: Any, class_labels: int | Sequence[int] | None, num_images: int | None, guided: bool, device: torch.device) -> Told:
    """From class labels; None: all classes in turn."""
    labels = expand_labels(class_labels, num_images, model.config.num_classes)
    y = torch.tensor(labels, device=device)
    return Told({"y": y}, model.null(y) if guided else None, list(range(len(labels))), {"class_labels": labels})


@dataclass(frozen=True)
class Captions:
    """The text side of a call.

    Attributes:
        encoder: None where ``prompt`` and ``negative`` are encoded already.
        prompt, negative: texts, or what they became elsewhere. ``negative`` None: the null caption.
        size, trained: height and width of the pictures, and of the training data, for a network that is told them.
    """

    model: Any
    encoder: TextEncoder | None
    prompt: str | Sequence[str] | Text
    negative: str | Sequence[str] | Text | None
    size: tuple[int, int]
    trained: tuple[int, int]
    long_prompts: LongPrompts | None = None

    def told(self, num_images: int | None, guided: bool, device: torch.device) -> Told:
        """The conditioning of ``num_images`` pictures in all, by default one for each prompt."""
        prompts, count = _listed(self.prompt), self.count
        total = count if num_images is None else whole("num_images", num_images, 1, 1 << 20)
        if not count or total % count:
            raise DitkitError(f"{total} images for {count} prompts", allowed="a multiple of the number of prompts")
        negative = None if self.negative is None else _repeated(_listed(self.negative), count)
        text, cut = self._encoded(prompts, device)
        extra = {name: value.to(device) for name, value in told_size(self.model, self.size, self.trained, count).items()}
        cond = {**network_inputs(self.model, text, self._masked), **extra}
        null, more = self._null(cond, extra, negative, device) if guided else (None, 0)
        copies = total // count
        record: dict[str, Any] = {"prompts": _in_words(prompts, copies), "truncated": cut + more}
        if negative is not None:
            record["negative_prompts"] = _in_words(negative, copies)
        if self.encoder is not None:
            record["long_prompts"] = self.long_prompts or self.encoder.config.long_prompts
        return Told(cond, null, [p for p in range(count) for _ in range(copies)], record)

    @property
    def count(self) -> int:
        """Number of prompts."""
        prompts = _listed(self.prompt)
        return len(prompts.states) if isinstance(prompts, Text) else len(prompts)

    @property
    def _masked(self) -> bool:
        return self.encoder is None or bool(self.encoder.config.masked)

    def _null(
        self, cond: dict[str, Tensor], extra: dict[str, Tensor], negative: list[str] | Text | None, device: torch.device
    ) -> tuple[dict[str, Tensor], int]:
        """Of the negative prompts; without one the empty prompt, or what the network says."""
        if negative is None and (self.encoder is None or self.encoder.null_caption == "model"):
            return self.model.null(**cond), 0
        texts = [""] * len(cond["text"]) if negative is None else negative
        text, cut = self._encoded(texts, device)
        length = cond["text"].shape[1]
        text = text.padded(length) if text.states.shape[1] < length else text
        return {**network_inputs(self.model, text, self._masked), **extra}, cut

    def _encoded(self, texts: list[str] | Text, device: torch.device) -> tuple[Text, int]:
        """Encoded one by one, so that a prompt's states do not depend on the others to the last bit; and how many were cut."""
        if isinstance(texts, Text):
            return texts.to(device), 0
        if self.encoder is None:
            raise DitkitError(
                f"the bundle of this {self.model.name} names no text encoder",
                hint="from_pretrained(..., text_encoder=...), or give prompt_embeds",
            )
        check_encoder(self.model, self.encoder)  # before large weights are read
        tokens = self.encoder.to(device).tokenize(texts, self.long_prompts)
        known: dict[str, Text] = {}
        for k, text in enumerate(texts):
            if text not in known:
                known[text] = self.encoder(tokens.tokens[k : k + 1].to(device), tokens.mask[k : k + 1].to(device))
        return Text.cat([known[text] for text in texts]), tokens.truncated


def _listed(prompt: str | Sequence[str] | Text) -> list[str] | Text:
    if isinstance(prompt, Text):
        return prompt
    texts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else [prompt]
    check_prompts(texts)
    return texts


def _repeated(negative: list[str] | Text, count: int) -> list[str] | Text:
    """One negative prompt for all, or one for each."""
    have = len(negative.states) if isinstance(negative, Text) else len(negative)
    if have not in (1, count):
        raise DitkitError(f"{have} negative prompts for {count} prompts", allowed=f"1, or {count}")
    if have == count:
        return negative
    return negative.take([0] * count) if isinstance(negative, Text) else negative * count


def _in_words(texts: list[str] | Text, copies: int) -> list[str | None]:
    """One for each picture; None for what was encoded elsewhere."""
    words: list[str | None] = [None] * len(texts.states) if isinstance(texts, Text) else list(texts)
    return [word for word in words for _ in range(copies)]


def words_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a pipeline with, from the record of one picture."""
    if "class_label" in record:
        return {"class_labels": record["class_label"]}
    words = {key: record[key] for key in ("prompt", "negative_prompt") if key in record}
    if "prompt" not in words or None in words.values():
        what = "was made from prompt_embeds" if words else "lacks class_label and prompt"
        raise DitkitError(f"the record {what}", allowed="the record of one picture, with its label or prompt")
    return {**words, "long_prompts": record.get("long_prompts")}


def find_encoder(model: Any, config: BundleConfig) -> TextEncoder | None:
    """The encoder that is part of the model, or that its configuration names."""
    if model.encoder is not None:
        found: TextEncoder = model.encoder
        return found
    return None if config.encoder is None else _read(config.encoder, model)


def moved_encoder(given: TextEncoder | str | Path | None, config: BundleConfig, model: Any) -> TextEncoder | None:
    """The encoder that a caller gave, or the bundle's in another folder."""
    if given is None or isinstance(given, TextEncoder):
        return given
    if config.encoder is None or "path" not in config.encoder.config:
        raise ConfigError(
            "the bundle names no text encoder of a folder" + (f", but {config.encoder.name!r}" if config.encoder else ""),
            allowed="text_encoder as an encoder: its max_length and layer must be known",
            hint=f"encoder_from('transformers', {{'path': {str(given)!r}, 'max_length': ...}})",
        )
    return _read(config.encoder, model, path=str(given))


def _read(part: EncoderPart, model: Any, **moved: Any) -> TextEncoder:
    """A bundle's encoder; in the network's dtype where the bundle leaves it open (a diffusers folder does)."""
    cls: Any = registry.get("encoders", part.name)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    field = cls.config_class.model_fields.get("dtype")
    own = {"dtype": dtype} if field is not None and dtype in get_args(field.annotation) else {}
    encoder = encoder_from(part.name, {**own, **part.config, **moved})
    encoder.expected_hash = part.hash
    return encoder
