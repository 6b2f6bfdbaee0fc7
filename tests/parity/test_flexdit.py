"""FlexDiT (2412.06028) as released: whole forwards on several sparse grids, outputs of blocks, modules alone, guidance of 3 channels."""

import re

import pytest
import torch
from golden import open_golden, relative

from ditkit.backbones.dit import DiT
from ditkit.core.backbone import Prepared
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.streams import Stream, grid_layout
from ditkit.core.view import keep_blocks, with_methods
from ditkit.diffusion.guidance import combine
from ditkit.interop.dit import Constructor
from ditkit.interop.flexdit import load_released, released_modules, to_released
from ditkit.methods.efficiency.flexdit import FlexDiT, find
from ditkit.methods.pruning import BlockOutputs

G = open_golden("flexdit")
WEIGHTS = {n.removeprefix("w/"): G[n] for n in G.starting("w/")}
SIZES = {int(n.removeprefix("out/out_S")): n for n in G.starting("out/out_S")}
SUB_SIZES = sorted({int(re.match(r"out/sub/S(\d+)/", n)[1]) for n in G.starting("out/sub/S")})


def settings(side, **more):
    """The file's layout of blocks, with a fixed side."""
    c = G.config
    generation, sparse, recovery, dense = c["dumbbell_group"]
    values = dict(pooling=c["num_poolingformer"], modules=c["num_dumbbell"], side_noise=side, side_data=side)
    return {**values, "generation": generation, "sparse": sparse, "recovery": recovery, "dense": dense, **more}


def dit():
    return DiT(Constructor.parse({k: v for k, v in G.config.items() if k in Constructor.model_fields}).to_ours())


def network(side, *methods, base=None):
    """A DiT with the method, and the file's weights."""
    view = with_methods(base or dit(), FlexDiT(**settings(side)))
    load_released(view, WEIGHTS)
    return with_methods(view, *methods).eval() if methods else view.eval()


def forward(view, run=None):
    with torch.no_grad():
        return view(G["in/x"], G["in/t"], y=G["in/y"], run=run)


def place(name):
    """The number of a block by its released name."""
    config = FlexDiT(**settings(1)).config
    return released_modules(config, G.config["depth"]).index(name)


@pytest.mark.parametrize("side", SIZES)
def test_forward(side):
    assert relative(forward(network(side)), G[SIZES[side]]) <= 1e-5


def test_forward_as_configured():
    assert relative(forward(network(G.config["semantic_size"])), G["out/out"]) <= 1e-5


def test_outputs_of_blocks():
    """Blocks are shown inside the method: of a recovery block its dense output, of a generation block the sparse one."""
    names = [n.removeprefix("out/feat/") for n in G.starting("out/feat/")]
    view = network(G.config["semantic_size"], Watch())
    run = Run(view)
    forward(view, run)
    seen = run.memory["watch"]
    for name in names:
        got = seen[place("dumbbell_blocks.0.token_merge_blocks.0")][0] if name == "down_sample.first" else seen[place(name)][1]
        assert relative(got, G[f"out/feat/{name}"]) <= 1e-5, name


class Watch(BlockOutputs):
    """Stands inside FlexDiT: sees what its blocks get and give."""

    name = "watch"


def test_guidance_on_three_channels():
    scale = float(re.search(r"scale ([\d.]+)", G.metadata["notes"])[1])
    view = network(G.config["semantic_size"])
    half = len(G["out/cfg"]) // 2
    x, t, y = (G[f"in/{n}"][:half] for n in "xty")
    with torch.no_grad():
        c, u = view(x, t, y=y), view(x, t, **view.null(y))
    out = combine(c, u, scale, (3, x.shape[1]))
    channels = x.shape[1]
    assert relative(out[:, :channels], G["out/cfg"][:half, :channels]) <= 1e-5
    assert relative(c[:, channels:], G["out/cfg"][:half, channels:]) <= 1e-5


class Attended(Method):
    """Outside FlexDiT: what the attention of the one block gives for the file's tokens as they are, without modulation."""

    name, stage, exact = "attended", "structure", True

    def branch(self, nxt, h, site):
        if site.branch == "attn":
            site.tap("attended", nxt({"img": G["in/dense"]})["img"])
        return nxt(h)


@torch.no_grad()
def alone(blocks, side, *methods, **more):
    """These blocks on the file's dense tokens, as pooling blocks or modules of their own: the tokens after them, and the run."""
    whole = network(side, base=(base := dit()))
    view = with_methods(keep_blocks(base, blocks), flex := FlexDiT(**settings(side, **more)), *methods)
    flex.merges.load_state_dict({k: v for k, v in find(whole).merges.state_dict().items() if k in flex.merges.state_dict()})
    run = Run(view)
    run.begin("")
    tokens = G["in/dense"]
    side = round(tokens.shape[1] ** 0.5)
    s = {"img": Stream(tokens, grid_layout((side, side)), G["in/c"][:, None])}
    return view._trunk(s, run, Prepared({}))["img"].x, run


def test_poolingformer_alone():
    out, run = alone([0], 1, Attended(), pooling=1, modules=0)
    assert relative(out, G["out/sub/poolingformer"]) <= 1e-5
    ((_, _, attended),) = run.taps
    assert relative(attended, G["out/sub/pool_attn"]) <= 1e-5


@pytest.mark.parametrize("side", SUB_SIZES)
def test_module_alone(side):
    first = G.config["num_poolingformer"]
    out, _ = alone(range(first, first + sum(G.config["dumbbell_group"])), side, pooling=0, modules=1)
    assert relative(out, G[f"out/sub/S{side}/sdtm"]) <= 1e-5


@pytest.mark.parametrize("side", SUB_SIZES)
def test_generation_and_recovery_alone(side):
    blocks = [place(f"dumbbell_blocks.0.{name}.0") for name in ("token_merge_blocks", "token_recover_blocks")]
    out, run = alone(blocks, side, Watch(), pooling=0, modules=1, generation=1, sparse=0, recovery=1, dense=0)
    pooled, generated = run.memory["watch"][0]
    assert relative(pooled, G[f"out/sub/S{side}/pool"]) <= 1e-5
    assert relative(generated, G[f"out/sub/S{side}/generate"]) <= 1e-5
    assert relative(out, G[f"out/sub/S{side}/recover"]) <= 1e-5


def test_weights_return_to_the_released_layout():
    back = to_released(network(1))
    assert back.keys() == WEIGHTS.keys()
    assert all(torch.equal(back[n], u) for n, u in WEIGHTS.items() if n != "pos_embed")
