"""The network that finds things in pictures of the ``scenes`` world, and how it is fitted.

It is a judge of generators, not one of their rivals: it is fitted to pictures of *all* (colour, glyph) pairs, held-out ones too, drawn
with equal chance. Otherwise it would read pairs that training never sees worse than others, and a generator would be blamed for that.
It sees its pictures once each, some of them blurred, noisy or of slightly wrong colours, as generated ones are, and some without any
object; objects come a little smaller and larger than the world has them, and a little turned where it never turns them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.cache import cache_dir, keep
from ditkit.core.errors import WeightsError
from ditkit.core.files import read_tensors
from ditkit.data.glyphs import GLYPHS
from ditkit.data.scenes import BACKGROUNDS, COLORS, Scene, SceneConfig, render, sample_scene

GRID = 8
"""Cells along a side of the map on which things are found."""
STEM, MOST_STEM = 2 * GRID, 2
"""Pictures are read at STEM pixels or a whole multiple, MOST_STEM times at most; others are averaged down to that, as renders are made."""
REACH = 0.75
"""A cell stands for an object whose centre is this many cells or less from its own, along x and along y: one to four cells do."""
FIT_SEED = 2**63 + 10
"""Of the scenes that it is fitted to."""
FIT_PICTURES, BATCH, RATE = 24_000, 32, 4e-3
BLANK_EVERY = 16  # one picture in so many shows no object
SIZE_JITTER, LEAST_ROTATION = (0.93, 1.0, 1.07), 10


class Detector(nn.Module):
    """Four convolutions from (B, 3, side, side) to a map of GRID x GRID cells, each with what it sees.

    Args:
        glyphs: names that it tells apart.
        side: of its pictures, STEM to MOST_STEM * STEM pixels; blocks of side / STEM pixels become channels first, so that every side
            costs the same.
    """

    def __init__(self, glyphs: list[str], side: int) -> None:
        super().__init__()
        self.glyphs, self.colors, self.backgrounds, self.side = glyphs, list(COLORS), list(BACKGROUNDS), side
        self.parts = (1, 2, len(glyphs), len(self.colors), len(self.backgrounds))
        widths = (3 * (side // STEM) ** 2, 32, 48, 96, 96)
        self.body = nn.Sequential(*(_stage(i, o, 2 if k == 2 else 1) for k, (i, o) in enumerate(zip(widths, widths[1:]))))
        self.head = nn.Conv2d(widths[-1], sum(self.parts), 1)

    def forward(self, x: Tensor) -> Seen:
        """x: (B, 3, side, side) in [-1, 1]."""
        x = F.pixel_unshuffle(x, self.side // STEM).contiguous(memory_format=torch.channels_last)
        thing, offset, glyph, color, background = self.head(self.body(x)).permute(0, 2, 3, 1).split(self.parts, -1)
        return Seen(thing[..., 0], offset, glyph, color, background.mean((1, 2)))


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


@dataclass(frozen=True)
class Seen:
    """Per cell the logit that an object is centred there (B, GRID, GRID), where, from the cell's centre and in cells (..., 2: x, y), and
    logits of its glyph (..., glyphs) and colour (..., 8); and of the background's colour (B, 8).
    """

    thing: Tensor
    offset: Tensor
    glyph: Tensor
    color: Tensor
    background: Tensor


def reading_side(size: int) -> int:
    """At how many pixels pictures of ``size`` >= STEM pixels are read."""
    return STEM * min(size // STEM, MOST_STEM)


def fitted(config: SceneConfig, size: int, num_pictures: int = FIT_PICTURES, progress: bool = True) -> Detector:
    """A detector for pictures of ``size`` pixels of that world, fitted with a fixed seed or taken from the cache."""
    model, path = _new(config, size), cache_dir("scene-readers") / f"{_key(config, size, num_pictures)}.safetensors"
    try:
        model.load_state_dict(read_tensors(path, model.state_dict()))
    except (WeightsError, OSError):
        _fit(model, config, size, num_pictures, progress)
        keep(path, model.state_dict())
    return model.eval().requires_grad_(False)


def _new(config: SceneConfig, size: int) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Detector([g.name for g in GLYPHS if g.group in config.groups], reading_side(size))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _key(config: SceneConfig, size: int, num_pictures: int) -> str:
    """Names the weights by all that decides them; the first number counts versions of this file."""
    decides = ["scene reader 1", config.to_dict(), size, num_pictures, BATCH, RATE, torch.__version__]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _fit(model: Detector, config: SceneConfig, size: int, num_pictures: int, progress: bool) -> None:
    from tqdm import trange

    steps = max(1, num_pictures // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1, pct_start=0.2)
    chance = torch.Generator().manual_seed(0)
    world = _widened(config)
    with torch.enable_grad():
        for step in trange(steps, desc="scene reader", leave=False, delay=2, mininterval=1, disable=not progress):
            scenes = [_training_scene(world, step * BATCH + i) for i in range(BATCH)]
            seen = model(spoiled(at_reading_side(pictures(scenes, size)), chance))
            optimiser.zero_grad()
            _loss(seen, _targets(scenes, model)).backward()
            optimiser.step()
            schedule.step()


def _widened(config: SceneConfig) -> SceneConfig:
    sizes = sorted({min(0.8, round(size * by, 4)) for size in config.sizes for by in SIZE_JITTER})
    return config.model_copy(update={"sizes": tuple(sizes), "max_rotation": max(config.max_rotation, LEAST_ROTATION)})


def _training_scene(config: SceneConfig, index: int) -> Scene:
    scene = sample_scene(FIT_SEED, index, "test", config)  # the split of all pairs
    return scene if index % BLANK_EVERY else scene.model_copy(update={"objects": ()})


def pictures(scenes: list[Scene], size: int) -> Tensor:
    """Renders, (B, 3, size, size) in [-1, 1]."""
    images = np.stack([render(scene, size).image for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def at_reading_side(x: Tensor) -> Tensor:
    """x (B, 3, size, size) averaged down to the side at which it is read."""
    return F.adaptive_avg_pool2d(x, reading_side(x.shape[-1]))


def spoiled(x: Tensor, chance: torch.Generator) -> Tensor:
    """Each picture with a contrast, a brightness and noise of its own, of a sigma up to 0.1; three of four blurred, up to 0.8 pixels."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=chance)

    x = x + between(-0.3, 1).clamp_min(0) * (blurred(x, 0.8) - x)
    x = x * between(0.9, 1.1) + between(-0.06, 0.06)
    return x + between(0, 0.1) * torch.randn(x.shape, generator=chance)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """x (B, C, H, W) convolved with a Gaussian of ``sigma`` > 0 pixels, cut at three pixels; edges repeat."""
    line = torch.arange(-3, 4) / sigma
    weights = torch.softmax(-line.square() / 2, 0).to(x)
    x, channels = F.pad(x, (3, 3, 3, 3), mode="replicate"), x.shape[1]
    x = F.conv2d(x, weights.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


@dataclass(frozen=True)
class _Targets:
    """What ``Seen`` should be; offset, glyph and color where ``thing`` is set."""

    thing: Tensor  # bool (B, GRID, GRID)
    offset: Tensor
    glyph: Tensor
    color: Tensor
    background: Tensor


def _targets(scenes: list[Scene], model: Detector) -> _Targets:
    shape = (len(scenes), GRID, GRID)
    thing, offset = np.zeros(shape, bool), np.zeros((*shape, 2), np.float32)
    glyph, color = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    glyph_index = {name: i for i, name in enumerate(model.glyphs)}
    line = np.arange(GRID) + 0.5
    for k, scene in enumerate(scenes):
        for i in reversed(scene.front_to_back):  # nearer objects overwrite farther ones
            it = scene.objects[i]
            dx, dy = (GRID * at - line for at in it.position)
            near = np.ix_(abs(dy) <= REACH, abs(dx) <= REACH)
            thing[k][near], glyph[k][near], color[k][near] = True, glyph_index[it.glyph], model.colors.index(it.color)
            offset[k][near] = np.stack(np.broadcast_arrays(dx[None, :], dy[:, None]), -1)[near]
    background = torch.tensor([model.backgrounds.index(scene.background.color) for scene in scenes])
    at = torch.from_numpy
    return _Targets(at(thing), at(offset), at(glyph), at(color), background)


def _loss(seen: Seen, wanted: _Targets) -> Tensor:
    at = wanted.thing
    count = at.sum().clamp_min(1)
    thing = F.binary_cross_entropy_with_logits(seen.thing, at.float(), reduction="sum")
    offset = F.l1_loss(seen.offset[at], wanted.offset[at], reduction="sum")
    glyph = F.cross_entropy(seen.glyph[at], wanted.glyph[at], reduction="sum")
    color = F.cross_entropy(seen.color[at], wanted.color[at], reduction="sum")
    return (thing + offset + glyph + color) / count + F.cross_entropy(seen.background, wanted.background)
