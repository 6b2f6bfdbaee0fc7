"""TinyFusion's recovery against the released code: block outputs, every term of the loss by sample, gradients."""

import re

import pytest
import torch
from golden import load_dit, open_golden, relative

from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.gaussian import Gaussian
from ditkit.methods.pruning import BlockOutputs
from ditkit.train.tinyfusion import PRESETS, MaskedKD, MaskedKDConfig

G = open_golden("tinyfusion-kd")
pytestmark = pytest.mark.parity
PARTS = {"kd_loss": "teacher", "gt": "data", "mse": "mse", "vb": "vb", "vb_kd": "kd_vb", "feat_loss": "features"}
NAMES = {"attn.qkv": "img.qkv", "attn.proj": "img.proj", "mlp.fc1": "img.fc1", "mlp.fc2": "img.fc2", "adaLN_modulation.1": "img.ada"}
DROPOUT = G.config.get("class_dropout_prob", 0.1)
LAYERS = tuple(zip(G.config["student_layers"], G.config["teacher_layers"]))


class Network:
    """One of the file's two networks, as a file of its own."""

    def __init__(self, who):
        self.prefix = f"w/{who}."
        self.config = {**G.config, "depth": G.config[f"depth_{who[0]}"]}
        self.names = ["w/" + name.removeprefix(self.prefix) for name in G.starting(self.prefix)]

    def __getitem__(self, name):
        return G[self.prefix + name.removeprefix("w/")]

    def starting(self, prefix):
        return [name for name in self.names if name.startswith(prefix)]


def setting(variant):
    """The objective as the variant has it, the student, and the loss of the file's batch."""
    process, student = Gaussian(), load_dit(Network("student"))
    beta = G.config["beta_feat"]
    chosen = {"beta": (beta, beta)} if variant == "kd_rep" else PRESETS["released-output-kd"]
    objective = MaskedKD(
        process, MaskedKDConfig(teacher="given", alpha=G.config["alpha_kd"], layers=LAYERS, label_dropout=DROPOUT, **chosen)
    )
    objective.learn_from(load_dit(Network("teacher")), len(student.blocks))
    whole = {"y": G["in/y"]}
    dropped = objective.conditioning(student, {"x": G["in/x0"], "drop": G["in/drop_u"], **whole}) if variant == "kd_rep" else whole
    t = (G["in/t"].double() + 1) / process.config.num_train_steps
    return student, objective.at_time(student, G["in/x0"], G["in/noise"], t, dropped, whole)


@pytest.mark.parametrize("variant", ["kd_rep", "kd"])
def test_terms_and_gradients(variant):
    student, losses = setting(variant)
    assert relative(losses.loss, G[f"out/{variant}/loss"]) <= 1e-5
    for theirs, ours in PARTS.items():
        if f"out/{variant}/{theirs}" in G.names:
            assert relative(losses.parts[ours], G[f"out/{variant}/{theirs}"]) <= 1e-5, theirs
    losses.loss.mean().backward()
    for name in G.starting(f"out/{variant}/grad/"):
        layer = name.removeprefix(f"out/{variant}/grad/")
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", layer):
            weight = student.blocks[int(found[1])].projections()[NAMES[found[2]]].weight
        else:
            weight = {"final_layer.linear.weight": student.final.proj.weight}[layer]
        assert relative(weight.grad, G[name]) <= 1e-5, name


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_block_outputs(who):
    model, process = load_dit(Network(who)), Gaussian()
    view = with_methods(model, BlockOutputs())
    run, t = Run(view), (G["in/t"].double() + 1) / process.config.num_train_steps
    null = model.null(G["in/y"])["y"]
    y = torch.where(G["in/drop_u"] < DROPOUT, null, G["in/y"])
    with torch.no_grad():
        view(process.add_noise(G["in/x0"], G["in/noise"], t), process.network_time(t), run=run, y=y)
    for name in G.starting(f"out/feature/{who}."):
        assert relative(run.memory["block_outputs"][int(name.rpartition(".")[2])][1], G[name]) <= 1e-5
