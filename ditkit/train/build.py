"""From a recipe to the parts of a run: data, model with its methods, process, objective, and the bundle they will become."""

from __future__ import annotations

import fnmatch
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditkit import data
from ditkit.bundle import BundleConfig, DataCard, EncoderPart, MethodPart, Part, backbone_config
from ditkit.codecs import load_codec
from ditkit.codecs.base import Codec
from ditkit.conditioning import TextEncoder, encoder_from
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, nearest
from ditkit.core.view import with_methods
from ditkit.data import Dataset
from ditkit.data.encoded import Encoded
from ditkit.diffusion.process import Process, process_from
from ditkit.loading import load_model, make_method
from ditkit.pipeline import open_model
from ditkit.told import find_encoder

from .captioned import Captioned, check_told, examples
from .codecs import codec_of
from .objectives import Objective, objective_from
from .recipe import Recipe, recipes
from .starts import started

log = logging.getLogger("ditkit")
EXAMPLES = 16  # captions that a bundle holds, to sample with


@dataclass(frozen=True)
class Parts:
    """What a recipe builds.

    Attributes:
        test: None where a data set of the user's own sets nothing aside for it.
        codec: of the latents that are trained on; None where these are pictures.
        base_hash: SHA-256 of the base bundle, if there is one.
        encoder: a frozen text encoder; one that is learned is the model's own.
    """

    train: Dataset
    test: Dataset | None
    codec: Codec | None
    model: Backbone
    process: Process
    objective: Objective
    card: BundleConfig
    base_hash: str
    encoder: TextEncoder | None = None


def build(recipe: Recipe, device: torch.device, folder: Path | None = None, progress: bool = False) -> Parts:
    """Everything that the recipe names. Initial weights are a function of its seed.

    Args:
        folder: of the run; a codec that is trained first is kept beside its checkpoints, and found again.
        progress: a live line on stderr while it is trained.

    Raises:
        DitkitError: a name, a key or a value does not exist or does not fit, or nothing is trainable.
    """
    train, test = _data(recipe, device, folder, progress)
    codec: Codec | None = train.codec() if hasattr(train, "codec") else None
    origin = _base(recipe, train, device) if recipe.base is not None else _new(recipe, train, device)
    model, process, encoder, base_hash = origin.model, origin.process, origin.encoder, origin.hash
    check_told(model, encoder, train)
    if recipe.methods:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.trainer.seed)
            model = with_methods(model, *(make_method(MethodPart(name=m.name, config=m.config, label=m.name)) for m in recipe.methods))
    choose_trainable(model, recipe.trainable)
    objective = objective_from(recipe.objective.name, recipe.objective.config, process)
    objective.begin(model)
    card = card_of(recipe, model, process, train, codec)
    if encoder is not None:
        card = card.model_copy(update={"encoder": encoder_card(encoder), "data": caption_card(card.data, test or train)})
        size = (card.data.shape[1], card.data.shape[2])
        train, test = (None if d is None else Captioned(d, model, encoder, size) for d in (train, test))  # type: ignore[assignment]
        objective.none = train.none  # type: ignore[attr-defined]
    frozen = None if encoder is None or encoder.learned else encoder
    return Parts(train, test, codec, model, process, objective, card, base_hash, frozen)


@dataclass(frozen=True)
class _Origin:
    """What training starts from."""

    model: Backbone
    process: Process
    encoder: TextEncoder | None
    hash: str = ""


def encoder_card(encoder: TextEncoder) -> EncoderPart:
    """What the bundle says of the encoder; of one that is frozen, which it was."""
    return EncoderPart.parse({**encoder.card(), "hash": "" if encoder.learned else encoder.content_hash()})


def caption_card(card: DataCard, data: Dataset) -> DataCard:
    """The data, in the bundle of a model that is told captions: examples of these instead of labels."""
    return card.model_copy(update={"labels": (), "captions": examples(data, EXAMPLES)})


def _data(recipe: Recipe, device: torch.device, folder: Path | None, progress: bool) -> tuple[Dataset, Dataset | None]:
    """Samples to train on, and held-out ones; encoded where the recipe names a codec, or its base has one."""
    train, test = data.load(recipe.data.name, "train", **recipe.data.config), _test(recipe)
    if recipe.data.codec is None:
        opened = None if recipe.base is None else open_model(_existing(recipe.base))
        if opened is None or opened.codec is None or hasattr(train, "codec"):
            return train, test
        codec = load_codec(opened.codec).to(device)  # the base was trained on its latents
    elif hasattr(train, "codec"):
        raise ConfigError(f"{recipe.data.name} holds latents, and data.codec is given", allowed="pictures", hint="leave data.codec out")
    else:
        codec = codec_of(recipe, train, device, folder, progress)
    return Encoded(train, codec), None if test is None else Encoded(test, codec)


