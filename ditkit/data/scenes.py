"""scenes: a procedural world of glyphs with exact ground truth, endless and without a file.

A ``Scene`` is plain data: objects (glyph, colour, size, font style, rotation, position, velocity, depth) before a textured background.
Everything else follows from it exactly: the picture at any size and frame, the caption, and every object's mask and box. ::

    scene = sample_scene(seed=0, index=7, split="train")     # a pure function of its arguments
    shown = render(scene, size=64)                           # image, masks, boxes, depth order, caption, attributes
    caption(scene)                                           # "a red chess knight above a blue heart on a green background"
    parse_caption(caption(scene)) == describe(scene)         # True
    scene_from_caption("a red heart on a blue background")   # a scene of which that is the caption

A tenth of the glyph-colour pairs (``held_out``) never appear in the train split. Drawing needs matplotlib, for its typefaces.
Written for this project; glyph names are Unicode character names, the typefaces are DejaVu and STIX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditkit.core.errors import DitkitError

from .glyphs import GLYPHS, GROUPS, STYLES, Glyph, font_path
from .scene_render import RenderedScene, render
from .scene_sample import SPLITS, held_out, held_out_pairs, sample_scene, scene_from_caption
from .scene_text import RELATIONS, Description, caption, describe, parse_caption, relation
from .scene_types import BACKGROUNDS, COLORS, TEXTURES, Background, Scene, SceneConfig, SceneObject, readable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BACKGROUNDS", "COLORS", "GLYPHS", "GROUPS", "RELATIONS", "SPLITS", "STYLES", "TEXTURES", "Background", "Description", "Glyph",
    "RenderedScene", "Scene", "SceneConfig", "SceneObject", "Scenes", "caption", "describe", "held_out", "held_out_pairs", "load",
    "parse_caption", "readable", "relation", "render", "sample_scene", "scene_from_caption",
]  # fmt: skip

LENGTHS = {"train": 50_000, "test": 2_000, "heldout": 2_000}
"""Default length of each split. Any length is possible: samples are made when asked for."""


class Scenes:
    """One split. x (B, 3, size, size) in [-1, 1]; y (B,) the glyph of the object that the caption names first.

    Of several sizes sample i has the (i modulo their number)-th; a batch is of one size, ``groups`` says which samples have one.
    """

    name = "scenes"

    def __init__(self, split: str, sides: tuple[int, ...], length: int, seed: int, config: SceneConfig) -> None:
        self.split, self.sides, self.seed, self.config = split, sides, seed, config
        self.shape = (3, sides[-1], sides[-1])
        self.groups = None if len(sides) == 1 else [np.arange(k, length, len(sides)) for k in range(len(sides))]
        self.labels = [glyph.name for glyph in GLYPHS if glyph.group in config.groups]
        self.num_classes = len(self.labels)
        self._length = length
        self._label_index = {name: i for i, name in enumerate(self.labels)}

    def __len__(self) -> int:
        return self._length

    def scene(self, index: int) -> Scene:
        """The description of one sample; raises DitkitError outside 0 .. len - 1."""
        if not 0 <= index < self._length:
            raise DitkitError(f"index is {index}", allowed=f"0 to {self._length - 1}")
        return sample_scene(self.seed, int(index), self.split, self.config)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Samples by their number in the split."""
        import torch

        scenes = [self.scene(i) for i in indices]
        images = np.stack([render(scene, self._size(indices)).image for scene in scenes])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
        return {"x": x, "y": torch.tensor([self._label_index[scene.objects[0].glyph] for scene in scenes])}

    def captions(self, indices: np.ndarray) -> list[str]:
        """The caption of each sample."""
        return [caption(self.scene(i)) for i in indices]

    def rendered(self, indices: np.ndarray) -> list[RenderedScene]:
        """Each sample with its masks, boxes, depth order and attributes."""
        return [render(self.scene(i), self._size(indices)) for i in indices]

    def _size(self, indices: np.ndarray) -> int:
        """The one size of these samples."""
        found = sorted({self.sides[i % len(self.sides)] for i in np.asarray(indices).tolist()})
        if len(found) > 1:
            raise DitkitError(f"samples of sizes {found[0]} and {found[1]} are asked for together", allowed="samples of one of groups")
        return found[0]


def load(
    split: str = "train",
    *,
    size: int | Sequence[int] = 64,
    length: int | None = None,
    seed: int = 0,
    held_out_only: bool = False,
    **config: object,
) -> Scenes:
    """The scenes of a split.

    Args:
        split: "train" (held-out pairs never appear) or "test" (all pairs).
        size: side of the pictures in pixels; or several sides, rising, of which each sample has one.
        length: number of samples; 50,000 for train and 2,000 for test by default.
        seed: another seed is another set.
        held_out_only: with "test", held-out pairs alone.
        config: fields of ``SceneConfig``.

    Raises:
        DitkitError: a value out of range. ConfigError: an unknown field. MissingDependency: no matplotlib.
    """
    if held_out_only:
        if split != "test":
            raise DitkitError(f"held_out_only with split {split!r}", allowed="split 'test'")
        split = "heldout"
    length = LENGTHS[split] if length is None else length
    if length < 1:
        raise DitkitError(f"length is {length}", allowed="1 or more")
    font_path("sans")
    sides = (size,) if isinstance(size, int) else tuple(size)
    if not sides or list(sides) != sorted(set(sides)):
        raise DitkitError(f"size is {size}", allowed="a number of pixels, or several that rise")
    data = Scenes(split, sides, length, seed, SceneConfig.parse(config, "scenes"))
    for side in sides:
        render(data.scene(0), side)  # a wrong size, seed or config is named here, not at the first step
    return data
