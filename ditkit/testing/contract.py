"""Contract tests for every registered backbone, every method on every backbone, and all pairs of methods.

By default each method's first setting runs on every backbone, and all its settings, and pairs, on the two of ``PAIR_BACKBONES``. Graphs are
captured of every backbone alone and with the methods of ``CAPTURED`` together; of each method and of the pairs of ``CAPTURED`` on the last
of the two, which has all that the first has. Where a backbone's config can choose other networks (``tinies``, named ``dit:adaln``), these
run too, with the methods of ``ON_VARIANTS``. ``DITKIT_MATRIX=1`` runs and captures everything everywhere, and all methods that go together.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.bundle import Part
from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.loading import empty_model

from .cases import (
    BACKBONES,
    CAPTURED,
    MATRIX,
    METHODS,
    OFF,
    PAIR_BACKBONES,
    PAIRS,
    VARIANTS,
    by_default,
    compiled_like_eager,
    draw,
    fresh,
    label,
    make,
    of_base,
    same_layers,
    tiny,
    view_of,
)
from .trajectory import STEPS, inputs_of, relative, sample, steps

__all__ = [
    "TestBackbone",
    "TestMethod",
    "TestOff",
    "TestPair",
    "TestTogether",
    "test_graphs_of_three_methods_that_differ_in_kind_are_as_computed",
]


class Spy(Method):
    """Every seam, each calling nxt once; records what it saw."""

    name, exact = "spy", True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {k: set() for k in ("branch", "update", "attend", "linear", "block", "trunk", "predict")}

    def _see(seam: str) -> Callable[..., Any]:  # type: ignore[misc]
        def layer(self: Any, nxt: Any, value: Any, where: Any, **kw: Any) -> Any:
            self.seen[seam].add(str(getattr(where, "branch", "")))
            return nxt(value, **kw)

        return layer

    branch, update, attend, linear = _see("branch"), _see("update"), _see("attend"), _see("linear")
    block, trunk, predict = _see("block"), _see("trunk"), _see("predict")


@pytest.mark.parametrize("backbone", VARIANTS)
class TestBackbone:
    def test_shape_finite_and_deterministic(self, backbone: str) -> None:
        model = tiny(backbone)
        x, t, cond = model.example(3)
        with torch.no_grad():
            y = model(x, t, **cond)
            assert y.shape[0] == 3
            assert y.shape[2:] == x.shape[2:]
            assert y.isfinite().all()
            assert torch.equal(y, model(x, t, model.prepare(**cond)))

    def test_batch_independent(self, backbone: str) -> None:
        model = tiny(backbone)
        x, t, cond = model.example(3)
        with torch.no_grad():
            whole = model(x, t, **cond)
            for k in range(3):
                one = model(x[k : k + 1], t[k : k + 1], **{n: v[k : k + 1] for n, v in cond.items()})
                assert relative(one, whole[k : k + 1]) < 1e-5

    def test_a_layer_at_every_seam_changes_nothing_and_names_agree(self, backbone: str) -> None:
        model, spy = tiny(backbone), Spy()
        assert torch.equal(sample(with_methods(model, spy)), sample(model))
        blocks: list[Any] = list(model.blocks)
        assert spy.seen["branch"] == spy.seen["update"] == {n for b in blocks for n in b.branches}
        assert spy.seen["linear"] == {n for b in blocks for n in b.projections()}
        x, t, cond = model.example()
        s = model.embed(x, t, model.prepare(**cond))
        assert spy.seen["attend"] == {n for b in blocks for n in b.calls(s)}

    def test_projections_are_called_by_their_names(self, backbone: str) -> None:
        class Check(Method):
            name = "check"

            def linear(self, nxt: Any, x: Tensor, site: Any) -> Tensor:
                y = nxt(x)
                assert (x.shape[-1], y.shape[-1]) in shapes[site.branch]
                return y

        model = tiny(backbone)
        shapes: dict[str, set[tuple[int, int]]] = {}
        for b in model.blocks:
            for name, module in b.projections().items():  # type: ignore[operator]
                shapes.setdefault(name, set()).add((module.in_features, module.out_features))
        sample(with_methods(model, Check()), num_steps=1)

    def test_unknown_streams_pass_through(self, backbone: str) -> None:
        class Extra(Method):
            name = "extra"

            def trunk(self, nxt: Any, s: Any, run: Run) -> Tensor:
                return nxt({**s, "unknown": s[run.model.main]})

        model = tiny(backbone)
        assert torch.equal(sample(with_methods(model, Extra())), sample(model))

    def test_modulation_is_what_conditioning_says(self, backbone: str) -> None:
        """``conditioning`` gives the c of ``embed``, whatever x is; SiLU of it enters the projections ``NAME.ada``."""

        class Check(Method):
            name = "check"

            def linear(self, nxt: Any, x: Tensor, site: Any) -> Tensor:
                stream = site.branch.removesuffix(".ada")
                assert stream not in c or stream == site.branch or torch.equal(x, torch.nn.functional.silu(c[stream]))
                return nxt(x)

        model = tiny(backbone)
        x, t, cond = model.example()
        prepared = model.prepare(**cond)
        with torch.no_grad():
            c = model.conditioning(t[:, None], prepared)
            s = model.embed(x.flip(0), t, prepared)
            assert all(relative(c[n], u) < 1e-6 for n in c.keys() & s.keys() if (u := s[n].c) is not None)
            assert c.keys() <= s.keys() | {n.removesuffix(".ada") for b in model.blocks for n in b.projections()}  # type: ignore[operator]
            with_methods(model, Check())(x, t, prepared)

    def test_gradients_reach_every_parameter(self, backbone: str) -> None:
        model = tiny(backbone)
        x, t, cond = model.example(4)
        model(x, t, **cond).square().mean().backward()
        silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
        model.zero_grad(set_to_none=True)
        assert not silent

    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("grain", ["block", "step"])
    def test_compiled_equals_eager_and_graphs_are_as_computed(self, backbone: str, grain: str) -> None:
        if not MATRIX and backbone not in PAIR_BACKBONES and grain == "step":
            pytest.skip("graphs of whole steps on further backbones: DITKIT_MATRIX=1")
        compiled_like_eager(tiny(backbone), grain)

    def test_published_sizes_build(self, backbone: str) -> None:
        cls: Any = type(tiny(backbone))
        for values in cls.sizes.values() if backbone in BACKBONES else ():
            part = Part(name=backbone, config=cls.config_class(**values).to_dict())
            assert sum(p.numel() for p in empty_model(part).parameters()) > 0

    def test_wrong_input_is_named(self, backbone: str) -> None:
        model = tiny(backbone)
        x, t, cond = model.example()
        with pytest.raises(DitkitError, match="x is"):
            model(torch.cat([x, x], 1), t, **cond)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("case", OFF, ids=label)
class TestOff:
    def test_off_is_the_base_bit_for_bit(self, backbone: str, case: tuple[str, int]) -> None:
        cls: Any = registry.get("methods", case[0])
        try:
            view = with_methods(tiny(backbone), cls.off()[case[1]])
        except Conflict as reason:
            pytest.skip(str(reason))
        assert torch.equal(sample(view, scale=2.0), of_base(backbone, scale=2.0))


@pytest.mark.parametrize(
    ("backbone", "case"),
    [(b, c) for c in METHODS for b in VARIANTS if MATRIX or by_default(b, c)],
    ids=label,
)
class TestMethod:
    def test_it_acts_and_the_base_stays(self, backbone: str, case: tuple[str, int]) -> None:
        base, before = tiny(backbone), of_base(backbone, num_steps=1)  # what is written to its weights, one step shows
        view, after = view_of(backbone, case), fresh(backbone, case)
        assert after.isfinite().all()
        assert not torch.equal(after, of_base(backbone)) or view.attached[0].exact
        assert torch.equal(sample(base, num_steps=1), before)
        active_none = Run(view, 1, active=())
        x, t, cond = base.example()
        if type(view.attached[0]).replace is Method.replace:  # what swaps weights cannot be switched off in its view
            with torch.no_grad():
                assert torch.equal(view(x, t, run=active_none, **cond), base(x, t, **cond))

    def test_runs_share_nothing(self, backbone: str, case: tuple[str, int]) -> None:
        view, alone = view_of(backbone, case), [fresh(backbone, case, s) for s in (0, 1)]
        with torch.no_grad():
            *_, both = zip(steps(view, seed=0), steps(view, seed=1))
        assert all(torch.equal(a, b) for a, b in zip(alone, both))
        if MATRIX or backbone in PAIR_BACKBONES:
            threads_equal(view, alone)

    def test_nothing_leaks_between_requests(self, backbone: str, case: tuple[str, int]) -> None:
        """Guided and ended by an exception at step 3, unguided, guided: each as through a fresh view (A23)."""
        view = view_of(backbone, case)
        trajectory = steps(view, scale=2.0)
        with torch.no_grad():
            for _ in range(3):
                next(trajectory)
        del trajectory
        assert torch.equal(sample(view), fresh(backbone, case))
        assert torch.equal(sample(view, scale=2.0), fresh(backbone, case, scale=2.0))

    def test_two_pass_equals_batched_guidance(self, backbone: str, case: tuple[str, int]) -> None:
        view = view_of(backbone, case)
        two, one = fresh(backbone, case, scale=2.0), sample(view, scale=2.0, batched=True)
        assert relative(one, two) < max(1e-5, view.attached[0].tolerance)

    def test_batch_independent(self, backbone: str, case: tuple[str, int]) -> None:
        view = view_of(backbone, case)
        base = tiny(backbone)
        x, t, cond = base.example(3)
        rows = [slice(k, k + 1) for k in range(3)]

        def last(part: slice) -> Tensor:
            run = Run(view, STEPS, inputs=inputs_of(view, x[part]))
            with torch.no_grad():
                for i in itertools.islice(run.steps(), 3):
                    v = view(x[part], t[part] * (1 - i / 3), run=run, **{n: u[part] for n, u in cond.items()})
                    run.close(v)
            return v

        assert relative(torch.cat([last(r) for r in rows]), last(slice(0, 3))) < view.attached[0].tolerance

    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("grain", ["block", "step"])
    def test_compiled_equals_eager_and_graphs_are_as_computed(self, backbone: str, case: tuple[str, int], grain: str) -> None:
        if not MATRIX and (case[1] or backbone != PAIR_BACKBONES[-1] or grain == "step" and case[0] not in CAPTURED):
            pytest.skip("graphs of each setting on each backbone, by block and by step: DITKIT_MATRIX=1")
        if not MATRIX and (other := same_layers(case[0])):
            pytest.skip(f"the graphs of {other}, on another schedule: DITKIT_MATRIX=1")
        compiled_like_eager(view_of(backbone, case), grain)

    def test_state_returns(self, backbone: str, case: tuple[str, int]) -> None:
        """Config and state make the same method again."""
        view = view_of(backbone, case)
        (method,) = view.attached
        again = type(method)(method.config)
        twin = with_methods(tiny(backbone), again)
        again.load_state_dict(method.state_dict())
        assert torch.equal(sample(twin), fresh(backbone, case))

    def test_twice_is_refused(self, backbone: str, case: tuple[str, int]) -> None:
        view = view_of(backbone, case)
        start = time.perf_counter()
        with pytest.raises(Conflict):
            with_methods(view, make(case))
        assert time.perf_counter() - start < 1

    def test_unknown_setting_is_named(self, backbone: str, case: tuple[str, int]) -> None:
        cls: Any = registry.get("methods", case[0])
        with pytest.raises(DitkitError, match="no_such_setting"):
            cls(no_such_setting=1)


def threads_equal(view: Backbone, alone: list[Tensor]) -> None:
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: sample(view, seed=s)})) for s in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[s], alone[s]) for s in (0, 1))


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if b in PAIR_BACKBONES or MATRIX])
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=label)
class TestPair:
    def test_refused_with_a_reason_or_works(self, backbone: str, a: tuple[str, int], b: tuple[str, int]) -> None:
        base = tiny(backbone)
        start = time.perf_counter()
        try:
            view = with_methods(base, make(a), make(b))
        except Conflict as reason:
            refusal = str(reason)
            view = None
        if view is None:
            assert len(refusal) > 20
            assert time.perf_counter() - start < 1
            return
        before = of_base(backbone, num_steps=1)
        out = sample(draw(view))
        assert out.isfinite().all()
        assert torch.equal(sample(draw(with_methods(with_methods(base, make(b)), make(a)))), out), "the order of attaching matters"
        assert torch.equal(sample(base, num_steps=1), before)
        if MATRIX or backbone == PAIR_BACKBONES[-1] and {a[0], b[0]} <= set(CAPTURED):
            compiled_like_eager(view, "block")


def together(base: Backbone, first: str) -> Backbone:
    """A view with ``first`` and every further method that is not refused beside those before it."""
    view = with_methods(base, make((first, 0)))
    for name, i in METHODS:
        if i == 0 and name != first:
            with contextlib.suppress(Conflict):
                view = with_methods(view, make((name, i)))
    return draw(view)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("backbone", BACKBONES if MATRIX else [])
@pytest.mark.parametrize("first", sorted({name for name, _ in METHODS}))
class TestTogether:
    """Graphs of several methods at once."""

    def test_graphs_of_all_that_go_together_are_as_computed(self, backbone: str, first: str) -> None:
        try:
            view = together(tiny(backbone), first)
        except Conflict as reason:
            pytest.skip(str(reason))
        for other in sorted({name for name, _ in METHODS if name < first}):
            with contextlib.suppress(Conflict):  # one that this backbone refuses
                if set(together(tiny(backbone), other).methods) == set(view.methods):
                    pytest.skip("the same methods as before")
        compiled_like_eager(view, "block")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_graphs_of_three_methods_that_differ_in_kind_are_as_computed(backbone: str) -> None:
    view = tiny(backbone)
    for name in CAPTURED:
        with contextlib.suppress(Conflict):
            view = with_methods(view, make((name, 0)))
    compiled_like_eager(draw(view), "block")
