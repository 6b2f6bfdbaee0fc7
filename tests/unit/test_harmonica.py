"""Routers (HarmoniCa, Learning-to-Cache): what they compute, what learning changes, what they refuse, all by definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.backbones.dit import DiT
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.files import read_tensors
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import keep_blocks, with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.process import Losses
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency._router import Router, router_of
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.harmonica import HarmoniCa
from ditkit.methods.efficiency.l2c import L2C
from ditkit.testing.training import tiny_recipe
from ditkit.testing.trajectory import STEPS, sample
from ditkit.train import load_recipe, train
from ditkit.train.objectives import objective_from
from ditkit.train.routers import Guided, damages, mixed_sample, proxies, trajectory


class Counter(Method):
    """Innermost: the sub-layers that are really computed, by step."""

    name, stage = "counter", "numbers"

    def start(self, run: Run) -> None:
        self.calls = [0] * run.num_steps

    def plan(self, at: Any) -> int:
        return at.step

    def branch(self, nxt: Any, h: Any, site: Any) -> Any:
        self.calls[site.mode] += 1
        return nxt(h)


def tiny(**values: Any) -> DiT:
    return DiT.tiny(**{"depth": 2, "dim": 16, "num_heads": 2, "in_channels": 2, "out_channels": 2, "input_size": (4, 6), **values})


def with_table(router: Router, logits: Tensor | float, base: Backbone | None = None, *others: Method) -> Backbone:
    """A view with the router, its logits as given: one number, or (T, J)."""
    view = with_methods((tiny() if base is None else base).requires_grad_(False), router, *others)
    for i, p in router.routers.items():
        p.data.copy_(torch.as_tensor(logits if isinstance(logits, float) else logits[int(i)]))
    return view


def solve(denoise: Any, x: Tensor, run: Run) -> Tensor:
    return SOLVERS["euler"](denoise, x, Flow(), run, None)  # type: ignore[arg-type]


def guided(view: Backbone, batch: int = 2, scale: float = 1.5) -> tuple[Guided, Tensor]:
    """The guided network, and noise for both halves."""
    x, _, cond = view.example(batch)
    net = Guided(view, Flow(), scale, "all", cond, view.null(**cond))  # type: ignore[operator]
    return net, torch.cat([x] * net.halves)


# ---- in use


def test_all_reuse_computes_the_first_step_only_and_all_compute_is_the_base() -> None:
    counter, base = Counter(), tiny()
    view = with_table(HarmoniCa(num_inference_steps=STEPS), -5.0, base, counter)
    sample(view)
    assert counter.calls == [4, 0, 0, 0, 0, 0]
    view = with_table(HarmoniCa(num_inference_steps=STEPS), 5.0, base, counter)
    assert torch.equal(sample(view), sample(base))
    assert counter.calls == [4] * STEPS


def test_calls_and_cache_use_are_the_tables() -> None:
    counter, router = Counter(), HarmoniCa(num_inference_steps=STEPS, threshold=0.1)
    logits = torch.randn(STEPS, 4, generator=torch.Generator().manual_seed(1)) * 3
    sample(with_table(router, logits, None, counter))
    expected = [4, *((logits[1:].sigmoid() > 0.1).sum(1).tolist())]
    assert counter.calls == expected
    assert router.cache_use() == pytest.approx(1 - sum(expected) / (STEPS * 4))


def test_a_table_of_whole_steps_is_fora() -> None:
    """FORA computes where s = T-1 or s mod N = 0; a table that says so gives its samples bit for bit."""
    base, logits = tiny(), torch.full((STEPS, 4), -5.0)
    logits[[i for i in range(STEPS) if (STEPS - 1 - i) % 3 == 0]] = 5.0
    assert torch.equal(sample(with_table(HarmoniCa(num_inference_steps=STEPS), logits, base)), sample(with_methods(base, FORA(interval=3))))


def test_l2c_computes_every_second_step_in_full() -> None:
    view = with_table(L2C(num_inference_steps=STEPS), -5.0)
    net, x = guided(view, scale=1.0)
    outputs: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Any) -> Tensor:
        outputs.append((net(run, x, t), net.base(router_of(view), x, t)))
        return outputs[-1][0]

    run = Run(view, STEPS)
    with torch.no_grad():
        solve(denoise, x, run)
    assert [torch.equal(a, b) for a, b in outputs] == [True, False] * 3  # s = 5, 4, ...: odd s is the plain network
    counter = Counter()
    sample(with_table(L2C(num_inference_steps=STEPS), -5.0, None, counter))
    assert counter.calls == [4, 0] * 3
    assert set(router_of(view).routers) == {"1", "3", "5"}


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_a_ratio_reuses_exactly_that_share(ratio: float) -> None:
    """Also where logits are equal; what is reused has smaller r than what is not."""
    router = HarmoniCa(num_inference_steps=STEPS, ratio=ratio)
    with_table(router, torch.randn(STEPS, 4, generator=torch.Generator().manual_seed(2)))
    computed, r = router.computed(), router.table()
    assert int((~computed).sum()) == round(ratio * STEPS * 4)
    assert computed[0].all()
    assert r[~computed].max() <= r[1:][computed[1:]].min()
    with_table(equal := HarmoniCa(num_inference_steps=STEPS, ratio=ratio), -5.0)
    assert equal.cache_use() == pytest.approx(round(ratio * STEPS * 4) / (STEPS * 4))


def test_what_does_not_fit_is_refused() -> None:
    router = HarmoniCa(num_inference_steps=STEPS)
    view = with_table(router, 0.0)
    with pytest.raises(DitkitError, match="5 steps with harmonica; allowed: num_inference_steps=6"):
        sample(view, num_steps=5)
    with pytest.raises(Conflict, match="4 branches in 2 blocks, dit has 2 in 1"):
        with_methods(keep_blocks(tiny(), [0]), router)
    with pytest.raises(DitkitError, match=r"ratio is 0.6; allowed: at most 0.500"):
        with_methods(tiny(), L2C(num_inference_steps=STEPS, ratio=0.6))
    with pytest.raises(DitkitError, match="even numbers"):
        L2C(num_inference_steps=5)


def test_the_picture_shows_what_is_reused() -> None:
    router = HarmoniCa(num_inference_steps=STEPS)
    logits = torch.full((STEPS, 4), 5.0)
    logits[2, 1] = -5.0
    with_table(router, logits)
    picture = router.picture(cell=3)
    assert picture.size == (3 * STEPS, 3 * 4)
    orange = [(i, j) for i in range(STEPS) for j in range(4) if picture.getpixel((3 * i + 1, 3 * j + 1)) == (255, 165, 60)]
    assert orange == [(2, 1)]


# ---- learning


def test_mixing_with_ones_is_the_base_bit_for_bit() -> None:
    base = tiny()
    view = with_table(HarmoniCa(num_inference_steps=3), -1.0, base)
    net, x = guided(view)
    ones = [torch.ones(4)] * 3
    plain, _ = guided(base)
    with torch.no_grad():
        run = Run(base, 3)
        want = solve(lambda x, t: plain(run, x, t), x, run)
    assert torch.equal(mixed_sample(net, router_of(view), solve, x, ones), want)


def test_a_steps_gradient_is_the_finite_difference_of_its_error() -> None:
    """The error of step 2 as a function of p_2, with what steps 0 and 1 kept and where they led held fixed."""
    router = HarmoniCa(num_inference_steps=4)
    view = with_table(router, 0.3, tiny().double())
    router.double()
    net, x = guided(view)
    x = x.double()
    (steps, _, _) = trajectory(net, router, solve, x, [1.0, 1.0, 2.0, 1.0])
    gradient = {s.step: s.gradient for s in steps}[2]
    assert gradient is not None
    for j in range(4):
        ends = []
        for h in (1e-4, -1e-4):
            router.routers["2"].data[j] += h
            (found, _, _) = trajectory(net, router, solve, x, [1.0] * 4, learning=False)
            router.routers["2"].data[j] -= h
            ends.append(2 * float({s.step: s.error for s in found}[2].mean()))
        assert float(gradient[j]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-12)


def loss_of(view: Backbone, name: str = "harmonica", seed: int = 0, **config: Any) -> Losses:
    x, _, cond = view.example(2, seed)
    g = torch.Generator().manual_seed(seed)
    batch = {
        "x": x,
        "noise": torch.randn(x.shape, generator=g),
        **cond,
        "time": torch.rand(2, generator=g),
        "drop": torch.rand(2, generator=g),
    }
    if name == "harmonica":
        del batch["time"], batch["drop"]
    return objective_from(name, {"solver": "euler", **config}, Flow()).loss(view, batch)


@pytest.mark.parametrize("name", ["harmonica", "l2c"])
def test_gradients_reach_the_router_only(name: str) -> None:
    router: Router = (HarmoniCa if name == "harmonica" else L2C)(num_inference_steps=4)
    view = with_table(router, 0.0)
    before = {n: p.clone() for n, p in view.named_parameters() if not n.startswith("methods.")}
    optimizer = torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], 0.1, weight_decay=0.0)
    for seed in range(2):
        loss_of(view, name, seed).loss.mean().backward()
    touched = {n for n, p in view.named_parameters() if p.grad is not None}
    assert touched
    assert all(n.startswith(f"methods.{name}.routers.") for n in touched)
    assert name == "l2c" or len(touched) == 3  # every step but the first
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in view.named_parameters() if n in before)


def test_without_errors_the_gradient_is_the_prices_and_logits_fall_to_the_limit() -> None:
    """d sum(r) / dp = r (1 - r); with lr 1 Adam walks from 0 to -5 in about 5 updates, and no further."""
    router = HarmoniCa(num_inference_steps=3)
    view = with_table(router, torch.linspace(-2, 2, 12).reshape(3, 4))
    router.proxy.zero_()
    router.updates.fill_(1)
    optimizer = torch.optim.AdamW(router.routers.parameters(), 1.0, weight_decay=0.0)
    for k in range(9):
        before = router.table()
        loss_of(view, coefficient=1.0, refresh=100).loss.mean().backward()
        r = before[1:]
        if k == 0:
            assert torch.allclose(torch.stack([p.grad for p in router.routers.values()]), r * (1 - r), atol=1e-7)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        router.clamp_()
        assert ((router.table()[1:] < r) | (before[1:] <= torch.tensor(-5.0).sigmoid())).all()
    assert all(bool((p == -5).all()) for p in router.routers.values())


@pytest.mark.parametrize("name", ["harmonica", "l2c"])
def test_the_loss_falls_and_free_logits_move_towards_compute(name: str) -> None:
    router: Router = (HarmoniCa if name == "harmonica" else L2C)(num_inference_steps=4)
    view = with_table(router, -1.0)
    optimizer = torch.optim.AdamW(router.routers.parameters(), 0.1, weight_decay=0.0)
    losses = []
    for _ in range(12):
        found = loss_of(view, name, coefficient=0.0, **({"proxy": "none"} if name == "harmonica" else {}))
        found.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.loss.detach().mean()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(p.detach().mean()) > -1 for i, p in router.routers.items() if p.grad is not None or name == "harmonica")


@pytest.mark.parametrize(("start", "ratio"), [(2.0, 0.6), (-2.0, 0.2)])
def test_a_ratio_draws_the_table_towards_it(start: float, ratio: float) -> None:
    """From either side, although errors alone would have everything computed."""
    router = HarmoniCa(num_inference_steps=3, ratio=ratio)
    view = with_table(router, start)
    optimizer = torch.optim.AdamW(router.routers.parameters(), 0.8, weight_decay=0.0)
    apart = []
    for _ in range(5):
        apart.append(abs(1 - float(router.table().mean()) - ratio))
        loss_of(view, proxy="none").loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert apart[-1] < 0.5 * apart[0]


def test_damages_add_up_and_both_readings_agree_where_there_is_one_step() -> None:
    view = with_table(HarmoniCa(num_inference_steps=4), -1.0)
    router, (net, x) = router_of(view), guided(view)
    rows = [r.detach() for r in router.rows()]
    apart = mixed_sample(net, router, solve, x, rows) - mixed_sample(net, router, solve, x, [torch.ones(4)] * 4)
    found = damages(net, router, solve, x, "cumulative")
    assert torch.allclose(sum(found.values()), apart, atol=1e-6)  # type: ignore[arg-type]
    squares = [float(d.square().mean()) for d in found.values()]
    assert proxies(net, router, solve, x, "cumulative").tolist() == pytest.approx([1.0, *squares])
    last = mixed_sample(net, router, solve, x, rows)
    without = mixed_sample(net, router, solve, x, [*rows[:2], torch.ones(4), rows[3]])
    assert torch.equal(damages(net, router, solve, x, "leave_one_out")[2], last - without)
    view = with_table(HarmoniCa(num_inference_steps=2), -1.0)
    router, (net, x) = router_of(view), guided(view)
    assert torch.equal(*(proxies(net, router, solve, x, how) for how in ("cumulative", "leave_one_out")))  # type: ignore[arg-type]


def test_the_weights_of_the_steps_are_measured_again_after_so_many_trajectories() -> None:
    router = HarmoniCa(num_inference_steps=3)
    view, seen = with_table(router, 0.0), []
    for _ in range(3):
        loss_of(view, refresh=2)
        seen.append(router.proxy.clone())
        router.routers["1"].data -= 1.0
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_without_guidance_no_null_label_is_needed_and_channels_are_checked() -> None:
    assert loss_of(with_table(HarmoniCa(num_inference_steps=2), 0.0, tiny(null_label=False)), guidance_scale=1.0).loss.isfinite().all()
    with pytest.raises(DitkitError, match=r"guidance_channels is 3 .* allowed: 'all', or 1 to 2"):
        loss_of(with_table(HarmoniCa(num_inference_steps=2), 0.0), guidance_channels=3)


def test_wrong_pairs_of_objective_and_method_are_refused() -> None:
    with pytest.raises(DitkitError, match="0 routers"):
        loss_of(tiny())
    with pytest.raises(DitkitError, match="objective harmonica with l2c"):
        loss_of(with_table(L2C(num_inference_steps=4), 0.0))
    with pytest.raises(DitkitError, match="objective l2c with harmonica"):
        loss_of(with_table(HarmoniCa(num_inference_steps=4), 0.0), "l2c")
    with pytest.raises(DitkitError, match=r"draws noise; allowed: deterministic solvers"):
        loss_of(with_table(HarmoniCa(num_inference_steps=4), 0.0), solver="ddim", solver_options={"eta": 1.0}, proxy="none")


# ---- by recipe, on the shipped digits


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates of a table for 4 steps."""
    folder = tmp_path_factory.mktemp("router") / "run"
    recipe = load_recipe("digits-harmonica")
    sections = {
        "base": "digits",
        "backbone": None,
        "process": None,
        "methods": [{"name": "harmonica", "config": {"num_inference_steps": 4, "ratio": 0.4}}],
        "trainable": list(recipe.trainable),
        "objective": recipe.objective.to_dict(),
        "sampling": {"solver": "euler", "num_inference_steps": 4, "guidance": {"scale": 1.5}},
    }
    train(tiny_recipe(sections, steps=3, batch_size=2, learning_rate=1e-2, ema_decay=0.0), folder, progress=False)
    return folder


