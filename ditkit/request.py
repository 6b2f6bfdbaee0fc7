"""What a caller of a pipeline asks for, checked: one clear error for each value that does not fit."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.bundle import BundleConfig, Sampling
from ditkit.codecs.base import Codec
from ditkit.conditioning.inputs import takes_text, wants
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, DitkitError, nearest
from ditkit.core.run import Run
from ditkit.diffusion.guidance import Guidance
from ditkit.diffusion.process import Process
from ditkit.diffusion.solvers import SOLVERS

if TYPE_CHECKING:
    from ditkit.inputs import Inputs
    from ditkit.told import Told

log = logging.getLogger("ditkit")
MAX_SEED = 2**63 - 1
PRESETS: dict[str, dict[str, Any]] = {
    "none": {"scale": 1.0},
    "all": {"channels": "all"},
    "first-three": {"channels": 3},
}


@dataclass(frozen=True)
class Request:
    """A call with everything decided and checked."""

    told: Told  # what each picture is made from
    seeds: list[int]
    num_inference_steps: int
    solver: str
    options: dict[str, Any]  # of the solver
    guidance: Guidance
    size: tuple[int, int]  # of the pictures
    latent: tuple[int, int, int]  # (c, h, w) that the network sees
    batch_size: int
    inputs: Inputs  # of methods

    def batches(self) -> Iterator[slice]:
        """The pictures, batch by batch."""
        for start in range(0, len(self.seeds), self.batch_size):
            yield slice(start, start + self.batch_size)


def expand_labels(class_labels: int | Sequence[int] | None, num_images: int | None, num_classes: int) -> list[int]:
    """One label for each picture, in the order p0, p0, p1, p1. Raises DitkitError for labels and counts that do not fit."""
    if num_images is not None:
        whole("num_images", num_images, 1, 1 << 20)
    if class_labels is None:
        return [k % num_classes for k in range(num_images or num_classes)]
    labels = list(class_labels) if isinstance(class_labels, Sequence | Tensor) else [class_labels]
    labels = [whole("class label", y, 0, num_classes - 1) for y in labels]
    count = len(labels) if num_images is None else num_images
    if not labels or count % len(labels):
        raise DitkitError(f"{count} images for {len(labels)} class labels", allowed="a multiple of the number of labels")
    return [y for y in labels for _ in range(count // len(labels))]


def images_in_all(num_images: int | None, each: int | None, asked: int) -> int | None:
    """``num_images``, or ``each`` (num_images_per_prompt) for every one of ``asked`` prompts or labels; None: one for each."""
    if each is None:
        return num_images
    if num_images is not None:
        raise DitkitError("num_images and num_images_per_prompt are both given", allowed="one of them")
    return whole("num_images_per_prompt", each, 1, 1 << 20) * asked


def choose_guidance(
    model: Backbone, default: Guidance, guidance: Guidance | str | None, scale: float | None, true_scale: float | None = None
) -> Guidance:
    """The default, changed by a preset or replaced, at the given scale.

    Args:
        scale: told to a network with an input for it; otherwise that of classifier-free guidance.
        true_scale: of classifier-free guidance, whatever the network.
    """
    own: float | None = model.config.guidance if "guidance" in wants(model) else None
    if own is None and scale is not None and true_scale is not None:
        raise DitkitError("guidance_scale and true_cfg_scale are both given", allowed=f"one of them: {model.name} is told no scale")
    told, scale = (None, scale if true_scale is None else true_scale) if own is None else (scale, true_scale)
    if isinstance(guidance, str):
        if guidance not in PRESETS:
            raise DitkitError(f"guidance is {guidance!r}", allowed=", ".join(PRESETS), hint=nearest(guidance, PRESETS))
        if guidance == "none" and scale not in (None, 1):
            raise DitkitError(f"guidance 'none' with guidance_scale {scale}", allowed="one of them", hint="'none' is conditional: scale 1")
        guidance = Guidance.parse({**default.to_dict(), **PRESETS[guidance]}, "guidance")
    chosen = default if guidance is None else guidance
    if own is None and chosen.told is not None:
        raise DitkitError(f"guidance.told is {chosen.told}", allowed=f"None: {model.name} has no input for it", hint="set its scale")
    if own is not None:
        told = next(float(v) for v in (told, chosen.told, own) if v is not None)
    values = {"told": told, "scale": chosen.scale if scale is None else float(scale)}
    return Guidance.parse({**chosen.to_dict(), **values}, "guidance")


def warn_unheard(guidance: Guidance, record: Mapping[str, Any]) -> None:
    """Say so where prompts have no effect at this scale."""
    if guidance.scale == 0 and "prompts" in record:
        log.warning("at guidance scale 0 prompts have no effect: it is unconditional; 1 is conditional, without guidance")
    if guidance.scale == 1 and "negative_prompts" in record:
        name = "guidance_scale" if guidance.told is None else "true_cfg_scale"
        log.warning("at guidance scale 1 negative prompts have no effect: set %s", name)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an integer from ``low`` to ``high``; raises DitkitError naming it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise DitkitError(f"{name} is {value!r}", allowed=f"whole numbers from {low} to {high}")
    return number


class _Checked(Exception):
    pass


def check_channels(model: Backbone, process: Process, codec: Codec, config: BundleConfig) -> None:
    """Data, codec, network and process must fit together."""
    shape, cfg = config.data.shape, model.config
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"data.shape is {shape}", allowed="(C, H, W)")
    if config.data.labels and not takes_text(model) and len(config.data.labels) != cfg.num_classes:
        raise ConfigError(f"data.labels has {len(config.data.labels)} names", allowed=f"{cfg.num_classes}, as many as classes, or none")
    want = {
        "data.shape[0]": (shape[0], codec.in_channels),
        "backbone in_channels": (cfg.in_channels, codec.channels),
        "backbone out_channels": (cfg.out_channels, process.output_channels(codec.channels)),
    }
    for name, (value, fits) in want.items():
        if value != fits:
            raise ConfigError(f"{name} is {value}", allowed=f"{fits}, with codec {codec.name} and process {process.name}")


def check_sampling(model: Backbone, process: Process, sampling: Sampling) -> None:
    """Raise DitkitError where a bundle's solver, its options, steps and process do not fit; the network is not called."""

    def stop(x: Tensor, t: Any) -> Tensor:
        raise _Checked

    run = Run(model, sampling.num_inference_steps, active=())
    x = torch.zeros(1, 1, 1, 1)
    try:
        SOLVERS[find_solver(sampling.solver)](stop, x, process, run, lambda step, purpose: x, **sampling.options)
    except _Checked:
        return


def find_solver(name: str) -> str:
    """``name``, if there is such a solver."""
    if name not in SOLVERS:
        raise DitkitError(f"there is no solver {name!r}", allowed=", ".join(SOLVERS), hint=nearest(name, SOLVERS))
    return name


def expand(cond: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """Conditioning of P prompts, each tensor (P, ...), for ``copies`` pictures of each: all of them in the order p0, p0, p1, p1."""
    return {name: value.repeat_interleave(copies, 0) for name, value in cond.items()}
