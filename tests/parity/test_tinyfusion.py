"""TinyFusion's search, pruning and scores against the released code: gates, masks, gated forwards and their gradients."""

import re

import pytest
import torch
from golden import load_dit, open_golden, relative

from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.methods.adaptation.lora import LoRA
from ditkit.methods.efficiency.tinyfusion import TinyFusion, options, prune
from ditkit.methods.pruning import block_similarity, least_needed

G = open_golden("tinyfusion")
pytestmark = pytest.mark.parity
GROUPS = range(len(G.config["groups"]))
NAMES = {  # ours for what the file calls otherwise
    "attn.qkv": "img.qkv",
    "attn.proj": "img.proj",
    "mlp.fc1": "img.fc1",
    "mlp.fc2": "img.fc2",
    "adaLN_modulation.1": "img.ada",
    "t_embedder.mlp.0": "time.fc1",
    "t_embedder.mlp.2": "time.fc2",
    "final_layer.linear": "final.proj",
    "final_layer.adaLN_modulation.1": "final.ada",
}


def network():
    """The file's network; its gates are the method's."""
    G.names = [name for name in G.names if not name.startswith("w/gumbel_gates")]
    return load_dit(G)


def search():
    """The view with the file's gates, a run in which the file's noise is drawn, and the output."""
    method = TinyFusion(groups=G.config["groups"], scaling=G.config["scaling"])
    view = with_methods(network(), method)
    for g, theta in enumerate(method.gates):
        theta.data.copy_(G[f"w/gumbel_gates.{g}"][0])
    run = Run(view)
    method.sample(run, torch.cat([G[f"in/gumbel/{g}"] for g in GROUPS], 1), G.config["tau"])
    return view, method, run


def forward(model, **options):
    return model(G["in/x"], G["in/t"], y=G["in/y"], **options)


def test_full_network():
    with torch.no_grad():
        assert relative(forward(network()), G["out/full"]) <= 1e-5


def test_patterns_and_masks():
    _, method, run = search()
    for g, (n, m) in enumerate(G.config["groups"]):
        assert torch.equal(options(n, m), G[f"out/options/{g}"])
        assert relative(method.masks(g, run.memory[method.label]), G[f"out/mask/{g}"]) <= 1e-5
        assert relative(G[f"out/onehot/{g}"] @ options(n, m), G[f"out/mask/{g}"]) <= 1e-5


def test_gated_forward_and_gradients():
    view, method, run = search()
    out = forward(view, run=run)
    assert relative(out, G["out/gated"]) <= 1e-5
    (out * G["in/cotangent"]).sum().backward()
    for name in G.starting("out/grad/"):
        if gate := re.fullmatch(r"out/grad/gumbel_gates\.(\d+)", name):
            assert relative(method.gates[int(gate[1])].grad[None], G[name]) <= 1e-5
        else:
            block, layer = re.fullmatch(r"out/grad/blocks\.(\d+)\.(.+)\.weight", name).groups()
            module = view.blocks[int(block)].projections()[NAMES[layer]]
            assert relative(module.weight.grad, G[name]) <= 1e-5


def test_decision_and_pruned_network():
    view, method, _ = search()
    decision = method.decide()
    assert list(decision.keep) == G["out/decision"].tolist()
    assert relative(torch.tensor(decision.confidence, dtype=torch.float64), G["out/confidence"]) <= 1e-5
    with torch.no_grad():
        assert relative(forward(prune(view)), G["out/pruned"]) <= 1e-5
        assert relative(forward(view), G["out/pruned"]) <= 1e-5


def test_block_similarity():
    scores = block_similarity(network(), G["in/x"], G["in/t"], y=G["in/y"])
    assert relative(scores, G["out/bi_score"]) <= 1e-5
    (name,) = G.starting("out/bi_removed_")
    remove = int(name.rpartition("_")[2])
    assert set(least_needed(scores, remove)) == set(range(len(scores))) - set(G[name].tolist())


def test_lora_beside_the_gates():
    """In the blocks by the method; outside them, where it does not act, by the same change of the weights."""
    model, rank = network(), G.config["lora_rank"]
    lora = LoRA(rank=rank, alpha=2.0 * rank)
    view = with_methods(model, lora)
    with torch.no_grad():
        for name in G.starting("in/lora/"):
            layer, factor = re.fullmatch(r"in/lora/(.+)\.lora_([ab])\.weight", name).groups()
            if block := re.match(r"blocks\.(\d+)\.(.+)", layer):
                pair = lora.pair(f"blocks.{block[1]}.{NAMES[block[2]]}")
                (pair.A if factor == "a" else pair.B).copy_(G[name])
            elif factor == "a":
                model.get_submodule(NAMES[layer]).weight += 2 * G[name.replace("lora_a", "lora_b")] @ G[name]
        assert relative(forward(view), G["out/lora_out"]) <= 1e-5
