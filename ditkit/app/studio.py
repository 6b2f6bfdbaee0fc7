"""What the page can choose from: the bundles, and for the one that is loaded its labels or captions, solvers and methods that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditkit.bundle import CONFIG, SHIPPED, Sampling
from ditkit.conditioning.inputs import takes_text
from ditkit.core.errors import DitkitError
from ditkit.diffusion.solvers import SOLVERS
from ditkit.eval.counters import parameters
from ditkit.loading import replaces
from ditkit.methods.specs import parse_spec
from ditkit.pipeline import Pipeline
from ditkit.request import check_sampling

PRESETS = (  # tried in this order; the first that fits is what the page begins with
    "fora:interval=2",
    "fora:interval=3",
    "taylorseer:interval=3",
    "first_block_cache:threshold=0.1",
    "int8",
    "fora:interval=2+int8",
    "modulation",
    "compile:grain=block",
    "fora:interval=2+compile:grain=block",
)


@dataclass(frozen=True)
class Choices:
    """What there is to choose of a bundle, and its own defaults.

    Attributes:
        labels: class names; empty for a model that is told captions.
        captions: examples, for a model that is told captions.
    """

    bundle: str
    about: str
    text: bool
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    solvers: tuple[str, ...]
    presets: tuple[str, ...]
    sampling: Sampling
    guidance_scale: float


class Studio:
    """The bundles of a page. One of them is in memory at a time, with the accelerated pipeline that was last asked for."""

    def __init__(self, bundles: Sequence[str] = (), dtype: str = "auto", device: str = "auto") -> None:
        self.bundles = tuple(dict.fromkeys(bundles)) or shipped()
        self.dtype, self.device = dtype, device
        self._base: tuple[str, Pipeline] | None = None
        self._fast: tuple[str, Pipeline] | None = None

    def base(self, bundle: str) -> Pipeline:
        """The pipeline of a bundle, as it was saved. Raises DitkitError where it cannot be loaded, or is none of this page's."""
        if bundle not in self.bundles:
            raise DitkitError(f"the bundle {bundle!r} is not on this page", allowed=", ".join(self.bundles))
        if self._base is None or self._base[0] != bundle:
            self._base = self._fast = None  # before the next is read
            self._base = bundle, Pipeline.from_pretrained(bundle, dtype=self.dtype, device=self.device)
        return self._base[1]

    def fast(self, bundle: str, methods: str) -> Pipeline:
        """The same with methods, ``fora:interval=2+int8``. Raises DitkitError where they do not read, or do not fit."""
        base = self.base(bundle)
        if self._fast is None or self._fast[0] != methods:
            self._fast = methods, accelerated(base, methods)
        return self._fast[1]

    def choices(self, bundle: str) -> Choices:
        """Loads the bundle, and says what there is to choose."""
        pipe = self.base(bundle)
        config, text = pipe.config, takes_text(pipe.model)
        classes = 0 if text else pipe.model.config.num_classes
        return Choices(
            bundle=bundle,
            about=_about(pipe),
            text=text,
            labels=config.data.labels or tuple(str(k) for k in range(classes)) if not text else (),
            captions=config.data.captions,
            solvers=tuple(name for name in SOLVERS if _fits(pipe, name)),
            presets=tuple(preset for preset in PRESETS if _attaches(pipe, preset)),
            sampling=config.sampling,
            guidance_scale=pipe.guidance.scale,
        )


def shipped() -> tuple[str, ...]:
    """Names of the bundles that ditkit ships."""
    return tuple(sorted(path.parent.name for path in Path(SHIPPED).glob(f"*/{CONFIG}")))


def accelerated(base: Pipeline, methods: str) -> Pipeline:
    """A view of ``base`` with methods written on one line, compiled if the line says so."""
    spec = parse_spec(methods)
    pipe = base.with_methods(*spec.build()) if spec.methods else base
    return spec.compiled(pipe)


def _about(pipe: Pipeline) -> str:
    """One line: what it is."""
    data = pipe.config.data
    channels, height, width = data.shape
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    return f"{pipe.model.name}, {parameters(pipe.eager) / 1e6:.3g} M parameters, {height} x {width} {kind}, trained on {data.name}"


def _fits(pipe: Pipeline, solver: str) -> bool:
    try:
        check_sampling(pipe.model, pipe.process, Sampling(solver=solver))
    except DitkitError:
        return False
    return True


def _attaches(pipe: Pipeline, preset: str) -> bool:
    """Whether the methods can be attached. One that swaps projections (int8) is taken on trust: it takes time and memory."""
    methods = [m for m in parse_spec(preset).build() if not replaces(m)]
    try:
        pipe.with_methods(*methods)
    except DitkitError:
        return False
    return True
