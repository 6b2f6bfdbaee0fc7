"""Learning a router: the objectives ``harmonica`` (along the student's own trajectory) and ``l2c`` (on pairs of adjacent steps).

One update of ``harmonica`` is one trajectory. The released code updates a step's logits as soon as it has passed; as each step has logits
of its own, which nothing later in the trajectory reads, an update at the end is the same update. A step's gradient is taken when the
step is computed, so that memory holds the activations of one step, whatever their number. Nothing but the router gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core.backbone import Backbone
from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.run import Run
from ditkit.diffusion.guidance import Denoise, combine
from ditkit.diffusion.process import Losses, Process, Time, as_time, flat_mean
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency._router import Router, router_of
from ditkit.methods.efficiency.harmonica import HarmoniCa
from ditkit.methods.efficiency.l2c import L2C

from .batches import Draw
from .objectives import Diffusion, objective

Rows = Sequence[Tensor]
Solve = Callable[[Denoise, Tensor, Run], Tensor]
PRICE = 100.0  # of computing everything, for each unit of the distance to the ratio, where errors count about 1


class RouterObjectiveConfig(Config):
    """Settings of both objectives."""

    coefficient: float = Field(7e-8, ge=0, description="of the sum of r; only where the router has no ratio to learn towards")
    solver: str = Field("ddim", description="the solver that the table is for; one that draws no noise")
    solver_options: dict[str, Any] = Field({}, description="its own, with spacing or times")


class HarmonicaConfig(RouterObjectiveConfig):
    """Settings of the objective ``harmonica``."""

    guidance_scale: float = Field(1.5, description="s in u + s (c - u); 1: no second pass")
    guidance_channels: Literal["all"] | int = Field("all", description="guide all channels, or the first n")
    proxy: Literal["cumulative", "leave_one_out", "none"] = Field(
        "cumulative", description="weights of the steps: as released, as in the paper, or all 1"
    )
    refresh: int = Field(50, ge=1, description="trajectories between two measurements of these weights, each of T + 1 trajectories")


class L2CConfig(RouterObjectiveConfig):
    """Settings of the objective ``l2c``."""

    coefficient: float = Field(1e-6, ge=0, description="of the sum of r; only where the router has no ratio to learn towards")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without their label, in all three passes alike")
    straight_through: bool = Field(False, description="mix by the hard decision, with the gradient of r")


class Guided:
    """The network under guidance, as the released code sees it: x (R, C, ...) -> outputs (R, C_out, ...).

    With guidance R is 2 B: both passes see the rows [:B], and the second half of the outputs differs from the first where channels are
    not guided (a learned variance): there it is the unconditional pass. Errors of both passes so enter the loss.
    """

    def __init__(
        self,
        model: Backbone,
        process: Process,
        scale: float,
        channels: Literal["all"] | int,
        cond: Mapping[str, Tensor],
        null: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.process, self.scale, self.channels = model, process, scale, channels
        sources = {"cond": cond} if scale == 1 else {"cond": cond, "null": null or {}}
        with torch.no_grad():
            self.prepared = {name: model.prepare(**model.told(dict(source))) for name, source in sources.items()}

    @property
    def halves(self) -> int:
        """R / B."""
        return len(self.prepared)

    def __call__(self, run: Run, x: Tensor, t: Time) -> Tensor:
        x = x[: len(x) // self.halves]
        t = as_time(t).expand(len(x))
        h, time = self.process.network_input(x, t), self.process.network_time(t).to(x.device)
        out = [self.model(h, time, p, run=run, guidance_pass=name).to(x.dtype) for name, p in self.prepared.items()]
        if len(out) == 1:
            return out[0]
        chosen = x.shape[1] if self.channels == "all" else self.channels
        if not 1 <= chosen <= x.shape[1]:
            raise DitkitError(f"guidance_channels is {chosen} for data of {x.shape[1]} channels", allowed=f"'all', or 1 to {x.shape[1]}")
        first = combine(out[0], out[1], self.scale, (chosen, x.shape[1]))
        return torch.cat([first, torch.cat([first[:, :chosen], out[1][:, chosen:]], 1)])

    def base(self, router: Router, x: Tensor, t: Time) -> Tensor:
        """The same without the router: what it should come close to."""
        with torch.no_grad():
            return self(Run(self.model, 1, [m for m in self.model.methods if m != router.label]), x, t)


@dataclass(frozen=True)
class Step:
    """What was learned at one step of a trajectory of soft training.

    Attributes:
        reference, prediction: outputs (R, C_out, ...) without and with reuse, at the student's x.
        error: (R,) their mean squared difference.
        gradient: (J,) of weight * mean(error); None where none was asked for.
    """

    step: int
    reference: Tensor
    prediction: Tensor
    error: Tensor
    gradient: Tensor | None


def trajectory(
    net: Guided, router: Router, solve: Solve, x: Tensor, weights: Sequence[float] | Tensor, learning: bool = True
) -> tuple[list[Step], Run, Tensor]:
    """SDT: one trajectory from noise x (R, C, ...) along the mixed predictions; the steps, the run with what it kept, and where it ends."""
    run, found = Run(net.model, router.config.num_inference_steps), list[Step]()
    rows = router.rows()
    router.soften(run, rows)

    def denoise(x: Tensor, t: Time) -> Tensor:
        if not router.routed(run.step):
            return net(run, x, t)
        reference = net.base(router, x, t)
        with torch.set_grad_enabled(learning):
            prediction = net(run, x, t)
            step = _learn(router, run.step, reference, prediction, float(weights[run.step]))
        found.append(step)
        return step.prediction

    with torch.no_grad():
        x = solve(denoise, x, run)
    return found, run, x


def _learn(router: Router, i: int, reference: Tensor, prediction: Tensor, weight: float) -> Step:
    error = _apart(reference, prediction)
    gradient = None
    if torch.is_grad_enabled():
        (gradient,) = torch.autograd.grad(weight * error.mean(), router.routers[str(i)])
    return Step(i, reference, prediction.detach(), error.detach(), gradient)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """(R,) the mean squared difference, in float32 at least."""
    return flat_mean((a - b).to(torch.promote_types(a.dtype, torch.float32)) ** 2)


@torch.no_grad()
def mixed_sample(net: Guided, router: Router, solve: Solve, x: Tensor, rows: Rows) -> Tensor:
    """The end of a trajectory from x that mixes by ``rows``, r (J,) of each step; ones: nothing is reused."""
    run = Run(net.model, router.config.num_inference_steps)
    router.soften(run, rows)
    return solve(lambda x, t: net(run, x, t), x, run)


def damages(net: Guided, router: Router, solve: Solve, x: Tensor, how: Literal["cumulative", "leave_one_out"]) -> dict[int, Tensor]:
    """What reuse at each step does to the end of the trajectory from x, by step.

    cumulative (released): added to reuse at all earlier steps; the changes add up to that of reuse at all steps.
    leave_one_out (paper): the end with reuse at all steps, less the end with reuse at all steps but this.
    """
    rows = [r.detach() for r in router.rows()]
    ones = [torch.ones_like(r) for r in rows]
    steps = [i for i in range(len(rows)) if router.routed(i)]
    if how == "leave_one_out":
        last = mixed_sample(net, router, solve, x, rows)
        return {i: last - mixed_sample(net, router, solve, x, [*rows[:i], ones[i], *rows[i + 1 :]]) for i in steps}
    found, before = {}, mixed_sample(net, router, solve, x, ones)
    for i in steps:
        after = mixed_sample(net, router, solve, x, [*rows[: i + 1], *ones[i + 1 :]])
        found[i], before = after - before, after
    return found


def proxies(net: Guided, router: Router, solve: Solve, x: Tensor, how: Literal["cumulative", "leave_one_out"]) -> Tensor:
    """IEPO: the weight lambda (T,) of each step, the mean square of its damage; 1 where everything is computed.

    The paper sums squares instead; with means both readings fit the released coefficients.
    """
    weights = torch.ones(router.config.num_inference_steps)
    for i, change in damages(net, router, solve, x, how).items():
        weights[i] = change.double().square().mean()
    return weights


class RouterObjective(Diffusion):
    """What both objectives share: solver, price of a computed branch, and a loss that has the gradients."""

    config_class = RouterObjectiveConfig
    learns: ClassVar[type[Router]] = Router

    def begin(self, model: Any) -> None:
        self.router(model)

    def router(self, model: Any) -> Any:
        """The router that is learned. Raises DitkitError for another method."""
        found = router_of(model)
        if not isinstance(found, self.learns):
            raise DitkitError(
                f"objective {self.name} with {found.label}", allowed=f"the method {self.name}", hint=f"objective {found.label}"
            )
        return found

    def solve(self, denoise: Denoise, x: Tensor, run: Run) -> Tensor:
        """x at the end of a trajectory of the solver; ``run`` counts its steps."""
        if self.config.solver not in SOLVERS:
            raise DitkitError(f"there is no solver {self.config.solver!r}", allowed=", ".join(SOLVERS))
        return SOLVERS[self.config.solver](denoise, x, self.process, run, self._no_noise, **self.config.solver_options)

    def _no_noise(self, step: int, purpose: str) -> Tensor:
        raise DitkitError(f"solver {self.config.solver} draws noise", allowed="deterministic solvers: ddim, euler, dpm++2m")

    def price(self, router: Router, error: Tensor) -> tuple[float, float]:
        """What the error is multiplied by, and the price of a computed branch.

        With a ratio the error counts in units of what it was lately, and the price is proportional to how much less is reused than
        wanted: negative where it is more. Which entries are reused in the end is their order; the price has to keep them apart.
        """
        if router.config.ratio is None:
            return 1.0, float(self.config.coefficient)
        if torch.is_grad_enabled():
            now = error.mean()
            router.scale.copy_(torch.where(router.scale > 0, torch.lerp(router.scale, now, 0.1), now))
        r = router.table()
        short = router.config.ratio - (1 - float(r.mean()))
        return 1 / (float(router.scale) or 1.0), PRICE * short / r.numel()


def with_gradients(value: Tensor, router: Router, gradients: Mapping[int, Tensor]) -> Tensor:
    """``value`` (B,), whose mean has these gradients for the router's logits, by step."""
    for i, gradient in gradients.items():
        p = router.routers[str(i)]
        value = value + (gradient * (p - p.detach())).sum()
    return value


