"""RAS's released selection over recorded outputs: which tokens, how often left out, what they keep, and the states that follow."""

from types import SimpleNamespace

import pytest
import torch
from golden import open_golden, relative
from torch import nn

from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.run import Run
from ditkit.core.streams import Stream, grid_layout
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.methods.efficiency.ras import RAS
from ditkit.nn.patches import patchify, unpatchify

G = open_golden("ras")
pytestmark = pytest.mark.parity
CASES = G.config["cases"]


class Nothing(nn.Module):
    branches = ()

    def calls(self, s):
        return {}

    def projections(self):
        return {}

    def forward(self, s, seam):
        return s


class Echo(Backbone):
    """What goes in comes out, if it goes through."""

    def __init__(self, channels, patch):
        super().__init__()
        self.config, self.patch = SimpleNamespace(in_channels=channels), patch
        self.blocks = nn.ModuleList([Nothing()])

    def prepare(self):
        return Prepared({})

    def grid(self, x):
        return tuple(n // self.patch for n in x.shape[2:])

    def embed(self, x, t, prepared):
        return {"img": Stream(patchify(x, self.patch), grid_layout(self.grid(x)))}

    def head(self, s):
        return s["img"].x

    def unembed(self, tokens, x):
        return unpatchify(tokens, self.grid(x), self.patch, "channels first")


def released(case):
    """The method at a case's settings; the released starvation scale is 0.1, whatever is asked for."""
    ramp = dict(ramp=case.get("skip_num_step", 0), ramp_length=case.get("skip_num_step_length") or 4)
    ratios = dict(sample_ratio=case["ratio"], high_ratio=case["high_ratio"], metric=case["metric"])
    return RAS(selection="released", start=case["start"], end=case["end"], resets=tuple(case["resets"]), **ratios, **ramp)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_times(case):
    steps = CASES[case]["steps"]
    times = Flow(shift=CASES[case].get("shift", G.config["shift"])).times(steps, "twice")
    assert relative(times, G[f"out/{case}/sigmas"]) <= 1e-6
    assert relative(1000 * times[:-1], G[f"out/{case}/timesteps"]) <= 1e-6


def test_sparse_steps_and_budgets(case):
    config, steps = released(CASES[case]).config, CASES[case]["steps"]
    sparse, tokens = config.sparse_steps(steps), G[f"out/{case}/drop_cnt"].shape[1]
    assert [k in sparse for k in range(steps)] == G[f"out/{case}/is_ras_step"].tolist()
    for k in sparse - {config.end}:
        budget = int(G[f"out/{case}/skip_token_num"][k])
        high = config.high_ratio
        assert config.left_out(k, steps, tokens) == (int(budget * (1 - high)), int(budget * high))


@torch.no_grad()
def test_trajectory(case):
    x, outputs = G[f"in/{case}/x"], G[f"in/{case}/v"]
    tokens, sigmas = G[f"out/{case}/drop_cnt"].shape[1], G[f"out/{case}/sigmas"]
    patch = round((x[0, 0].numel() / tokens) ** 0.5)
    run = Run(with_methods(Echo(x.shape[1], patch), released(CASES[case])), len(outputs))
    memory, prediction = run.memory["ras"], None
    for k in run.steps():
        if f"out/{case}/active/{k}" in G.names:
            active, pixels = memory["active", 0], memory["patches"].pixels
            assert torch.equal(active[0], G[f"out/{case}/active/{k}"].sort().values)
            left_out = torch.ones(tokens, dtype=torch.bool).scatter(0, active[0], False)
            wanted = G[f"out/{case}/skip_pixels/{k}"]
            assert torch.equal(pixels[left_out].flatten().sort().values, wanted.sort().values)
            if f"out/{case}/cached_noise/{k}" in G.names:
                assert relative(prediction[0].flatten(1)[:, wanted], G[f"out/{case}/cached_noise/{k}"]) <= 1e-5
        prediction = run.close(run.model(outputs[k][None], torch.zeros(1), run=run))
        x = x + (sigmas[k + 1] - sigmas[k]) * prediction
        assert relative(x[0], G[f"out/{case}/x"][k]) <= 1e-5
        drops = memory.get(("drops", 0), torch.zeros(1, tokens))
        assert torch.equal(drops[0] - (len(outputs) + 1), G[f"out/{case}/drop_cnt"][k])
