"""CAME against the released optimiser: parameters after each step, and the state at the end, of pixart-sigma-came.safetensors."""

import re

import pytest
import torch
from golden import open_golden, relative

from ditkit.train.came import CAME

G = open_golden("pixart-sigma-came")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def found():
    """What ours computes, by the file's names, in float32 ("out") and float64 ("out64")."""
    made = {}
    for kind, dtype in (("out", torch.float32), ("out64", torch.float64)):
        params = [torch.nn.Parameter(G[f"in/p{j}"].to(dtype, copy=True)) for j in range(len(G.call["shapes"]))]
        config = {"clip" if name == "clip_threshold" else name: value for name, value in G.config.items()}
        optimizer = CAME(params, **config)
        for step in range(G.call["steps"]):
            for j, p in enumerate(params):
                p.grad = G[f"in/g{j}_{step}"].to(dtype)
            optimizer.step()
            made |= {f"{kind}/p{j}_step{step}": p.detach().clone() for j, p in enumerate(params)}
        made |= {f"{kind}/state{j}_{name}": value for j, p in enumerate(params) for name, value in optimizer.state[p].items()}
    return made


@pytest.mark.parametrize("name", G.starting("out"))
def test_steps_and_state(found, name):
    tolerance = 1e-5 if name.startswith("out/") else 1e-12
    assert relative(found[name], G[name]) <= tolerance
    if match := re.fullmatch(r"(out(?:64)?)/p(\d+)_step(\d+)", name):  # the step itself, of the parameter's rounding
        kind, j, step = match.groups()
        before = G[f"{kind}/p{j}_step{int(step) - 1}"] if int(step) else G[f"in/p{j}"]
        assert relative(found[name] - before, G[name] - before) <= (1e-3 if kind == "out" else 1e-9)


def test_every_state_is_ours_too(found):
    assert {n for n in found if "/state" in n} == {n for n in G.names if "/state" in n and n.startswith("out")}
