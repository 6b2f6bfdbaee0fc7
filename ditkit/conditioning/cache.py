"""What a frozen encoder said, kept on the disk: ``TextCache(encoder).encode(prompts)`` asks it for new prompts only.

A folder for each encoder, named by its content hash (settings, tokenizer and weights), holds files of many prompts each; a prompt is
found by the SHA-256 of its text. So an encoder that was changed never finds what another one said. States are kept without padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ditkit.core.cache import cache_dir
from ditkit.core.errors import WeightsError
from ditkit.core.files import write_tensors
from ditkit.data.latent_set import MappedTensors

from .text import Text, TextEncoder

WHOLE = ("pooled", "t5", "t5_mask")  # a row a prompt


class TextCache:
    """Encoded prompts of one encoder.

    Args:
        folder: holds the folders of all encoders; by default ``text`` in ditkit's cache folder.
        batch_size: prompts encoded at a time.
        file_rows: prompts of one file, at most.

    Attributes:
        encoded: prompts that the encoder was asked for so far.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None, batch_size: int = 16, file_rows: int = 1024) -> None:
        self.encoder, self.batch_size, self.file_rows, self.encoded = encoder, batch_size, file_rows, 0
        self.folder = Path(folder or cache_dir("text")) / encoder.content_hash()[:32]
        self._places: dict[str, tuple[_File, int]] = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("text-*.safetensors")):
                self._open(path)

    def __contains__(self, prompt: str) -> bool:
        return _key(prompt) in self._places

    def add(self, prompts: Sequence[str], progress: bool = True) -> int:
        """Encode the prompts that are not known yet; how many these were."""
        new = list({_key(p): p for p in prompts if p not in self}.values())
        with tqdm(total=len(new), desc="captions", delay=2, disable=not progress) as bar:
            for part in _parts(new, self.file_rows):
                self._write(part, bar)
        self.encoded += len(new)
        return len(new)

    def encode(self, prompts: Sequence[str]) -> Text:
        """As the encoder's own ``encode``, on the CPU."""
        self.add(prompts, progress=False)
        length, rows = self.encoder.length, [self._row(p) for p in prompts]
        return Text.cat([row.padded(length) for row in rows])

    def _row(self, prompt: str) -> Text:
        file, row = self._places[_key(prompt)]
        return file.text(row)

    @torch.no_grad()
    def _write(self, prompts: list[str], bar: tqdm[Any]) -> None:
        rows: list[Text] = []
        for part in _parts(prompts, self.batch_size):
            text = self.encoder.encode(part).to("cpu")
            rows += [self._trimmed(text.take([k])) for k in range(len(part))]
            bar.update(len(part))
        keys, lengths = [_key(p) for p in prompts], [row.states.shape[1] for row in rows]
        tensors = {"states": torch.cat([row.states[0] for row in rows]), "mask": torch.cat([row.mask[0] for row in rows])}
        tensors |= {name: torch.cat([getattr(row, name) for row in rows]) for name in WHOLE if getattr(rows[0], name) is not None}
        name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:24]
        path = self.folder / f"text-{name}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"keys": json.dumps(keys), "lengths": json.dumps(lengths)})
        self._open(path)

    def _trimmed(self, text: Text) -> Text:
        """One prompt without the padding at its end, where nobody sees that. A second text stays whole: its padding is pooled too."""
        if not self.encoder.config.masked:
            return text
        length = int((text.mask[0] * torch.arange(1, text.mask.shape[1] + 1)).max())
        return text._replace(states=text.states[:, :length], mask=text.mask[:, :length])

    def _open(self, path: Path) -> None:
        file = _File(path)
        self._places.update({key: (file, row) for row, key in enumerate(file.keys)})


class _File:
    """One file of the cache: rows of all its prompts, one after the other."""

    def __init__(self, path: Path) -> None:
        self.mapped = MappedTensors(path)
        try:
            self.keys: list[str] = json.loads(self.mapped.metadata["keys"])
            lengths: list[int] = json.loads(self.mapped.metadata["lengths"])
        except (KeyError, ValueError):
            raise WeightsError(f"{path} is no file of encoded prompts", hint="delete it") from None
        self.ends = np.cumsum([0, *lengths])

    def text(self, row: int) -> Text:
        """One prompt (1, L, D), without padding."""
        where = np.arange(self.ends[row], self.ends[row + 1])
        states, mask = (self.mapped.rows(name, where)[None] for name in ("states", "mask"))
        whole = {name: self.mapped.rows(name, np.array([row])) for name in WHOLE if name in self.mapped.entries}
        return Text(states, mask, **whole)


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _parts(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))
