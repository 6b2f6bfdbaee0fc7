"""The Gradio page: controls on the left, pictures on the right."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.core.errors import DitkitError
from ditkit.core.lazy import require

from . import cards
from .compare import State, Wish, compare
from .jobs import Job, Stopped, Worker
from .studio import Choices, Studio

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
gr = require("gradio", "app")
if TYPE_CHECKING:
    Request = Any
else:
    Request = gr.Request  # Gradio hands it to a parameter that is annotated so
log = logging.getLogger("ditkit")

TITLE = "ditkit"
WELCOME = "Choose what to make, and press Generate."
ALL = "all"  # classes, in turn
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
Updates = list[Any]


def theme() -> Any:
    """Fonts of the machine only: none is requested from elsewhere."""
    sans, mono = ["system-ui", "Segoe UI", "Roboto", "sans-serif"], ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="blue", neutral_hue="stone", font=sans, font_mono=mono, radius_size="md")


class Page:
    """The page of a studio. ``blocks`` is what Gradio serves."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.worker = studio, Worker()
        self.jobs: dict[str, Job] = {}  # session -> what it waits for or runs
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as self.blocks:
            gr.HTML('<header class="dk-head"><h1>ditkit</h1><p>Base and accelerated, side by side</p></header>', js_on_load=None)
            with gr.Row(equal_height=False, elem_classes="dk-page"):
                with gr.Column(scale=1, min_width=300, elem_classes="dk-controls"):
                    self._controls()
                with gr.Column(scale=3, min_width=300):
                    self.status = gr.HTML(cards.message(WELCOME), js_on_load=None, elem_id="status")
                    self.stage = gr.HTML("", js_on_load=None, elem_id="stage")
            self._events()

    def _controls(self) -> None:
        self.bundle = gr.Dropdown(list(self.studio.bundles), value=self.studio.bundles[0], label="Bundle", elem_id="bundle")
        self.prompt = gr.Textbox(label="Prompt", lines=2, visible=False, elem_id="prompt")
        self.examples = gr.Dataset(components=[self.prompt], samples=[], label="Examples", type="values", visible=False)
        self.negative = gr.Textbox(label="Negative prompt", lines=1, visible=False, placeholder="what to lead away from")
        self.label = gr.Dropdown([], label="Class", visible=False, elem_id="label")
        self.methods = gr.Dropdown(
            [],
            label="Accelerated by",
            info="or write your own: name:key=value, joined by +",
            allow_custom_value=True,
            elem_id="methods",
        )
        with gr.Row(elem_classes="dk-buttons"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
        self.count = gr.Slider(1, 64, value=4, step=1, label="Pictures", elem_id="count")
        self.steps = gr.Slider(1, 250, value=50, step=1, label="Steps", elem_id="steps")
        self.scale = gr.Slider(0, 15, value=1, step=0.1, label="Guidance scale")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
            self.solver = gr.Dropdown([], label="Solver", min_width=120)
        self.timed = gr.Checkbox(True, label="Time both", info="further passes without previews, in turn", elem_id="timed")

    def _events(self) -> None:
        wish = [self.bundle, self.prompt, self.negative, self.label, self.count, self.seed, self.steps, self.scale, self.solver]
        wish += [self.methods, self.timed]
        chosen = [self.bundle, self.prompt, self.examples, self.negative, self.label, self.methods, self.count, self.steps, self.scale]
        chosen += [self.solver, self.status, self.stage]
        shown = [self.status, self.stage, self.generate, self.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        one: dict[str, Any] = {**quiet, "concurrency_limit": 1, "concurrency_id": "work"}
        gr.on([self.blocks.load, self.bundle.input], self.choose, self.bundle, chosen, **one)
        self.examples.click(lambda row: row[0], self.examples, self.prompt, queue=False, **quiet)
        gr.on([self.generate.click, self.prompt.submit], self.wait, None, shown, queue=False, **quiet).then(self.run, wish, shown, **one)
        self.stop.click(self.halt, None, self.status, queue=False, **quiet).then(self.halted, None, self.status, queue=False, **quiet)
        self.blocks.unload(self.leave)

    # what the controls do

    def choose(self, bundle: str) -> Iterator[Updates]:
        """The controls of a bundle, which is loaded first."""
        keep = [gr.skip()] * 10
        yield [*keep, cards.status(f"Loading {bundle}"), ""]
        try:
            *_, choices = self.worker.follow(lambda _: self.studio.choices(bundle))
        except Exception as error:
            yield [*keep, self._failure(error), ""]
        else:
            yield [*self._chosen(choices), cards.message(WELCOME), cards.stage(_nothing_yet(choices))]

    def _chosen(self, c: Choices) -> Updates:
        labels = [(f"all {len(c.labels)} in turn", ALL), *((_label(k, name), str(k)) for k, name in enumerate(c.labels))]
        methods = [("nothing: the base alone", ""), *((preset, preset) for preset in c.presets)]
        steps = c.sampling.num_inference_steps
        return [
            gr.update(info=c.about),
            gr.update(visible=c.text, value=c.captions[0] if c.captions else ""),
            gr.update(visible=c.text and bool(c.captions), samples=[[caption] for caption in c.captions[:6]]),
            gr.update(visible=c.text, value=""),
            gr.update(visible=not c.text, choices=labels, value=ALL),
            gr.update(choices=methods, value=_preset(c)),
            gr.update(value=4 if c.text else max(1, min(len(c.labels), 10))),
            gr.update(value=steps, maximum=max(250, 2 * steps)),
            gr.update(value=c.guidance_scale, maximum=max(15, 2 * c.guidance_scale)),
            gr.update(choices=list(c.solvers), value=c.sampling.solver),
        ]

    def wait(self, request: Request) -> Updates:
        """At once, before its turn comes; what the tab asked for before ends."""
        self._stop(request)
        self.jobs[str(request.session_hash)] = Job()
        return [cards.status("Waiting for its turn"), gr.skip(), *_buttons(busy=True)]

    def run(self, request: Request, *controls: Any) -> Iterator[Updates]:
        """Compare, and show how far it is."""
        job = self.jobs.get(str(request.session_hash)) or Job()
        state: State | None = None
        try:
            wish = wished(*controls)
            for new in self.worker.follow(lambda job: compare(self.studio, wish, job), job):
                pictures = cards.stage(new) if _looks_other(state, new) else gr.skip()
                yield [cards.status(new.doing, new.part), pictures, *_buttons(busy=True)]
                state = new
        except Stopped:
            job.ended = cards.message("Stopped.")
        except Exception as error:
            job.ended = self._failure(error)
        else:
            job.ended = ""
        yield [job.ended, gr.skip(), *_buttons(busy=False)]

    def halt(self, request: Request) -> str:
        """Stop at the end of the solver step under way."""
        self._stop(request)
        return cards.status("Stopping after this step")

    def halted(self, request: Request) -> Any:
        """Once ``halt`` is shown: where the work had ended before, its last word again, which ``halt`` has covered."""
        job = self.jobs.get(str(request.session_hash))
        return gr.skip() if job is None or job.ended is None else job.ended

    def leave(self, request: Request) -> None:
        """The tab was closed: nobody waits for the pictures."""
        self._stop(request)
        self.jobs.pop(str(request.session_hash), None)

    def _stop(self, request: Request) -> None:
        if job := self.jobs.get(str(request.session_hash)):
            job.stop.set()

    @staticmethod
    def _failure(error: Exception) -> str:
        if not isinstance(error, DitkitError):
            log.error("the page's work failed", exc_info=error)
        return cards.failure(error)


def wished(
    bundle: str,
    prompt: str,
    negative: str,
    label: str | None,
    count: float | None,
    seed: float | None,
    steps: float | None,
    scale: float | None,
    solver: str,
    methods: str | None,
    timed: bool,
) -> Wish:
    """The values of the controls. Raises DitkitError for an empty one."""
    for name, value in (("Pictures", count), ("Seed", seed), ("Steps", steps), ("Guidance scale", scale)):
        if value is None:
            raise DitkitError(f"{name} is empty", allowed="a number")
    return Wish(
        bundle=bundle,
        prompt=prompt or "",
        negative_prompt=negative or "",
        class_label=None if label in (None, "", ALL) else int(label),
        num_images=int(count or 0),
        seed=int(seed or 0),
        num_inference_steps=int(steps or 0),
        guidance_scale=float(scale or 0),
        solver=solver,
        methods=(methods or "").strip(),
        timed=timed,
    )


def _buttons(busy: bool) -> Updates:
    """Generate, and Stop."""
    return [gr.update(interactive=not busy), gr.update(interactive=busy)]


def _looks_other(old: State | None, new: State) -> bool:
    """Whether the pictures and figures are others; what is done now stands elsewhere."""
    if old is None:
        return True
    return any(getattr(old, name) is not getattr(new, name) for name in ("base", "fast", "drift", "heat")) or old.notes != new.notes


def _preset(c: Choices) -> str:
    """What the page begins with."""
    return c.presets[0] if c.presets else ""


def _nothing_yet(c: Choices) -> State:
    """The places of the pictures, empty."""
    return State(Wish(c.bundle, methods=_preset(c), timed=False))


def _label(k: int, name: str) -> str:
    return name if name == str(k) else f"{k}: {name}"
