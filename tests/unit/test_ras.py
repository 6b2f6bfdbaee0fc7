"""RAS: what the sheet says must hold of schedule, selection, caches and cost, on every backbone whose tokens may be few."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.backbones.lumina import Lumina
from ditkit.backbones.mmdit import MMDiT
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.registry import get
from ditkit.core.run import Run
from ditkit.core.seams import Attn
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.solvers import SOLVERS
from ditkit.eval.counters import count_run
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.methods.efficiency.first_block_cache import FirstBlockCache
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.ras import RAS, RASConfig, patches
from ditkit.methods.efficiency.taylorseer import TaylorSeer
from ditkit.methods.specs import parse_spec
from ditkit.nn.flag import sharpening
from ditkit.testing.contract import tiny
from ditkit.testing.trajectory import Counted, relative, sample

NETWORKS = ["dit", "dit:in_context", "dit:cross_attention", "dit:rope", "pixart:plain", "mmdit", "flux", "lumina", "lumina:flag", "hunyuan"]


class Watch(Method):
    """Innermost: how many tokens of each stream enter a block, and the keys that its attention gets, by (step, block)."""

    name, stage = "watch", "numbers"

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, int] = {}
        self.keys_of: dict[tuple[int, int], Tensor] = {}

    def plan(self, at: Any) -> Any:
        return at.step, at.block

    def branch(self, nxt: Any, h: dict[str, Tensor], site: Any) -> dict[str, Tensor]:
        self.tokens[site.mode[0]] = h["img"].shape[1]
        return nxt(h)

    def attend(self, nxt: Any, a: Attn, site: Any) -> dict[str, Tensor]:
        if site.branch == "attn":
            self.keys_of[site.mode] = a.k["img"]
        return nxt(a)


@torch.no_grad()
def run_of(view: Backbone, num_steps: int = 6, **more: Any) -> Run:
    """A whole trajectory's run; ``more`` conditioning than the example's."""
    x, t, cond = view.example()
    run = Run(view, num_steps)
    for i in run.steps():
        v = run.close(view(x, t * (1 - i / num_steps), run=run, **cond, **more))
        x = x - v[:, : x.shape[1]] * (0.3 / num_steps)
    return run


# ---- tokens, keys and values ----


def test_the_released_step_after_the_end() -> None:
    """One predicate for both; released, ``end`` itself is sparse and has the selection of the step before."""
    assert RASConfig(start=2, end=4, resets=0).sparse_steps(6) == {2, 3}
    assert RASConfig(start=2, end=4, resets=0, selection="released").sparse_steps(6) == {2, 3, 4}
    run = run_of(with_methods(DiT.tiny(), RAS(start=2, end=4, resets=0, selection="released"), watch := Watch()))
    assert [watch.tokens[s] for s in range(6)] == [24, 24, 12, 12, 12, 24]
    assert float(run.memory["ras"]["drops", 0].sum()) == 2 * 2 * 12  # two selections in each of two pictures


def test_pixels_of_tokens_row_by_row_on_a_grid_that_is_no_square() -> None:
    where = run_of(with_methods(DiT.tiny(), RAS(start=2)), 3).memory["ras"]["patches"]
    n = torch.arange(24)
    first = 2 * (n // 6) * 12 + 2 * (n % 6)
    assert torch.equal(where.pixels, first[:, None] + torch.tensor([0, 1, 12, 13]))
    assert torch.equal(where.tokens, n)


def test_pixels_of_tokens_in_a_clip_with_separators() -> None:
    """Tokens between rows and frames have none; a token's pixels are in its frame."""
    model = Lumina(variant="flag", input_size=(2, 4, 6), dim=32, depth=1, num_heads=4, num_kv_heads=None, mlp_hidden=8, text_dim=10)
    where = patches(model, torch.zeros(1, 8, 2, 4, 6), 2 * (2 * 4 + 1), 4 * 8)
    assert where.tokens.tolist() == [0, 1, 2, 4, 5, 6, 9, 10, 11, 13, 14, 15]
    assert where.pixels[0].tolist() == [0, 1, 6, 7]
    assert where.pixels[6].tolist() == [24, 25, 30, 31]