@objective("harmonica")
class Harmonica(RouterObjective):
    """Needs no data: their shape and conditioning are used, not their values. The batch is the number of trajectories at a time."""

    config_class = HarmonicaConfig
    learns = HarmoniCa

    def draws(self, shape: tuple[int, ...]) -> dict[str, Draw]:
        return {"noise": Draw("normal", shape)}

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        router, cfg, learning = self.router(model), self.config, torch.is_grad_enabled()
        router.clamp_()
        cond = {k: v for k, v in batch.items() if k not in ("x", "noise")}
        null = None if cfg.guidance_scale == 1 else self.none(model, cond)
        net = Guided(model, self.process, cfg.guidance_scale, cfg.guidance_channels, cond, null)
        x = torch.cat([self.process.start(batch["noise"])] * net.halves)
        if learning:
            self.refresh(net, router, x)
        weights = router.proxy.tolist()
        steps, _, _ = trajectory(net, router, self.solve, x, weights, learning)
        error = sum(weights[s.step] * s.error.reshape(net.halves, -1).mean(0) for s in steps)
        assert isinstance(error, Tensor)
        unit, price = self.price(router, error)
        cost = torch.stack([r.sum() for i, r in enumerate(router.rows()) if router.routed(i)]).sum()
        gradients = {s.step: unit * s.gradient for s in steps if s.gradient is not None}
        parts = {"error": error, "computed": cost.detach().expand_as(error)}
        return Losses(with_gradients(unit * error, router, gradients) + price * cost, parts)

    def refresh(self, net: Guided, router: HarmoniCa, x: Tensor) -> None:
        """Measure the weights of the steps again where it is time."""
        if self.config.proxy != "none" and int(router.updates) % self.config.refresh == 0:
            router.proxy.copy_(proxies(net, router, self.solve, x, self.config.proxy))
        router.updates += 1


