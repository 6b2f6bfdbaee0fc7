"""What the seams must never get wrong again: one test (at least) for each lesson of docs/architecture.md, by its number."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from ditkit_example.gates import Gates
from ditkit_example.regions import Regions
from ditkit_example.window import Window
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.view import keep_blocks, with_methods
from ditkit.methods.efficiency.fora import FORA
from ditkit.testing.contract import draw, tiny
from ditkit.testing.trajectory import STEPS, Counted, relative, sample, steps


@pytest.fixture
def dit() -> Backbone:
    return DiT.tiny()


def forward(model: Backbone, run: Run | None = None, batch: int = 2, **kw: Any) -> Tensor:
    x, t, cond = model.example(batch)
    with torch.no_grad():
        return model(x, t, run=run, **cond, **kw)


# 1. Slots are keyed by (method, block, pass); their shapes are checked; what is stored is detached and contiguous.
def test_1_guidance_switched_off_half_way_is_refused_not_broadcast(dit: Backbone) -> None:
    run = Run(with_methods(dit, FORA(interval=6)), 6)
    schedule = run.steps()
    next(schedule)
    forward(run.model, run, batch=4)
    next(schedule)
    with pytest.raises(DitkitError, match="start a new Run"):
        forward(run.model, run, batch=2)


def test_1_a_pass_that_paused_starts_anew(dit: Backbone) -> None:
    """With a guidance interval a pass ends and may come back: it must not reuse what is many steps old."""
    view = with_methods(dit, FORA(interval=100))
    run = Run(view, 6)
    outputs = {}
    for step in run.steps():
        if step in (0, 4):
            outputs[step] = forward(view, run, guidance_pass="null")
    assert torch.equal(outputs[4], forward(dit))


def test_1_slots_are_detached_contiguous_and_do_not_hold_the_whole_qkv(dit: Backbone) -> None:
    view = with_methods(dit, Regions(), FORA(interval=3))
    x, t, cond = view.example()
    run = Run(view, STEPS)
    next(run.steps())
    view(x, t, run=run, **cond).sum().backward()
    kept = [u for slots in run.slots.values() for u in slots.values()]
    assert kept
    for u in kept:
        assert not u.requires_grad
        assert u.is_contiguous()
        assert u.untyped_storage().nbytes() == u.numel() * u.element_size()


# 2. Token-indexed values follow the rows of their stream; what must be fresh is computed.
@pytest.mark.parametrize("backbone", ["dit", "two_streams", "long_skips"])
def test_2_cache_under_token_selection_holds_the_rows_of_the_tokens_at_hand(backbone: str) -> None:
    view = with_methods(tiny(backbone), Regions(), FORA(interval=3))
    run = Run(view, STEPS)
    for step in run.steps():
        forward(view, run)
        modes = {m.label: at.mode for m, at in run.plan()[0].layers}
        assert ("attn" in modes["fora"]) or modes["regions"] == "sparse", "attention must run where keys are filled"
        for (method, *_), slots in run.slots.items():  # type: ignore[misc]
            if method == "fora" and step:
                assert all(u.shape[1] == s_total(view, key) for key, u in slots.items())


def s_total(view: Backbone, key: str) -> int:
    x, t, cond = view.example()
    return view.embed(x, t, view.prepare(**cond))[key.rpartition("@")[2]].layout.total


# 3. Masks are functions of layouts, ANDed, and rendered once.
class Left(Method):
    """A second mask: keys in the left half only."""

    name = "left"

    def mask(self, q: Any, k: Any, q_name: str, k_name: str) -> Tensor | None:
        calls.append(1)
        return (k.coords[..., 1] < 2)[:, None].expand(-1, q.coords.shape[1], -1) if (q_name, k_name) == ("img", "img") else None


calls: list[int] = []


@pytest.mark.parametrize("backbone", ["dit", "two_streams"])
def test_3_no_method_loses_another_ones_mask(backbone: str) -> None:
    base = tiny(backbone)
    near = with_methods(base, Window(radius=1.5))
    both = with_methods(base, Window(radius=1.5), Left())
    x, t, cond = base.example()
    x.requires_grad_()
    out = both(x, t, **cond)
    with torch.no_grad():
        assert not torch.equal(out, near(x, t, **cond))
    one = with_methods(keep_blocks(base, [len(base.blocks) - 1]), Window(radius=1.5), Left())
    (gradient,) = torch.autograd.grad(one(x, t, **cond)[:, :, 0, 0].sum(), x)
    p = base.config.patch_size
    reach = gradient.abs().sum((0, 1)) > 0
    assert reach[: 2 * p, : 2 * p].all()
    outside = reach.clone()
    outside[: 2 * p, : 2 * p] = False
    assert not outside.any()


def test_3_masks_are_rendered_once_a_run_and_not_by_block(dit: Backbone) -> None:
    view = with_methods(dit, Left())
    calls.clear()
    sample(view)
    assert len(calls) == 1


def test_3_padding_is_never_looked_at() -> None:
    model = tiny("two_streams")
    x, t, cond = model.example()
    text = cond["text"].clone()
    text[~cond["mask"]] = 7.0
    with torch.no_grad():
        # the toy's modulation is the mean of all text tokens, so only attention is compared: same c, other padding
        prepared, other = model.prepare(**cond), model.prepare(text=text, mask=cond["mask"])
        kept = prepared.shared["text"].clone()
        kept[~cond["mask"]] = other.shared["text"][~cond["mask"]]
        layout = prepared.shared["layout"]
        s = model.embed(x, t, prepared)
        run = Run(model)
        run.begin("")
        a = model._trunk(s, run, prepared)["img"].x
        run = Run(model)
        run.begin("")
        b = model._trunk({**s, "text": s["text"]._replace(x=kept, layout=layout)}, run, prepared)["img"].x
    assert torch.equal(a, b)


# 4. Soft gates and hard schedules share one path.
@pytest.mark.parametrize("backbone", ["dit", "two_streams"])
def test_4_a_gate_at_zero_is_the_pruned_model(backbone: str) -> None:
    base = tiny(backbone)
    gates = Gates()
    view = with_methods(base, gates)
    gates.theta.data[1] = -1.0
    assert relative(sample(view), sample(keep_blocks(base, [i for i in range(len(base.blocks)) if i != 1]))) < 1e-6


def test_4_gates_get_gradients(dit: Backbone) -> None:
    view = with_methods(dit, gates := Gates())
    x, t, cond = view.example()
    view(x, t, **cond).square().mean().backward()
    assert (gates.theta.grad != 0).all()


# 6. What does not depend on time is made once a run.
def test_6_prepare_runs_once(dit: Any) -> None:
    seen = []
    dit.label.register_forward_hook(lambda *_: seen.append(1))
    sample(dit)
    assert len(seen) == 2  # the two conditionings of the trajectory, not once a step


# 7. Long skips are data.
def test_7_pruning_keeps_or_refuses_pairs() -> None:
    base = tiny("long_skips")
    assert base.skips == ((1, 2), (0, 3))
    with pytest.raises(Conflict, match="needs the output of block 0"):
        keep_blocks(base, [1, 2, 3])
    pruned = keep_blocks(base, [0, 3])
    assert pruned.skips == ((0, 1),)
    assert sample(pruned).isfinite().all()


def test_7_a_block_takes_keys_and_values_from_another_stream(dit: Backbone) -> None:
    class Pooled(Method):
        """FlexDiT's generation block in miniature: queries on a coarse grid, keys and values dense; then back."""

        name, stage = "pooled", "structure"

        def plan(self, at: At) -> Any:
            return "pool" if at.block == 1 else None

        def block(self, nxt: Any, s: Any, at: At) -> Any:
            coarse = s["img"].resize((2, 3), "mean")
            y = nxt({**s, "img": coarse}, kv={"img": s["img"]})["img"]
            assert y.x.shape[1] == 6
            return {**s, "img": s["img"]._replace(x=s["img"].x + y.resize(s["img"].layout.grid, "nearest").x)}

    assert sample(with_methods(dit, Pooled())).isfinite().all()