def test_separators_always_go_through_and_padding_goes_first() -> None:
    flag: Any = tiny("lumina:flag")
    view = with_methods(flag, RAS(start=2, resets=0))
    memory = run_of(view).memory["ras"]
    separators = memory["layout"].role[0].nonzero()[:, 0]
    assert len(separators) == 4
    assert all(set(separators.tolist()) <= set(row.tolist()) for row in memory["active", 0])
    sizes = torch.tensor([[4, 12], [8, 12]])  # half of the first picture is padding
    memory = run_of(view, sizes=sizes).memory["ras"]
    picture = memory["layout"].role.eq(0).expand(2, -1)
    assert memory["layout"].valid.gather(1, memory["active", 0])[picture.gather(1, memory["active", 0])].all()


@pytest.mark.parametrize("network", NETWORKS)
def test_token_counts_step_by_step(network: str) -> None:
    base = tiny(network)
    x, t, cond = base.example()
    st = base.embed(x, t, base.prepare(**cond))["img"]
    total = st.layout.total
    separators = 0 if st.layout.role is None else int((st.layout.role > 0).sum())
    left_out = int(0.5 * (total - separators))
    run = run_of(with_methods(base, RAS(start=2, resets=(4,)), watch := Watch()))
    assert [watch.tokens[s] for s in range(6)] == [total, total, total - left_out, total - left_out, total, total - left_out]
    assert run.finish()["ras"] == {"hits": 3, "token_share": pytest.approx(1 - 3 * left_out / (6 * total))}


@pytest.mark.parametrize("network", NETWORKS)
def test_all_tokens_through_the_caches_are_the_base(network: str) -> None:
    """A ratio that leaves none out, but gathers and scatters: permutation-equivariant, hence equal."""
    base = tiny(network)
    view = with_methods(base, RAS(sample_ratio=0.999, start=1))
    assert relative(sample(view, scale=3.0, num_steps=3), sample(base, scale=3.0, num_steps=3)) < 1e-5


def test_sharpened_logits_count_the_whole_picture() -> None:
    """Lumina's proportional attention scales by the number of tokens: of all of them, padding apart."""
    base: Any = Lumina.tiny().extrapolating(rule="none", proportional=True, base_tokens=6)
    x, t, cond = base.example()
    cond["sizes"] = torch.tensor([[8, 8], [4, 12]])
    with torch.no_grad():
        layout = base.embed(x, t, base.prepare(**cond))["img"].layout
        assert torch.equal(sharpening(layout.take(torch.tensor([[0, 1], [2, 3]])), 6, x.dtype), sharpening(layout, 6, x.dtype))
        run, wanted = Run(with_methods(base, RAS(sample_ratio=0.999, start=1)), 3), base(x, t, **cond)
        for _ in run.steps():
            assert relative(run.close(run.model(x, t, run=run, **cond)), wanted) < 1e-5


@pytest.mark.parametrize("network", ["dit", "mmdit", "flux", "lumina"])
def test_keys_of_tokens_left_out_stay_and_those_of_the_others_are_fresh(network: str) -> None:
    base = tiny(network)
    plain = with_methods(base, dense := Watch())
    view = with_methods(base, RAS(start=2, resets=0), watch := Watch())
    x, t, cond = base.example()
    run, depth = Run(view, 5), len(base.blocks)
    with torch.no_grad():
        for step in run.steps():
            now = x * (1 - step / 5), t * (1 - step / 5)
            active = run.memory["ras"].get(("active", 0))
            run.close(view(*now, run=run, **cond))
            if step < 2:
                continue
            went = torch.zeros(2, run.memory["ras"]["layout"].total, dtype=torch.bool).scatter(1, active, True)
            same = (watch.keys_of[step, 0] == watch.keys_of[step - 1, 0]).all(-1).all(1)
            assert same[~went].all()
            assert not same[went].any()
            plain(*now, run=Run(plain), **cond)
            assert relative(watch.keys_of[step, 0].transpose(1, 2)[went], dense.keys_of[0, 0].transpose(1, 2)[went]) < 1e-5
            for i in range(depth):
                before, after = watch.keys_of[step - 1, i], watch.keys_of[step, i]
                assert torch.equal(before.transpose(1, 2)[~went], after.transpose(1, 2)[~went])


