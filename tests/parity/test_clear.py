"""clear: a whole tiny FLUX with windows, with and without averaged keys, and the three losses of its distillation."""

from dataclasses import replace

import pytest
import torch
from golden import load_diffusers, open_golden, relative

from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.nn.patches import patchify, unpatchify
from ditkit.train.clear import AttentionOutputs, Clear, ClearObjectiveConfig, evaluate

G = open_golden("clear")
pytestmark = pytest.mark.parity
C = G.config
GRID, BASE = (C["H"], C["W"]), 4608
METHODS = {"local": {"radius": C["r"]}, "down": {"radius": C["r"], "down": C["d"]}}


def picture(name: str) -> torch.Tensor:
    return unpatchify(G[name], GRID, C["model"]["patch_size"], "channels first")


@pytest.fixture(scope="module")
def model():
    values = {**C["model"], "_ditkit": {"input_size": [n * C["model"]["patch_size"] for n in GRID], "patch_size": C["model"]["patch_size"]}}
    return load_diffusers(G, "flux", values)


@torch.no_grad()
def run(view: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The prediction as a picture, and the attention outputs."""
    x_t = Flow().add_noise(picture("in/x"), picture("in/noise"), G["in/sigma"])
    told = {"guidance": C["guidance"]} if C["model"]["guidance_embeds"] else {}
    return evaluate(with_methods(view, AttentionOutputs()), x_t, G["in/sigma"], text=G["in/txt"], pooled=G["in/pooled"], **told)


def tokens(x: torch.Tensor) -> torch.Tensor:
    return patchify(x, C["model"]["patch_size"])


def test_teacher(model):
    output, attention = run(model)
    assert relative(tokens(output), G["out/teacher"]) <= 1e-5
    assert relative(torch.stack(attention), G["out/teacher_attn_out"]) <= 1e-5


def test_which_blocks(model):
    assert AttentionOutputs().blocks is None
    (method,) = with_methods(model, AttentionOutputs()).attached
    assert list(method.blocks) == G["out/distill_layers"].tolist()


@pytest.mark.parametrize("kind", METHODS)
def test_student_and_losses(model, kind):
    student, teacher = run(with_methods(model, CLEAR(**METHODS[kind]))), run(model)
    assert relative(tokens(student[0]), G[f"out/student_{kind}"]) <= 1e-5
    assert relative(torch.stack(student[1]), G[f"out/{kind}/attn_out"]) <= 1e-5
    objective = Clear(Flow(), ClearObjectiveConfig(teacher="unused"))
    own = Flow().loss(student[0], picture("in/x"), picture("in/noise"), G["in/sigma"])
    losses = objective.combined(own, (student[0], teacher[0]), (student[1], teacher[1]))
    for name, theirs in (("diffusion", "loss_fm"), ("prediction", "loss_distill"), ("attention", "loss_attn")):
        assert relative(losses.parts[name].mean(), G[f"out/{kind}/{theirs}"]) <= 1e-5
    assert relative(losses.loss.mean(), G[f"out/{kind}/loss"]) <= 1e-5


def test_high_resolution(model):
    """Rotary positions stretched by NTK, and the scale for more tokens than were trained with."""
    larger = with_methods(model, CLEAR(radius=None, proportional=BASE))
    larger.rope = replace(larger.rope, ntk=10.0)
    assert relative(tokens(run(larger)[0]), G["out/teacher_ntk10_prop"]) <= 1e-5