# 8. Conflicts are refused before anything runs.
def test_8_needs_against_breaks(dit: Backbone) -> None:
    class Shuffle(Method):
        name, needs = "shuffle", frozenset({"grid"})

    with pytest.raises(Conflict, match="shuffle needs grid, which regions takes away"):
        with_methods(dit, Shuffle(), Regions())


def test_8_needs_against_the_backbone(dit: Backbone) -> None:
    class Frames(Method):
        name, needs = "frames", frozenset({"time axis"})

    with pytest.raises(Conflict, match="time axis"):
        with_methods(dit, Frames())


def test_8_a_method_that_matches_nothing_is_an_error(dit: Backbone) -> None:
    class Nothing(Method):
        name, stage = "nothing", "numbers"

        def replace(self, path: str, module: Any) -> None:
            return None

    with pytest.raises(Conflict, match="matches no projection"):
        with_methods(dit, Nothing())


# 9. Plans are made once a run; modes are the only constants of a graph.
def test_9_planned_once_a_step_and_run(dit: Backbone) -> None:
    seen = []

    class Watch(FORA):
        name = "watch"

        def plan(self, at: At) -> Any:
            seen.append((at.step, at.block))
            return super().plan(at)

    sample(with_methods(dit, Watch(interval=2)), scale=2.0)
    assert len(seen) <= (STEPS + 1) * len(dit.blocks)
    assert {step for step, _ in seen} == set(range(STEPS))