@pytest.mark.parametrize("network", ["dit", "lumina:flag", "flux"])
def test_pixels_left_out_keep_their_output_bit_for_bit(network: str) -> None:
    base = tiny(network)
    view = with_methods(base, RAS(start=2, resets=0))
    x, t, cond = base.example()
    other = {k: v.flip(0) for k, v in cond.items()}
    run, before = Run(view, 6), None
    with torch.no_grad():
        for step in run.steps():
            active = run.memory["ras"].get(("active", 0))
            now = x * (1 - step / 6), t * (1 - step / 6)
            c, u = (view(*now, run=run, guidance_pass=name, **told) for name, told in (("cond", cond), ("null", other)))
            v = run.close(u + 3.0 * (c - u))
            if step >= 2:
                where = run.memory["ras"]["patches"]
                went = torch.zeros(2, run.memory["ras"]["layout"].total, dtype=torch.bool).scatter(1, active, True)[:, where.tokens]
                for k in range(2):
                    kept = where.pixels[~went[k]].flatten()
                    assert len(kept.unique()) == len(kept)
                    assert torch.equal(v[k].flatten(1)[:, kept], before[k].flatten(1)[:, kept])  # type: ignore[index]
                    assert not torch.equal(v[k], before[k])  # type: ignore[index]
            before = v


def test_a_field_without_interaction_or_time_is_dense() -> None:
    """Without attention, time and change of x no token's output changes: whatever is selected, nothing is lost."""

    class Alone(Method):
        name, stage = "alone", "numbers"

        def attend(self, nxt: Any, a: Attn, site: Any) -> dict[str, Tensor]:
            return {n: torch.zeros_like(q) for n, q in a.q.items()}

    base = DiT.tiny()
    x, t, cond = base.example()
    with torch.no_grad():
        wanted = with_methods(base, Alone())(x, t, **cond)
        run = Run(with_methods(base, Alone(), RAS(sample_ratio=0.2, start=1)), 6)
        for _ in run.steps():
            assert relative(run.close(run.model(x, t, run=run, **cond)), wanted) < 1e-6


def test_without_the_caches_tokens_see_those_that_go_through() -> None:
    view = with_methods(DiT.tiny(), RAS(start=2, kv_cache=False), watch := Watch())
    run = run_of(view)
    assert watch.keys_of[3, 0].shape[2] == 12
    assert not any(kept for key, kept in run.slots.items() if key[0] == "ras")  # type: ignore[index]


@pytest.mark.timeout(180)
def test_each_number_of_tokens_has_its_graph() -> None:
    """A ramp of two chunks: the dense graph, and one for each."""
    torch._dynamo.reset()
    view = with_methods(DiT.tiny(depth=1), RAS(start=2, resets=0, ramp=4, ramp_length=2, ramp_multiple=2, kv_cache=False))
    counted = Counted(view, "step")
    assert torch.equal(sample(counted.model), sample(view))
    sample(counted.model, seed=1)
    assert counted.graphs == count_graphs(view, 6) == 3


# ---- passes, solvers, neighbours ----


def test_passes_that_pause_and_second_evaluations_start_dense() -> None:
    """A guidance interval lets the null pass return at a sparse step; Heun asks twice a step, but for the last."""
    model, flow = MMDiT.tiny(), Flow()
    view = with_methods(model, RAS(start=2, resets=0))
    x, _, cond = model.example()
    null = model.null(**cond)

    def draw(step: int, purpose: str) -> Tensor:
        return torch.zeros_like(x)

    for solver, interval in (("euler", (0.2, 0.6)), ("heun", (0.0, 1.0))):
        run = Run(view, 6)
        denoise = guided(view, flow, Guidance(scale=3.0, interval=interval), run, cond, null)
        with torch.no_grad():
            assert SOLVERS[solver](denoise, x, flow, run, draw).isfinite().all()
        assert run.memory["ras"]["shares"] < run.memory["ras"]["forwards"]


def test_a_dense_step_before_sparse_ones_computes_everything() -> None:
    """A feature cache reuses neither what fills the caches nor what a reset is for."""
    view = with_methods(DiT.tiny(), RAS(start=3, resets=(5,)), FORA(interval=7))
    run = Run(view, 8)
    modes = {}
    for step in run.steps():
        run.first = step == 0
        modes[step] = {m.label: at.mode for m, at in run.plan()[0].layers}["fora"]
    assert {step for step, mode in modes.items() if mode == ("attn", "mlp")} == {0, 2, 5, 7}  # 0 and 7 by FORA's own schedule


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (FirstBlockCache(), "static tokens|both decide"),
        (TaylorSeer(), "taylorseer needs static tokens, which ras takes away"),
        (CLEAR(radius=2.0, down=2), "both decide kv.img|needs grid"),
        (RAS(), "attached twice"),
    ],
)
def test_what_it_cannot_meet(other: Method, reason: str) -> None:
    with pytest.raises(Conflict, match=reason):
        with_methods(DiT.tiny(), RAS(), other)


