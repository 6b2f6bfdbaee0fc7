"""The pipeline: a model, its process and its codec, from class labels or prompts to pictures.

    pipe = ditkit.from_pretrained("runs/digits")
    pipe(class_labels=[3, 7], num_images=16, guidance_scale=2.0, seed=0).save("out.png")
    pipe(prompt="a red circle", num_images=4).save("out.png")         # a model that is told captions

Picture k of a call has the seed ``seed + k``; it is the same in any batch, to rounding, and bit-equal alone with that seed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import ditkit
from ditkit.bundle import BundleConfig, MethodPart, Opened, Validity, find_bundle, open_bundle, write_bundle
from ditkit.callback import StepCallback, StepEnd, Steps
from ditkit.codecs import codec_from, load_codec
from ditkit.codecs.base import Codec
from ditkit.conditioning import LongPrompts, Text, TextEncoder
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import DitkitError
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import allow_graphs, compile_view, with_methods
from ditkit.diffusion import noise
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import Process, process_from
from ditkit.diffusion.solvers import SOLVERS
from ditkit.finite import NotFinite, Watch, find_module, finite
from ditkit.inputs import check_remade, read_inputs
from ditkit.loading import attach, bundle_tensors, choose, load_model, read_method
from ditkit.output import Output, read_record, to_images
from ditkit.request import MAX_SEED, Request, check_channels, check_sampling, choose_guidance, find_solver, warn_unheard, whole
from ditkit.told import Asked, find_encoder, moved_encoder, words_of

log = logging.getLogger("ditkit")
REMAKE = ("bundle", "methods", "solver", "solver_options", "num_inference_steps", "guidance", "size")  # what a record must hold


class Pipeline:
    """Samples a model that is told class labels or captions. Immutable: ``with_methods`` and ``compile`` return others over its weights.

    Args:
        model: a backbone or a view of one.
        config: as in a bundle's ``config.json``.
        codec: by default the one that ``config`` names.
        encoder: of prompts; by default the one that is part of the model, or that ``config`` names.
        source: SHA-256 of the files that the weights came from; "" for a model that was never saved.
        valid_for: what the learned states of methods were made for, by label.
    """

    def __init__(
        self,
        model: Backbone,
        config: BundleConfig,
        *,
        codec: Codec | None = None,
        encoder: TextEncoder | None = None,
        source: str = "",
        valid_for: Mapping[str, Validity] | None = None,
    ) -> None:
        self.model = self.eager = model
        self.config, self.source, self.valid_for = config, source, dict(valid_for or {})
        self.process: Process = process_from(config.process.name, config.process.config)
        self._graphs: dict[int, int] = {}  # number of steps -> graphs of the compiled model
        self._sizes: set[tuple[int, int]] = set()  # unlike the training data's, of which the user was told
        self.guidance = Guidance.parse(config.sampling.guidance, "sampling.guidance")
        self.codec = codec if codec is not None else _codec(config)
        self.encoder: TextEncoder | None = encoder or find_encoder(model, config)
        check_channels(model, self.process, self.codec, config)
        check_sampling(model, self.process, config.sampling)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: Any = "auto",
        device: Any = "auto",
        methods: Sequence[Method] = (),
        text_encoder: TextEncoder | str | Path | None = None,
    ) -> Pipeline:
        """Read a bundle, a bundle that ditkit ships (by name), or a diffusers folder.

        Args:
            dtype, device: "auto" is the GPU where there is one, fp32 on the CPU, bf16 on a GPU.
            methods: attached while loading: one that drops weights (int8) then never has both in memory.
            text_encoder: instead of the one that the bundle names; or the folder where that one is now.

        Raises:
            ConfigError, WeightsError: a file, key, tensor or value that does not fit, by name.
            Conflict: methods that cannot meet.
        """
        opened = open_model(folder)
        kind, where = choose(dtype, device)
        model, valid_for = load_model(opened, kind, where, methods)
        codec = None if opened.codec is None else load_codec(opened.codec)
        encoder = moved_encoder(text_encoder, opened.config, model)
        return cls(model, opened.config, codec=codec, encoder=encoder, source=opened.hash, valid_for=valid_for)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def with_methods(self, *methods: Method | str | Path) -> Pipeline:
        """This pipeline with methods attached, over the same weights.

        Args:
            methods: or files ``methods/LABEL.json`` of a bundle: the method with what it learned.

        Raises:
            Conflict: two methods, or a method and the backbone, cannot meet.
            ConfigError: what a file holds was made for another model.
        """
        other = self._like(with_methods(self.eager, *(m for m in methods if isinstance(m, Method))))
        for path in (m for m in methods if not isinstance(m, Method)):
            method, card, file = read_method(path)
            card.valid_for.check_model(card.method.label, self.config)
            other.model = other.eager = attach(other.eager, method, card, file)
            other.valid_for[card.method.label] = card.valid_for
        return other

    def compile(self, grain: str = "block", **options: Any) -> Pipeline:
        """This pipeline compiled; ``grain`` and ``options`` as for ``ditkit.core.view.compile_view``.

        The number of graphs follows from the schedule; it is logged, and dynamo's limit is raised to it.
        """
        other = self._like(self.eager)
        other.model = compile_view(self.eager, grain, **options)
        other._allow_graphs(self.config.sampling.num_inference_steps)
        return other

    def save_pretrained(self, folder: str | Path, *, keep_base: bool = True) -> None:
        """Write a bundle: the base's weights, the list of methods, their states and what they were made for.

        Args:
            keep_base: False writes the projections that a method replaced as it keeps them (int8: a quarter of the size); so does
                True where the base's own are gone, because they were replaced while loading.
        """
        view = self.eager
        parts = tuple(MethodPart(name=m.name, label=m.label, config=m.config.to_dict()) for m in view.attached)
        changed: dict[str, Any] = {"dtype": self._dtype(), "methods": [p.to_dict() for p in parts]}
        if self.codec.name != "identity":  # written beside the model, wherever it was read from
            changed["codec"] = {"name": self.codec.name}
        if self.encoder is not None and not self.encoder.learned:  # it may have moved
            changed["encoder"] = self.encoder.card()
        config = BundleConfig.parse({**self.config.to_dict(), **changed})
        learned = {m.label: self.valid_for.get(m.label) or Validity.of(config, m) for m in view.attached if m.state_dict()}
        write_bundle(folder, config, bundle_tensors(view, keep_base), learned, self.codec)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Text | None = None,
        negative_prompt_embeds: Text | None = None,
        long_prompts: LongPrompts | None = None,
        num_images: int | None = None,
        num_images_per_prompt: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        seed: int = 0,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        guidance: Guidance | str | None = None,
        height: int | None = None,
        width: int | None = None,
        inputs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Output:
        """Make pictures. What is not given is the bundle's default.

        Args:
            class_labels: one label, or several; each is used ``num_images / len(class_labels)`` times, in the order 3, 3, 7, 7.
                None: all classes in turn.
            prompt: for a model that is told captions, as class_labels; by default some captions of its test data.
            negative_prompt: what guidance leads away from; one, or one for each prompt. By default the null caption.
            prompt_embeds, negative_prompt_embeds: instead, prompts that are encoded already.
            long_prompts: "error" or "truncate" for a prompt with too many tokens.
            num_images: pictures in all; by default one for each label or prompt. Or ``num_images_per_prompt``.
            guidance_scale: s in u + s (c - u): 0 is unconditional, 1 conditional. A network into which guidance was distilled
                (FLUX.1-dev) is told it instead, and makes one pass.
            true_cfg_scale: s in u + s (c - u), for any network.
            seed: of the first picture; picture k has ``seed + k``.
            solver: a name of ``ditkit.diffusion.solvers.SOLVERS``.
            solver_options: its own (eta, clip, ...), ``spacing`` or ``times``; the bundle's are for the bundle's solver.
            guidance: settings, or a preset: "none" (conditional), "all" channels, "first-three" (released DiT and SiT).
            height, width: of the pictures; by default those of the training data.
            inputs: pictures that attached methods take, by name ({"control": "edges.png"}): one, or one for each that is made.
            batch_size: pictures at a time; by default at most 64.
            callback_on_step_end: called with a ``StepEnd`` (step, t, x, predicted x0) after each solver step of each batch. It
                changes nothing; what it raises ends the call and reaches the caller. Its time counts in ``report["seconds"]``.

        Raises:
            DitkitError: a value out of range, by name; or the step and the module at which a number was not finite.
        """
        chosen = choose_guidance(self.eager, self.guidance, guidance, guidance_scale, true_cfg_scale)
        pixels, latent = self._size(height, width)
        card, words = self.config.data, (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        asked = Asked(class_labels, *words, long_prompts, examples=card.captions, trained=(card.shape[1], card.shape[2]))
        told = asked.told(self.eager, self.encoder, (num_images, num_images_per_prompt), pixels, chosen.scale != 1, self.device)
        warn_unheard(chosen, told.record)
        default = self.config.sampling
        steps = default.num_inference_steps if num_inference_steps is None else num_inference_steps
        whole("seed", seed, 0, MAX_SEED - len(told))
        options = (default.options if solver in (None, default.solver) else {}) if solver_options is None else solver_options
        request = Request(
            told=told,
            seeds=[seed + k for k in range(len(told))],
            num_inference_steps=whole("num_inference_steps", steps, 1, self._max_steps()),
            solver=find_solver(solver or default.solver),
            options={key: value.tolist() if isinstance(value, Tensor) else value for key, value in options.items()},
            guidance=chosen,
            size=pixels,
            latent=latent,
            batch_size=whole("batch_size", min(len(told), 64) if batch_size is None else batch_size, 1, 1 << 20),
            inputs=read_inputs(inputs, self.eager, self.codec, pixels, len(told)),
        )
        for label, valid in self.valid_for.items():
            valid.check_run(label, request.solver, request.num_inference_steps)
        return self._answer(request, progress, callback_on_step_end)

    def _answer(self, request: Request, progress: bool, callback: StepCallback | None) -> Output:
        start = time.perf_counter()
        steps, count = request.num_inference_steps, len(list(request.batches()))
        parts: list[Tensor] = []
        report: dict[str, Any] = {}
        with tqdm(total=steps * count, unit="step", disable=not progress, delay=1, leave=False) as bar:
            for batch in request.batches():
                x, report = self._guarded(request, batch, bar, callback)
                parts.append(self._decode(x))
                bar.update(len(parts) * steps - bar.n)  # an adaptive solver may need fewer
        x = torch.cat(parts)
        seconds = time.perf_counter() - start
        return Output(x, to_images(x), request.seeds, self._record(request), {"seconds": seconds, "batches": count, "methods": report})

    def remake(self, picture: str | Path | Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Output:
        """Make one picture again from its record, or from the PNG that carries it; ``inputs`` of methods are not in there."""
        record = read_record(picture) if isinstance(picture, str | Path) else dict(picture)
        if missing := {*REMAKE, "seed"} - set(record):
            raise DitkitError(f"the record lacks {', '.join(sorted(missing))}", allowed="the record of one picture")
        words = words_of(record)
        check_remade(record, inputs)
        for key, mine in (("bundle", self.source), ("methods", self._methods())):
            if record[key] != mine:
                raise DitkitError(f"the picture was made with {key} {record[key]!r}", allowed=f"{mine!r}, which this pipeline has")
        height, width = record["size"]
        if record.get("dtype") != self._dtype():
            log.warning("the picture was made in %s; in %s it is not exactly the same", record.get("dtype"), self._dtype())
        return self(
            **words,
            seed=record["seed"],
            solver=record["solver"],
            solver_options=record["solver_options"],
            num_inference_steps=record["num_inference_steps"],
            guidance=Guidance.parse(record["guidance"], "guidance"),
            height=height,
            width=width,
            inputs=inputs,
        )

    def _max_steps(self) -> int:
        return int(getattr(self.process.config, "num_train_steps", 1000)) if self.process.name == "gaussian" else 10_000

    def _size(self, height: int | None, width: int | None) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Height and width of the pictures, and the shape that the network sees."""
        trained = self.config.data.shape[1:]
        height, width = trained[0] if height is None else height, trained[1] if width is None else width
        multiple = self.codec.factor * getattr(self.model.config, "patch_size", 1)
        for name, side in (("height", height), ("width", width)):
            whole(name, side, 1, 1 << 16)
            if side % multiple:
                low = side // multiple * multiple
                near = f"{low} or {low + multiple}" if low else f"{multiple}"
                raise DitkitError(f"{name} is {side}", allowed=f"multiples of {multiple}", hint=f"use {near}")
        if (height, width) != tuple(trained) and (height, width) not in self._sizes:
            self._sizes.add((height, width))
            log.warning("the model was trained on %s x %s; it is asked for %s x %s", *trained, height, width)
        return (height, width), self.codec.latent_shape((self.codec.in_channels, height, width))

    def _guarded(self, request: Request, batch: slice, bar: Any, callback: StepCallback | None) -> tuple[Tensor, dict[str, Any]]:
        """One batch; where a number is not finite, the batch is run again to find the module, and DitkitError names it."""
        try:
            return self._sample(self.model, request, batch, bar, callback)
        except NotFinite as error:
            step = error.step
        module = find_module(self.eager, lambda: self._sample(self.eager, request, batch))
        raise DitkitError(
            f"step {step + 1} of {request.num_inference_steps}: the output of {module or 'the model'} is not finite",
            hint="check the weights and the settings of methods; in fp16 or bf16, try dtype='float32'",
        )

    def _sample(
        self, model: Backbone, request: Request, batch: slice, bar: Any = None, callback: StepCallback | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Latents of one batch, and the methods' reports."""
        if model is not self.eager:
            self._allow_graphs(request.num_inference_steps)
        watch, before = Watch(), 0 if bar is None else bar.n
        seeds = request.seeds[batch]
        cond, null = request.told.batch(batch)
        run = Run(model, request.num_inference_steps, inputs=request.inputs.rows(batch))
        inner = guided(model, self.process, request.guidance, run, cond, null)

        def denoise(x: Tensor, t: Any) -> Tensor:
            output = inner(x, t)
            watch.see(run.step, output)
            if bar is not None:
                bar.update(before + run.step + 1 - bar.n)
            return output

        asked = denoise if callback is None else Steps(callback, denoise, self.process, run, batch.start)
        x = self.process.start(noise.normal(seeds, 0, "start", request.latent).to(self.device))
        x = SOLVERS[request.solver](asked, x, self.process, run, noise.source(seeds, x), **request.options)
        watch.end()
        if isinstance(asked, Steps):
            asked.end()
        return x, run.finish()

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents -> x in [-1, 1] on the CPU."""
        if not finite(latents):
            raise DitkitError("the solver's result is not finite", hint="more steps, or a smaller guidance scale")
        x = self.codec.to(latents.device).decode(latents)
        if not finite(x):
            bad = int((~torch.isfinite(x)).sum())
            raise DitkitError(f"after the last step: the output of codec.{self.codec.name} is not finite ({bad} values)")
        return x.float().clamp(-1, 1).cpu()

    def _record(self, request: Request) -> dict[str, Any]:
        return {
            "bundle": self.source,
            **request.told.record,
            "seeds": request.seeds,
            "num_inference_steps": request.num_inference_steps,
            "solver": request.solver,
            "solver_options": request.options,
            "guidance": request.guidance.to_dict(),
            "size": list(request.size),
            "methods": self._methods(),
            **request.inputs.record,
            "process": self.config.process.to_dict(),
            "dtype": self._dtype(),
            "device": self.device.type,
            "versions": {"ditkit": ditkit.__version__, "torch": torch.__version__},
            **({"licence": card.licence, "credit": card.credit} if (card := self.config.data).licence else {}),
        }

    def _dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def _methods(self) -> list[dict[str, Any]]:
        return [{"name": m.name, "label": m.label, "config": m.config.to_dict()} for m in self.eager.attached]

    def _like(self, model: Backbone) -> Pipeline:
        return Pipeline(model, self.config, codec=self.codec, encoder=self.encoder, source=self.source, valid_for=self.valid_for)

    def _allow_graphs(self, num_steps: int) -> None:
        if num_steps not in self._graphs:
            self._graphs[num_steps] = count_graphs(self.model, num_steps)
            log.info("%d graphs for %d steps", self._graphs[num_steps], num_steps)
            allow_graphs(2 * self._graphs[num_steps])


def open_model(folder: str | Path) -> Opened:
    """Open a bundle, a shipped bundle by name, or a diffusers folder. A single weight file is refused with the command that converts it."""
    path = find_bundle(folder)
    if path.is_file():
        raise DitkitError(f"{path} is a file", allowed="a bundle or a diffusers folder", hint=f"ditkit convert {path} OUT_FOLDER")
    from ditkit.interop.layouts import is_diffusers, open_diffusers

    return open_diffusers(path) if is_diffusers(path) else open_bundle(path)


def from_pretrained(folder: str | Path, **options: Any) -> Pipeline:
    """``Pipeline.from_pretrained``."""
    return Pipeline.from_pretrained(folder, **options)


def _codec(config: BundleConfig) -> Codec:
    values = config.codec.config
    if config.codec.name == "identity" and not values:
        values = {"channels": config.data.shape[0]}
    return codec_from(config.codec.name, values)


__all__ = ["Output", "Pipeline", "StepEnd", "from_pretrained"]
