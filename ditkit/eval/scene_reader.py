"""Reading pictures of the ``scenes`` world without their captions: which things of which colour, and where. ::

    reader = SceneReader.load()                        # fitted in about a minute the first time, then from the cache
    readings = reader.read(x)                          # x (B, 3, 32, 32) in [-1, 1]
    attribute_scores(readings, captions)               # shares of objects, colours and relations that are as the captions say
    reader.accuracy()                                  # the same on real pictures: the ceiling of the figures above

The reader is a small convolutional network (``scene_fit.py``) that knows the world's catalogue, and nothing of captions or generators;
how readings are compared with captions is said in ``scene_scores.py``. Where two glyphs look alike in some typeface (letters and digits
of other styles than sans) it errs like anybody; ``accuracy`` shows by how much.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import DitkitError
from ditkit.data.scenes import SceneConfig, caption, sample_scene

from .scene_fit import FIT_PICTURES, FIT_SEED, GRID, STEM, Detector, Seen, at_reading_side, blurred, fitted, pictures
from .scene_scores import Attributes, Found, Reading, attribute_scores

__all__ = ["SYMBOLS", "Attributes", "Found", "Reading", "SceneReader", "attribute_scores"]

SYMBOLS = SceneConfig(
    groups=("chess", "suits", "faces", "weather", "arrows", "shapes", "things"),
    styles=("sans",),
    sizes=(0.42,),
    textures=("plain", "shaded"),
)
"""The 46 glyphs that are neither letters nor digits, large enough to be told apart at 32 pixels, on calm backgrounds."""

THRESHOLD = 0.5
"""A thing is found where the network gives it at least this chance."""
ONE_CENTER = 1 / GRID
"""Cells whose centres of a thing are less than this apart, along x and along y, see the same thing."""


class SceneReader:
    """A fitted reader of one world at one size.

    Args:
        config: the world, of which it knows the glyphs.
        size: pixels along a side of the pictures, 16 or more.
        detector: fitted, see ``load``.
    """

    def __init__(self, config: SceneConfig, size: int, detector: Detector) -> None:
        self.config, self.size, self.detector = config, size, detector

    @classmethod
    def load(cls, config: SceneConfig = SYMBOLS, size: int = 32, *, num_pictures: int = FIT_PICTURES, progress: bool = True) -> SceneReader:
        """The reader of a world, fitted to ``num_pictures`` renders, or taken from the cache where that was done before.

        Raises:
            DitkitError: size or num_pictures out of range. MissingDependency: no matplotlib.
        """
        if size < STEM:
            raise DitkitError(f"size is {size}", allowed=f"{STEM} pixels or more")
        if num_pictures < 1:
            raise DitkitError(f"num_pictures is {num_pictures}", allowed=f"1 or more; {FIT_PICTURES} is the default")
        return cls(config, size, fitted(config, size, num_pictures, progress))

    @torch.no_grad()
    def read(self, x: Tensor) -> list[Reading]:
        """What each picture shows.

        Args:
            x: (B, 3, size, size) in [-1, 1]; values outside are clipped.

        Raises:
            DitkitError: x has another shape or is not finite.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != (3, self.size, self.size):
            raise DitkitError(f"pictures of shape {tuple(x.shape)}", allowed=f"(B, 3, {self.size}, {self.size})")
        if not bool(torch.isfinite(x).all()):
            raise DitkitError("pictures hold values that are not finite", hint="look at the generator")
        x = at_reading_side(x.detach().cpu().float().clamp(-1, 1))
        return [reading for part in x.split(256) for reading in self._readings(self.detector(part))]

    def _readings(self, seen: Seen) -> list[Reading]:
        chance = seen.thing.sigmoid()
        line = torch.arange(GRID) + 0.5
        center = (seen.offset + torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)) / GRID
        parts = [t.flatten(1, 2) for t in (center, seen.glyph.softmax(-1), seen.color.softmax(-1))]
        readings = []
        for k, cells in enumerate(chance.flatten(1)):
            order = cells.argsort(descending=True)[: int((cells >= THRESHOLD).sum())]
            found = self._things(cells[order], *(part[k, order] for part in parts))
            readings.append(Reading(tuple(found), self.detector.backgrounds[int(seen.background[k].argmax())]))
        return readings

    def _things(self, chance: Tensor, center: Tensor, glyph: Tensor, color: Tensor) -> list[Found]:
        """The cells (n, ...) of one picture that see something, the surest first: those that place it at one centre vote on what it is."""
        found = []
        while len(chance):
            same = (center - center[0]).abs().amax(-1) < ONE_CENTER
            vote = chance[same] / chance[same].sum()
            g, c, (x, y) = int((vote @ glyph[same]).argmax()), int((vote @ color[same]).argmax()), (vote @ center[same]).tolist()
            found.append(Found(self.detector.glyphs[g], self.detector.colors[c], x, y, float(chance[0])))
            chance, center, glyph, color = (t[~same] for t in (chance, center, glyph, color))
        return found

    def accuracy(self, num: int = 500, seed: int = 0, *, noise: float = 0.0, blur: float = 0.0) -> Attributes:
        """What the reader makes of real pictures: the first ``num`` of the test split, all pairs, with their own captions.

        Args:
            seed: of the split; any but the one that the reader was fitted to.
            noise: sigma of Gaussian noise added to values in [-1, 1].
            blur: sigma of a Gaussian blur before it, in pixels.

        Raises:
            DitkitError: num or seed out of range.
        """
        if seed == FIT_SEED:
            raise DitkitError(f"seed is {seed}, to which the reader was fitted", hint="take another one")
        x, captions = self.real(num, seed)
        x = blurred(x, blur) if blur else x
        x = x + noise * torch.from_numpy(np.random.default_rng(seed).standard_normal(x.shape)).float() if noise else x
        return attribute_scores(self.read(x), captions)

    def real(self, num: int, seed: int = 0) -> tuple[Tensor, list[str]]:
        """The first ``num`` pictures of the world's test split, (num, 3, size, size), and their captions."""
        if num < 1:
            raise DitkitError(f"num is {num}", allowed="1 or more")
        scenes = [sample_scene(seed, i, "test", self.config) for i in range(num)]
        return pictures(scenes, self.size), [caption(scene) for scene in scenes]