def test_9_graphs_do_not_grow_with_depth_or_steps() -> None:
    torch._dynamo.reset()
    deep = with_methods(
        DiT(input_size=(8, 8), in_channels=3, out_channels=3, dim=16, depth=12, num_heads=2, num_classes=5), FORA(interval=4)
    )
    counted = Counted(deep, "block", 20)
    assert count_graphs(counted.model, 20) == 2
    sample(counted.model, num_steps=20)
    assert counted.graphs == 2


# 11. What would break the sharing is refused.
def test_11_conversion_of_shared_parameters_is_refused(dit: Backbone) -> None:
    view = with_methods(dit, FORA(interval=2))
    for model in (view, dit):
        with pytest.raises(DitkitError, match="views?"):
            model.double()
        with pytest.raises(DitkitError, match="views?"):
            model.load_state_dict(dit.state_dict(), assign=True)
    del view, model
    gc.collect()
    dit.double()


def test_11_in_place_loading_reaches_the_view(dit: Backbone) -> None:
    view = with_methods(dit, FORA(interval=2))
    dit.load_state_dict({k: v * 0.5 for k, v in dit.state_dict().items()})
    assert all(a is b for a, b in zip(dit.parameters(), view.parameters()))


# Views: dropping one is detaching; a run belongs to its view; the base is not kept by what replaced it.
def test_view_is_freed_and_holds_no_state(dit: Backbone) -> None:
    view = with_methods(dit, FORA(interval=2))
    sample(view)
    alive = weakref.ref(view)
    del view
    gc.collect()
    assert alive() is None


def test_a_run_of_another_view_is_refused(dit: Backbone) -> None:
    view = with_methods(dit, FORA(interval=2))
    with pytest.raises(DitkitError, match="another view"):
        forward(dit, Run(view))


def test_too_many_steps_are_refused(dit: Backbone) -> None:
    run = Run(dit, 2)
    list(run.steps())
    run.step = 2
    with pytest.raises(DitkitError, match="step 2 of a run of 2"):
        forward(dit, run)


def test_an_exception_leaves_nothing_behind(dit: Backbone) -> None:
    class Fails(Method):
        name = "fails"

        def branch(self, nxt: Any, h: Any, site: Any) -> Any:
            if fail:
                raise RuntimeError("on purpose")
            return nxt(h)

    fail = False
    view = with_methods(dit, Fails(), FORA(interval=2))
    before = sample(view)
    trajectory = steps(view)
    with torch.no_grad():
        next(trajectory)
        fail = True
        with pytest.raises(RuntimeError, match="on purpose"):
            next(trajectory)
    fail = False
    assert torch.equal(sample(view), before)


def test_taps_leave_sideways(dit: Backbone) -> None:
    class Norms(Method):
        name = "norms"

        def block(self, nxt: Any, s: Any, at: At) -> Any:
            at.run.taps.append((at.block, "norm", s["img"].x.norm()))
            return nxt(s)

    run = Run(with_methods(dit, Norms()))
    forward(run.model, run)
    assert [i for i, *_ in run.taps] == [0, 1, 2, 3]


def test_two_of_a_kind_need_two_labels(dit: Backbone) -> None:
    with pytest.raises(Conflict, match="attached twice"):
        with_methods(dit, Gates(), Gates())


def test_active_selects_methods(dit: Backbone) -> None:
    view = draw(with_methods(dit, FORA(interval=6), Gates()))
    x, t, cond = dit.example()
    with torch.no_grad():
        assert torch.equal(view(x, t, run=Run(view, 1, active=()), **cond), dit(x, t, **cond))
    with pytest.raises(DitkitError, match="no method \\['nobody'\\]"):
        Run(view, 1, active={"nobody"})


@pytest.mark.parametrize("label", ["clear", "keys", "a.b"])
def test_a_label_that_a_module_could_not_hold_is_refused(label: str, dit: Backbone) -> None:
    class Named(Method):
        name = label

    with pytest.raises(Conflict, match="label"):
        with_methods(dit, Named())