def test_a_recipe_learns_a_small_file_and_leaves_the_network_alone(learned: Path) -> None:
    base = ditkit.from_pretrained("digits", dtype="float32").model.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in read_tensors(learned / "model.safetensors").items())
    state = read_tensors(learned / "methods" / "harmonica.safetensors")
    assert sum(v.numel() for n, v in state.items() if n.startswith("routers.")) == 3 * 12
    assert int(state["updates"]) == 3
    assert (learned / "methods" / "harmonica.safetensors").stat().st_size < 4000


def test_the_table_is_served_and_refuses_other_solvers_and_steps(learned: Path) -> None:
    pipe = ditkit.from_pretrained(learned)
    report = pipe(class_labels=[3], progress=False).report["methods"]["harmonica"]
    assert report["hits"] == round(0.4 * 4 * 12)
    with pytest.raises(ConfigError, match="num_inference_steps is 5; allowed: 4"):
        pipe(class_labels=[3], num_inference_steps=5, progress=False)
    with pytest.raises(ConfigError, match="solver is 'heun'"):
        pipe(class_labels=[3], solver="heun", progress=False)
    again = ditkit.from_pretrained("digits").with_methods(learned / "methods" / "harmonica.json")
    x = again(class_labels=[3], num_inference_steps=4, progress=False).x
    assert torch.equal(x, pipe(class_labels=[3], progress=False).x)
    other = again.config.model_copy(update={"process": again.config.process.model_copy(update={"config": {"shift": 2.0}})})
    with pytest.raises(ConfigError, match=r"made for another process: shift 1.0, not 2.0"):
        ditkit.Pipeline(again.eager, other).with_methods(learned / "methods" / "harmonica.json")
