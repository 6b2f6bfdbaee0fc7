"""What every text encoder is: prompts to tokens, tokens to states with a mask. B prompts, L tokens, D width.

Every prompt has L = ``max_length`` tokens, the rest of it padding: what a prompt becomes depends neither on the prompts beside it
nor on how long these are. A prompt that is too long is an error, or is cut where the configuration or the caller says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ditkit.core.config import Config
from ditkit.core.errors import ConfigError, DitkitError

from .inputs import network_inputs

LongPrompts = Literal["error", "truncate"]


class Text(NamedTuple):
    """Encoded prompts."""

    states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool, false at padding
    pooled: Tensor | None = None  # (B, D_pooled), one vector a prompt
    t5: Tensor | None = None  # (B, L_t5, D_t5), a second text, for a network that is given two (Hunyuan-DiT)
    t5_mask: Tensor | None = None  # (B, L_t5) bool

    def take(self, rows: Sequence[int]) -> Text:
        """These rows of all tensors, in this order: ``[0, 0, 1, 1]`` for two pictures of each of two prompts."""
        index = torch.tensor(list(rows), device=self.states.device)
        return Text(*(None if u is None else u[index] for u in self))  # type: ignore[arg-type]

    def padded(self, length: int) -> Text:
        """As many tokens as ``length``; what is added is masked."""
        more = length - self.states.shape[1]
        if more < 0:
            raise DitkitError(f"length is {length}", allowed=f"{self.states.shape[1]} or more, as many tokens as there are")
        states, mask = nn.functional.pad(self.states, (0, 0, 0, more)), nn.functional.pad(self.mask, (0, more))
        return self._replace(states=states, mask=mask)

    def to(self, device: torch.device | str) -> Text:
        """On ``device``."""
        return Text(*(None if u is None else u.to(device) for u in self))  # type: ignore[arg-type]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Text:
        """One after the other; all with the same L."""
        return Text(*(None if any(u is None for u in column) else torch.cat(column) for column in zip(*parts)))  # type: ignore[arg-type]


class Tokens(NamedTuple):
    """Prompts cut into tokens: what an encoder is called with."""

    tokens: Tensor  # (B, L, ...) integers, the encoder's own
    mask: Tensor  # (B, L) bool, false at padding
    truncated: int = 0  # prompts that were cut


class TextConfig(Config):
    """What all text encoders are set to."""

    max_length: int = Field(64, ge=2, le=1 << 16, description="tokens of a prompt, those that mark its ends among them")
    long_prompts: LongPrompts = Field("error", description="a longer prompt is an error, or is cut (its end mark stays)")
    masked: bool = Field(
        True, description="padding is hidden from the network. False: it is seen, always up to max_length, as SD3 and FLUX were trained"
    )


class TextEncoder(nn.Module):
    """A subclass gives ``cut``, ``forward``, ``dim`` and these attributes.

    Attributes:
        learned: its weights belong to the bundle and are trained with the network.
        null_caption: what stands for no caption: "empty", the empty prompt, or "model", what the network itself says.
        title: what errors call it, where it is one of several.
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type[TextConfig]] = TextConfig
    learned: ClassVar[bool] = False
    null_caption: Literal["empty", "model"] = "empty"
    title: str = ""
    expected_hash: str = ""  # of the encoder that the network was trained with, where that is known
    config: Any

    def __init__(self, config: TextConfig | None = None, **values: Any) -> None:
        super().__init__()
        self.config = self.config_class(**values) if config is None else config

    @property
    def dim(self) -> int:
        """Width of the states."""
        raise NotImplementedError

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled vector; None: there is none."""
        return None

    @property
    def length(self) -> int:
        """Tokens of every prompt's states, padding included."""
        return int(self.config.max_length)

    @property
    def t5_shape(self) -> tuple[int, int] | None:
        """Tokens and width of the second text; None: there is none."""
        return None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def cut(self, prompts: Sequence[str], how: LongPrompts) -> tuple[Tokens, list[int]]:
        """Tokens, on the CPU, and how many tokens each prompt has; those that have too many are cut, whatever ``how`` says."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        """Tokens (B, L, ...) and their mask (B, L) -> states."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str], long_prompts: LongPrompts | None = None) -> Tokens:
        """Cut prompts into tokens.

        Args:
            long_prompts: instead of the configuration's.

        Raises:
            DitkitError: a prompt is no text, or too long; it is named.
        """
        how = self.checked(prompts, long_prompts)
        tokens, lengths = self.cut(prompts, how)
        return tokens._replace(truncated=len(self.too_long(prompts, lengths, how)))

    def checked(self, prompts: Sequence[str], long_prompts: LongPrompts | None) -> LongPrompts:
        """What is to be done with long prompts, of prompts that are ones."""
        how: LongPrompts = long_prompts or self.config.long_prompts
        if how not in ("error", "truncate"):
            raise DitkitError(f"long_prompts is {how!r}", allowed="error, truncate")
        check_prompts(prompts)
        return how

    def too_long(self, prompts: Sequence[str], lengths: Sequence[int], how: LongPrompts) -> list[int]:
        """Which of the prompts have too many tokens; DitkitError, naming the first, where that is an error."""
        long = [k for k, length in enumerate(lengths) if length > self.config.max_length]
        if long and how == "error":
            whose = f" for {self.title}" if self.title else ""
            raise DitkitError(
                f"prompt {_short(prompts[long[0]])} has {lengths[long[0]]} tokens{whose}",
                allowed=f"at most {self.config.max_length}, with the end mark",
                hint="shorten it, or long_prompts='truncate' to cut it",
            )
        return long

    def encode(self, prompts: Sequence[str], long_prompts: LongPrompts | None = None) -> Text:
        """Prompts -> states (B, L, D), on the encoder's device."""
        tokens = self.tokenize(prompts, long_prompts)
        text: Text = self(tokens.tokens.to(self.device), tokens.mask.to(self.device))
        return text

    def conditioning(self, model: Any, tokens: Tensor, mask: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        """What ``model.prepare`` takes, of tokens: how a backbone that this encoder is learned with calls it."""
        return {**network_inputs(model, self(tokens, mask), self.config.masked), **rest}

    def card(self) -> dict[str, Any]:
        """What a bundle's ``config.json`` says of it; of one whose weights are elsewhere, which it is, if that is known."""
        return {"name": self.name, "config": self.config.to_dict(), "hash": self.expected_hash}

    def identity(self) -> dict[str, Any]:
        """What the states depend on beside the weights, as plain data."""
        config = {k: v for k, v in self.config.to_dict().items() if k != "long_prompts"}
        return {"name": self.name, "config": config}

    def content_hash(self) -> str:
        """SHA-256 of ``identity`` and of all weights: equal hashes, equal states."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_hash(self, where: Any) -> None:
        """Raise ConfigError where this is not the encoder that the network was trained with; ``where``: its folder."""
        if self.expected_hash and self.content_hash() != self.expected_hash:
            raise ConfigError(
                f"the text encoder in {where} is not the one that the network was trained with",
                hint="from_pretrained(..., text_encoder=FOLDER) says where that one is",
            )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise DitkitError unless ``prompts`` are some texts that can be written down as UTF-8."""
    if isinstance(prompts, str) or not prompts:
        raise DitkitError(f"prompts are {prompts!r}", allowed="a list of one or more texts")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DitkitError(f"a prompt is {prompt!r}", allowed="text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DitkitError(
                f"prompt {prompt!r}: character {error.start} is half of a surrogate pair", allowed="text that UTF-8 can hold"
            ) from None


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:37]}...")