def _test(recipe: Recipe) -> Dataset | None:
    try:
        return data.load(recipe.data.name, "test", **recipe.data.config)
    except data.NoSplit as error:
        log.warning("no validation: %s", error)
        return None


def _new(recipe: Recipe, train: Dataset, device: torch.device) -> _Origin:
    network, noise = recipe.backbone or Part(name="dit"), recipe.process or Part(name="flow")
    process = process_from(noise.name, noise.config)
    cls, _ = backbone_config(Part(name=network.name))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.trainer.seed)
        encoder = None if recipe.encoder is None else encoder_from(recipe.encoder.name, recipe.encoder.config)
        values = {**fitted(cls, train, process, encoder), **network.config}
        model = cls(backbone_config(Part(name=network.name, config=values), "recipe")[1])  # type: ignore[call-arg]
    if encoder is not None and encoder.learned:
        model.encoder = encoder
    return _Origin(model.to(device), process, encoder)


def _base(recipe: Recipe, train: Dataset, device: torch.device) -> _Origin:
    """The base, or what the recipe makes of it. What is new in that is a function of the seed."""
    opened = open_model(_existing(recipe.base or ""))
    model, _ = load_model(opened, torch.float32, device)
    process = process_from(opened.config.process.name, opened.config.process.config)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.trainer.seed)
        encoder = find_encoder(model, opened.config) if recipe.start is None else None
        if recipe.encoder is not None:
            if encoder is not None:
                raise ConfigError("the encoder comes with the base bundle", hint="leave encoder out")
            encoder = encoder_from(recipe.encoder.name, recipe.encoder.config)
        name = recipe.backbone.name if recipe.backbone is not None else model.name if recipe.start is None else "pixart"
        cls, _ = backbone_config(Part(name=name))
        model = started(model, recipe.start, recipe.backbone, fitted(cls, train, process, encoder))
    if encoder is not None and encoder.learned:
        model.encoder = encoder.to(device)
    return _Origin(model, process, encoder, opened.hash)


def _existing(base: str) -> str:
    """The base; where it is the run of another recipe that was not made yet, an error that says so."""
    name = Path(base).name
    if not Path(base).exists() and base != name and name in recipes():
        raise ConfigError(f"the base {base} is not there yet", hint=f"ditkit train {name} --out {base}")
    return base


def fitted(cls: type[Backbone], train: Dataset, process: Process, encoder: TextEncoder | None = None) -> dict[str, Any]:
    """What follows from data, process and encoder, for the keys that the backbone's configuration has."""
    channels = train.shape[0]
    values = {
        "input_size": train.shape[1:],
        "in_channels": channels,
        "out_channels": process.output_channels(channels),
        "num_classes": train.num_classes,
    }
    if encoder is not None:
        values |= {"text_dim": encoder.dim, "text_length": encoder.length, "null_caption": encoder.null_caption == "model"}
        values |= {} if encoder.pooled_dim is None else {"pooled_dim": encoder.pooled_dim}
        values |= {} if encoder.t5_shape is None else dict(zip(("t5_length", "t5_dim"), encoder.t5_shape))
    return {k: v for k, v in values.items() if k in cls.config_class.model_fields}


def choose_trainable(model: Backbone, patterns: tuple[str, ...]) -> None:
    """Train the parameters whose names match one of the patterns, freeze the others."""
    names = [n for n, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no parameter", allowed="patterns such as 'blocks.*'", hint=nearest(pattern, names)
            )
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def card_of(recipe: Recipe, model: Backbone, process: Process, train: Dataset, codec: Codec | None = None) -> BundleConfig:
    """The ``config.json`` of the bundle that training makes. ``codec``: of the latents, where ``train`` holds latents."""
    shape = train.shape if codec is None else codec.picture_shape(train.shape)
    attached = tuple(MethodPart(name=m.name, label=m.label, config=m.config.to_dict()) for m in model.attached)
    return BundleConfig(
        backbone=Part(name=model.name, config=model.config.to_dict()),
        process=Part(name=process.name, config=process.config.to_dict()),
        codec=Part(name="identity" if codec is None else codec.name),
        data=DataCard(
            name=recipe.data.name,
            config=recipe.data.config,
            shape=tuple(shape),
            labels=tuple(train.labels),
            licence=getattr(train, "licence", ""),
            credit=getattr(train, "credit", ""),
        ),
        sampling=recipe.sampling,
        methods=attached,
    )
