"""What the GPU suite times: guided evaluations of the network, whole samplings with FORA, a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling
from ditkit.core.backbone import Backbone
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.core.view import compile_view, with_methods
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import combine
from ditkit.eval.bench import Candidate, Timing, interleave, peak_memory, run_bench
from ditkit.eval.counters import count_forward, count_run, parameters, weight_bytes
from ditkit.eval.roof import Roof, measure_roof, synchronise
from ditkit.methods.efficiency.fora import FORA
from ditkit.pipeline import Pipeline
from ditkit.train.distributed import World
from ditkit.train.ema import EMA, second_model
from ditkit.train.objectives import Diffusion
from ditkit.train.optim import Optimizers, clip_gradients
from ditkit.train.recipe import TrainerRecipe
from ditkit.train.throughput import DATASHEET

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
SCALE = 1.5  # of guidance: its value costs nothing, and a large one would multiply the rounding that is compared


@dataclass(frozen=True)
class Size:
    """What is measured: the real thing, or the same code in seconds on a CPU."""

    name: str
    config: dict[str, Any]
    device: str
    dtype: torch.dtype
    batches: tuple[int, ...]
    repeats: int
    sampling_steps: int
    sampling_batch: int
    train_batch: int
    backend: str  # of torch.compile

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


FULL = Size("DiT-XL/2", DiT.sizes["DiT-XL/2"], "cuda", torch.bfloat16, (1, 8, 64), 20, 50, 8, 256, "inductor")
_SHAPE = dict(input_size=(8, 8), dim=32, depth=1, num_heads=4, num_classes=10)
TINY = Size("tiny DiT", _SHAPE, "cpu", torch.float32, (2,), 2, 6, 2, 8, "eager")


def drawn(size: Size) -> DiT:
    """The model with drawn weights: no branch is silent."""
    torch.manual_seed(0)
    with torch.device(size.device):
        return draw_parameters(DiT(**size.config)).to(size.dtype).eval()


def shapes(size: Size) -> DiT:
    """The model on the meta device, for counting."""
    with torch.device("meta"):
        return DiT(**size.config).to(size.dtype).eval()


# ---- candidates within a time -----------------------------------------------------------------------------------------------


@dataclass
class Admission:
    """Calls each candidate once, in order, until the time is over; what is too late or fails is left out, with the reason."""

    seconds: float
    device: str
    candidates: list[Candidate] = field(default_factory=list)
    cold: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, name: str, make: Callable[[], Candidate]) -> None:
        """Admit the candidate that ``make`` returns, after its first call (compilation included)."""
        begin = time.perf_counter()
        if begin - self.start > self.seconds:
            self.left_out[name] = "no time left to compile it"
            return
        try:
            candidate = make()
            candidate.call()
            synchronise(self.device)
        except (RuntimeError, ValueError) as error:  # out of memory, a compiler's error, ours
            self.left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return
        self.cold[name] = time.perf_counter() - begin
        self.candidates.append(candidate)

    def bench(self, suite: str, size: Size, repeats: int) -> dict[str, Any]:
        """Time what was admitted, interleaved."""
        result = run_bench(self.candidates, suite=suite, repeats=repeats, device=size.device, dtype=size.dtype, progress=False)
        rows = tuple(replace(r, seconds=replace(r.seconds, cold=self.cold[r.name])) for r in result.rows)
        values = replace(result, rows=rows).to_dict()
        kept = ("protocol", "others_before", "others_after", "roof", "rows")
        return {**{key: values[key] for key in kept}, "not measured": self.left_out}


# ---- one guided evaluation --------------------------------------------------------------------------------------------------


def evaluation(view: Backbone, size: Size, batch: int, batched: bool) -> Callable[[], Tensor]:
    """One guided evaluation, as a step of sampling makes it: both predictions, combined. Conditioning is prepared once."""
    x, t, cond = inputs(view, size, batch)
    null = view.null(**cond)  # type: ignore[operator]
    c, u = view.prepare(**cond), view.prepare(**null)
    both = view.prepare(**{k: torch.cat([cond[k], null[k]]) for k in cond})

    @torch.no_grad()
    def call() -> Tensor:
        run = Run(view)
        if batched:
            first, second = view(torch.cat([x, x]), torch.cat([t, t]), both, run=run, guidance_pass="cond+null").chunk(2)
        else:
            first, second = view(x, t, c, run=run, guidance_pass="cond"), view(x, t, u, run=run, guidance_pass="null")
        return combine(first, second, SCALE, (3, 4))

    return call


def inputs(model: Backbone, size: Size, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, time and conditioning on the device."""
    x, t, cond = model.example(batch)
    return x.to(size.device, size.dtype), t.to(size.device), {k: v.to(size.device) for k, v in cond.items()}


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The whole call as one CUDA graph over fixed inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def evaluations(size: Size, batch: int, seconds: float) -> dict[str, Any]:
    """Two-pass and batched guidance; eager, compiled by block, by step, and by step in a CUDA graph. Times are per image."""
    model, meta = drawn(size), shapes(size)
    costs = {False: count_run(meta, 1, batch, guided=True).total, True: count_forward(meta, 2 * batch)}
    views: dict[str, Backbone] = {"eager": model}
    admit = Admission(0.6 * seconds, size.device)

    def make(name: str, kind: str, batched: bool) -> Candidate:
        grain = kind.split()[0]
        if grain not in views:
            views[grain] = compile_view(model, grain, num_steps=1, backend=size.backend)
        call = evaluation(views[grain], size, batch, batched)
        call = captured(call) if "CUDA graph" in kind else call
        sizes = {"parameters": parameters(model), "weight_bytes": weight_bytes(model)}
        return Candidate(name, call, batch, costs[batched], **sizes, tolerance=TOLERANCE[size.dtype])

    for kind in ("eager", "block", "step", "step + CUDA graph"):
        for batched in (True, False):
            name = f"{'batched' if batched else 'two-pass'}, {kind}"
            if "CUDA graph" in kind and size.device != "cuda":
                admit.left_out[name] = "needs a GPU"
            else:
                admit(name, lambda name=name, kind=kind, batched=batched: make(name, kind, batched))  # type: ignore[misc]
    return admit.bench(f"batch {batch}", size, size.repeats)