@pytest.mark.parametrize("network", ["pixart", "pt_dit"])
def test_blocks_that_need_the_grid_refuse_it(network: str) -> None:
    with pytest.raises(Conflict, match="needs grid, which ras takes away"):
        with_methods(tiny(network), RAS())


def test_one_channel_has_no_deviation() -> None:
    model = DiT.tiny(in_channels=1, out_channels=1)
    with pytest.raises(Conflict, match="single channel"):
        with_methods(model, RAS())
    assert sample(with_methods(model, RAS(metric="l2norm", start=2))).isfinite().all()


def test_predictions_must_be_handed_over() -> None:
    view = with_methods(DiT.tiny(), RAS(start=1))
    x, t, cond = view.example()
    run = Run(view, 3)
    steps_of = run.steps()
    with torch.no_grad():
        next(steps_of)
        view(x, t, run=run, **cond)
        next(steps_of)
        with pytest.raises(DitkitError, match="no tokens were chosen for step 1"):
            view(x, t, run=run, **cond)


def test_a_run_too_short_says_so() -> None:
    base = DiT.tiny()
    view = with_methods(base, RAS(start=6))
    assert torch.equal(sample(view), sample(base))
    run = run_of(view)
    with pytest.warns(UserWarning, match="reused nothing"):
        run.finish()


def test_on_the_command_line() -> None:
    (method,) = parse_spec("ras:sample_ratio=0.25,metric=l2norm,resets=6").build()
    assert method.config == RASConfig(sample_ratio=0.25, metric="l2norm", resets=6)
    assert RASConfig.parse(method.config.to_dict()) == method.config
    assert get("methods", "ras") is RAS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_of(with_methods(DiT.tiny(), RAS(start=2))).finish()["ras"]["hits"] == 4


# ---- cost ----


@pytest.mark.parametrize(("device", "guided"), [("cpu", False), ("meta", True)])
def test_cost_of_a_sparse_step(device: str, guided: bool) -> None:
    """With n of N tokens: token-wise layers n / N, attention n / N and not its square; patches, time and modulation stay."""
    base = DiT.tiny(depth=2).to(device)
    d, depth, total, went, out = 32, 2, 24, 12, 4 * 6
    run = count_run(with_methods(base, RAS(start=2, resets=(4,))), 6, guided=guided)
    full, passes = count_run(base, 1, guided=guided), 2 if guided else 1
    sparse = [i for i, c in enumerate(run.steps) if c.macs != full.macs]
    assert sparse == [2, 3, 5]
    for i in sparse:
        assert full.steps[0].linear_macs - run.steps[i].linear_macs == passes * (total - went) * (12 * d * d * depth + d * out)
        assert run.steps[i].attention_macs == passes * depth * 2 * went * total * d
        assert full.steps[0].attention_macs == passes * depth * 2 * total**2 * d


def test_cost_beside_text() -> None:
    """MM-DiT: queries are n + L, keys N + L; the text's own layers stay. Without the caches, keys are n + L too."""
    base = MMDiT.tiny().to("meta")
    d, total, went, text = 24, 16, 8, 5
    for cache, keys in ((True, total), (False, went)):
        costs = count_run(with_methods(base, RAS(start=1, kv_cache=cache)), 2).steps
        # block 0 has a second attention of the picture to itself; in block 1, the last, text asks nothing
        calls = {(went + text, keys + text): 1, (went, keys): 1, (went, keys + text): 1}
        assert {(q, k): n for (_, _, q, k, _), n in costs[1].attentions.items()} == calls
        saved = costs[0].linear_macs - costs[1].linear_macs
        block = 4 * d * d + 2 * 2 * d * d  # q k v and output, an MLP of ratio 2
        assert saved == (total - went) * (2 * block + 4 * d * d + d * 4 * 3)
