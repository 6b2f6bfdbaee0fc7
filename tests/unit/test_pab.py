"""PAB: kinds of branches at their own ranges, within the window only."""

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.backbones.pixart import PixArt
from ditkit.core.errors import ConfigError
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.pab import PAB, PABConfig
from ditkit.testing.trajectory import sample


class Calls(Method):
    """Innermost: the (step, branch) that are computed."""

    name, stage = "calls", "numbers"

    def __init__(self):
        super().__init__()
        self.seen, self.step = [], 0

    def feed(self, at):
        self.step = at.step
        return {}

    def branch(self, nxt, h, site):
        self.seen.append((self.step, site.branch))
        return nxt(h)


def test_each_kind_is_computed_at_its_own_range():
    calls = Calls()
    view = with_methods(PixArt.tiny(), PAB(spatial=2, cross=3, window=(0.25, 1.0)), calls)
    sample(view, num_steps=12)
    steps = {b: sorted({s for s, branch in calls.seen if branch == b}) for b in ("attn", "cross", "mlp")}
    # u = 1 - s / 12 > 0.25 is s < 9: from step 9 on everything is computed
    assert steps == {"attn": [0, 2, 4, 6, 8, 9, 10, 11], "cross": [0, 3, 6, 9, 10, 11], "mlp": list(range(12))}


def test_one_range_for_all_kinds_is_fora():
    """At 7 steps and interval 3 both compute 0, 3, 6: s mod 3 = 0 counted from either end."""
    base = DiT.tiny()
    pab = with_methods(base, PAB(spatial=3, mlp=3, window=(0.0, 1.0)))
    assert torch.equal(sample(pab, num_steps=7), sample(with_methods(base, FORA(interval=3)), num_steps=7))


def test_a_window_between_no_steps_reuses_nothing_and_says_so():
    run = Run(with_methods(DiT.tiny(), PAB(window=(0.51, 0.52))), 4)
    with pytest.warns(UserWarning, match="pab is on and reused nothing"):
        run.finish()


@pytest.mark.parametrize("wrong", [{"window": (0.8, 0.1)}, {"window": (0.1, 1.2)}, {"spatial": 0}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PABConfig.parse(wrong, "pab")
