"""The text encoder that is learned with the network: words of bytes, a small transformer. No vocabulary, no download.

A prompt is cut into words and signs, each the UTF-8 bytes of a run of letters or digits, or of one other character; a run longer
than ``word_bytes`` goes on in the next token. The bytes of a word, embedded and put side by side, make one token: so a caption is as
short as for a trained tokeniser, every word of every script has a code, and equal words have equal codes. Written for this project;
words as the units of bytes are also those of SpaceByte (2404.14408).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.core import registry
from ditkit.nn.layers import Mlp

from ..text import LongPrompts, Text, TextConfig, TextEncoder, Tokens

END, NOTHING = 256, 257  # after the 256 bytes: the end of a prompt, and no byte
_WORD = re.compile(r"\w+|[^\w\s]")


class ByteConfig(TextConfig):
    """Shape of a ``ByteEncoder``."""

    word_bytes: int = Field(16, ge=1, le=64, description="bytes of one token, at most")
    fold_case: bool = Field(True, description="Red and red are the same word")
    byte_dim: int = Field(32, ge=1, description="width of one byte's embedding")
    dim: int = Field(128, ge=1, description="width of the states")
    depth: int = Field(2, ge=0, le=100, description="layers of the transformer over words")
    num_heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    twice: bool = Field(False, description="the states are given as a second text too, for a network that reads two (Hunyuan-DiT)")

    @model_validator(mode="after")
    def _fits(self) -> ByteConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        return self


@registry.register("encoders", "bytes")
class ByteEncoder(TextEncoder):
    """Tokens (B, L, word_bytes) of 0 .. 257, mask (B, L) -> states (B, L, dim), zero at padding; pooled: their mean over the mask."""

    config_class = ByteConfig
    learned = True
    config: ByteConfig

    def __init__(self, config: ByteConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        cfg = self.config
        self.byte = nn.Embedding(258, cfg.byte_dim, padding_idx=NOTHING)
        self.word = Mlp(cfg.word_bytes * cfg.byte_dim, cfg.dim, cfg.dim)
        self.position = nn.Embedding(cfg.max_length, cfg.dim)
        self.layers = nn.ModuleList(_Layer(cfg.dim, cfg.num_heads, cfg.mlp_ratio) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Words start far apart and layers silent.

        No byte is a zero, not a code that all short words share; a word of four letters has a code of about unit size, a place a third
        of that. Otherwise what all words have in common outweighs what they differ in, and while the network does not listen yet, that
        part alone grows until every caption is the same.
        """
        cfg = self.config
        nn.init.normal_(self.word.fc1.weight, std=(4 * cfg.byte_dim) ** -0.5)
        nn.init.normal_(self.word.fc2.weight, std=1.5 * cfg.dim**-0.5)  # GELU leaves 0.43 of the square
        nn.init.normal_(self.position.weight, std=0.3)
        for linear in (self.word.fc1, self.word.fc2):
            nn.init.zeros_(linear.bias)
        for name, p in self.layers.named_parameters():
            if name.split(".", 1)[1].startswith(("proj", "mlp.fc2")):
                nn.init.zeros_(p)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def pooled_dim(self) -> int:
        return self.config.dim

    @property
    def t5_shape(self) -> tuple[int, int] | None:
        return (self.config.max_length, self.config.dim) if self.config.twice else None

    def words(self, prompt: str) -> list[bytes]:
        """The tokens of a prompt, its end mark left out."""
        size, text = self.config.word_bytes, prompt.casefold() if self.config.fold_case else prompt
        words = (word.encode() for word in _WORD.findall(unicodedata.normalize("NFC", text)))
        return [word[i : i + size] for word in words for i in range(0, len(word), size)]

    def cut(self, prompts: Sequence[str], how: LongPrompts) -> tuple[Tokens, list[int]]:
        cfg = self.config
        tokens = torch.full((len(prompts), cfg.max_length, cfg.word_bytes), NOTHING)
        lengths = []
        for row, prompt in zip(tokens, prompts):
            words = self.words(prompt)
            lengths.append(len(words) + 1)
            kept = words[: cfg.max_length - 1]
            for place, word in zip(row, kept):
                place[: len(word)] = torch.frombuffer(bytearray(word), dtype=torch.uint8)
            row[len(kept), 0] = END
        return Tokens(tokens, tokens[:, :, 0] != NOTHING), lengths

    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        x = self.word(self.byte(tokens).flatten(2)) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        states = self.norm(x) * mask[..., None]
        second = (states, mask) if self.config.twice else ()
        return Text(states, mask, states.sum(1) / mask.sum(1, keepdim=True), *second)


class _Layer(nn.Module):
    """Attention among the words that are there, then an MLP; each after a LayerNorm, added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