# ---- sampling with FORA -----------------------------------------------------------------------------------------------------


def fora(size: Size, seconds: float) -> dict[str, Any]:
    """Whole DDIM samplings, compiled by block: the base, FORA with N = 2 and 3, and the base with a half and a third of the steps.

    The weights are drawn at random: the errors say that something was reused, nothing about pictures.
    """
    batch, steps, meta = size.sampling_batch, size.sampling_steps, shapes(size)
    base = pipeline(size)
    labels = [i % base.model.config.num_classes for i in range(batch)]
    admit = Admission(0.6 * seconds, size.device)
    compiled_base = base.compile("block", backend=size.backend)

    def make(name: str, interval: int, num_steps: int) -> Candidate:
        compiled, counted = compiled_base, meta
        if interval > 1:
            compiled = base.with_methods(FORA(interval=interval)).compile("block", backend=size.backend)
            counted = with_methods(meta, FORA(interval=interval))
        cost = count_run(counted, num_steps, 2 * batch).total
        options: dict[str, Any] = {"num_inference_steps": num_steps, "seed": 0, "progress": False}
        return Candidate(name, lambda: compiled(labels, **options).x, batch, cost, num_inference_steps=num_steps)

    for name, interval, n in (("base", 1, steps), ("FORA N=2", 2, steps), ("FORA N=3", 3, steps)):
        admit(name, lambda name=name, interval=interval, n=n: make(name, interval, n))  # type: ignore[misc]
    for n in (steps // 2, steps // 3):
        admit(f"base, {n} steps", lambda n=n: make(f"base, {n} steps", 1, n))  # type: ignore[misc]
    return admit.bench("fora", size, max(2, size.repeats // 4))


def pipeline(size: Size) -> Pipeline:
    """Latents as they are, DDIM, batched guidance on three channels."""
    model = drawn(size)
    cfg = model.config
    guidance = {"scale": SCALE, "channels": 3, "batched": True}
    card = BundleConfig(
        backbone=Part(name="dit", config=cfg.to_dict()),
        process=Part(name="gaussian", config={"variance": "learned"}),
        data=DataCard(name="noise", shape=(cfg.in_channels, *cfg.input_size)),
        sampling=Sampling(num_inference_steps=size.sampling_steps, guidance=guidance),
    )
    return Pipeline(model, card)


# ---- a training step --------------------------------------------------------------------------------------------------------


def train_step(size: Size, seconds: float) -> dict[str, Any]:
    """One step of DiT's training: bf16 autocast, fused AdamW, EMA, gradient norm; eager and compiled by block.

    The micro-batch is the largest power of two, from half the batch down, that fits into memory.
    """
    micro = size.train_batch // 2
    while True:
        try:
            return _train(size, micro, seconds)
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        micro //= 2
        torch.cuda.empty_cache()


def _train(size: Size, micro: int, seconds: float) -> dict[str, Any]:
    training = Training(size, micro)
    admit = Admission(0.6 * seconds, size.device)
    views: Mapping[str, Callable[[], Backbone]] = {
        "compiled by block": lambda: compile_view(training.model, "block", num_steps=1, backend=size.backend),
        "eager": lambda: training.model,
    }
    calls = {}
    for name, view in views.items():
        admit(name, lambda name=name, view=view: Candidate(name, training.step_of(view())))  # type: ignore[misc]
        if "OutOfMemory" in admit.left_out.get(name, "") and not calls:
            raise torch.OutOfMemoryError(admit.left_out[name])
        calls = {c.name: c.call for c in admit.candidates}
    if not calls:
        raise DitkitError(f"no step ran: {admit.left_out}")
    times = interleave(calls, repeats=max(2, size.repeats // 3), warmups=1, device=size.device, progress=False, cold=admit.cold)
    cost = count_forward(shapes(size), micro)
    roof = measure_roof(cost, device=size.device, dtype=size.dtype)
    return {
        "batch_size": size.train_batch,
        "micro_batches": size.train_batch // micro,
        "arithmetic": "bf16 autocast" if size.dtype == torch.bfloat16 else "fp32",
        "flops_per_image": 3 * cost.flops / micro,
        "roof": roof.to_dict(),
        "steps": [_step_row(name, t, size, 3 * cost.flops / micro, roof, calls[name]) for name, t in times.items()],
        "not measured": admit.left_out,
    }


def _step_row(name: str, timing: Timing, size: Size, flops: float, roof: Roof, call: Callable[[], Any]) -> dict[str, Any]:
    rate = size.train_batch / timing.median
    gpu = torch.cuda.get_device_name() if size.device == "cuda" else ""
    sheet = next((peak for known, peak in DATASHEET.items() if known in gpu), None)
    return {
        "name": name,
        "seconds": asdict(timing),
        "images_per_second": rate,
        "mfu_roof": rate * flops / roof.gemm[roof.plain],
        "mfu_datasheet": rate * flops / sheet if sheet else None,
        "datasheet_flops": sheet,
        "peak_memory_bytes": peak_memory(call, size.device),
    }


class Training:
    """The parts of the project's trainer around one fixed batch on the device."""

    def __init__(self, size: Size, micro: int) -> None:
        self.size, self.parts = size, size.train_batch // micro
        with torch.device(size.device):
            self.model = DiT(**size.config).train()
        self.objective = Diffusion(Gaussian(variance="learned"))
        self.optimizers = Optimizers(self.model, TrainerRecipe(batch_size=size.train_batch))
        self.ema = EMA(second_model(self.model), self.model, 0.9999)
        self.world = World(0, 1, torch.device(size.device))
        self.batches = [self._batch(micro) for _ in range(self.parts)]

    def _batch(self, rows: int) -> dict[str, Tensor]:
        cfg, device = self.model.config, self.size.device
        shape = (cfg.in_channels, *cfg.input_size)
        draws = self.objective.draws(shape)
        made = {n: (torch.randn if d.kind == "normal" else torch.rand)(rows, *d.shape, device=device) for n, d in draws.items()}
        return {"x": torch.randn(rows, *shape, device=device), "y": torch.randint(cfg.num_classes, (rows,), device=device), **made}

    def step_of(self, forward: Backbone) -> Callable[[], Tensor]:
        """A step through ``forward``, the model or a view of it; returns the loss, (1, 1)."""

        def step() -> Tensor:
            self.optimizers.set_rate(0)
            loss = torch.zeros((), device=self.size.device)
            for batch in self.batches:
                with torch.autocast(self.size.device, torch.bfloat16, enabled=self.size.dtype == torch.bfloat16):
                    part = self.objective.loss(forward, batch).loss.mean() / self.parts
                part.backward()
                loss += part.detach()
            norm = clip_gradients(self.model, 1.0, self.world)
            accepted = (loss.isfinite() & norm.isfinite()).float() if self.size.device == "cuda" else None
            self.optimizers.step(accepted)
            self.ema.update(accepted)
            self.optimizers.zero_grad()
            return loss.reshape(1, 1)

        return step
