"""The codec of a run: one that learns is trained first, on the run's own pictures, and kept beside the run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ditkit.bundle import CODEC
from ditkit.codecs import codec_from, load_codec
from ditkit.codecs.base import Codec, save_codec
from ditkit.codecs.kl import KL, Pictures, fit
from ditkit.core.config import read_data
from ditkit.core.errors import ConfigError
from ditkit.core.files import write_json

from .recipe import CodecRecipe, Recipe, differences
from .session import CHECKPOINTS

MADE_FOR = "codec-recipe.json"  # beside it: what it was trained for


def codec_of(recipe: Recipe, pictures: Pictures, device: torch.device, folder: Path | None = None, progress: bool = False) -> Codec:
    """What encodes ``pictures``: as named, or trained as ``data.codec.fit`` says, or found in ``folder`` where that was done before.

    Raises:
        ConfigError: a codec that learns has no ``fit``, one that does not learn has one, or the one in ``folder`` learned otherwise.
    """
    part = recipe.data.codec or CodecRecipe(name="identity")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.trainer.seed)
        codec = codec_from(part.name, part.config).to(device)
    if (part.fit is None) == isinstance(codec, KL):
        if part.fit is None:
            raise ConfigError(f"codec {part.name} has no weights yet", hint="data.codec.fit: {steps: 1000} trains it first")
        raise ConfigError(f"codec {part.name} learns nothing, and data.codec.fit is given", hint="leave fit out")
    if part.fit is None or not isinstance(codec, KL):
        return codec
    made_for = json.loads(json.dumps({"data": recipe.data.to_dict(), "seed": recipe.trainer.seed}))
    kept = None if folder is None else folder / CHECKPOINTS
    if kept is not None and (kept / MADE_FOR).is_file():
        if keys := differences(read_data(kept / MADE_FOR), made_for):
            raise ConfigError(f"the codec in {folder} was trained with another {', '.join(keys)}", hint="another --out, or --no-resume")
        return load_codec(kept / CODEC).to(device)
    how = part.fit
    fit(
        codec,
        pictures,
        num_steps=how.steps,
        batch_size=how.batch_size,
        learning_rate=how.learning_rate,
        seed=recipe.trainer.seed,
        progress=progress,
    )
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        save_codec(codec, kept / CODEC)
        write_json(kept / MADE_FOR, made_for)
    return codec