@objective("l2c")
class LearningToCache(RouterObjective):
    """One pair of steps an update, the same for the whole batch; it starts from noised data, without guidance."""

    config_class = L2CConfig
    learns = L2C

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Losses:
        router = self.router(model).clamp_()
        num_steps = router.config.num_inference_steps
        times = self.process.at(batch["x"].shape[1:]).times(num_steps, **self._way())
        pair = int(batch["time"][0] * (num_steps // 2))  # of k = 0 .. T / 2 - 1: s = 2 k + 1
        first = num_steps - 2 - 2 * pair
        net = Guided(model, self.process, 1.0, "all", self.conditioning(model, batch))
        x_t = self.process.add_noise(batch["x"], batch["noise"], times[first])
        rows, run = self.rows(router), Run(model, num_steps)
        router.soften(run, rows)
        for i in run.steps():
            if i == first:
                with torch.no_grad():
                    x_t = self._one_step(model, net(run, x_t, times[i]), x_t, times[i : i + 2])
            elif i == first + 1:
                break
        reference = net.base(router, x_t, times[first + 1])
        prediction = net(run, x_t, times[first + 1])
        error = _apart(reference, prediction)
        cost = router.rows()[first + 1].sum()
        unit, price = self.price(router, error.detach())
        return Losses(unit * error + price * cost, {"mse": error.detach(), "computed": cost.detach().expand_as(error)})

    def rows(self, router: Router) -> list[Tensor]:
        """r of each step, or the hard decision with r's gradient."""
        rows = router.rows()
        if not self.config.straight_through:
            return rows
        return [(r > router.level()).float() + r - r.detach() for r in rows]

    def _way(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.solver_options.items() if k in ("spacing", "times")}

    def _one_step(self, model: Backbone, output: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """x at times[1], from the output at times[0]."""
        options = {k: v for k, v in self.config.solver_options.items() if k not in ("spacing", "times")}
        run = Run(model, 1, active=())
        return SOLVERS[self.config.solver](lambda x, t: output, x, self.process, run, self._no_noise, times=times, **options)
