"""FlexDiT (2412.06028) from a trained DiT: the released import, its key report, and the first forward."""

import torch
from golden import load_dit, open_golden, relative

from ditkit.core.view import with_methods
from ditkit.interop.dit import official_table
from ditkit.interop.flexdit import released_modules, released_table, to_released
from ditkit.methods.efficiency.flexdit import FlexDiT

G = open_golden("flexdit-import")
C = G.config
generation, sparse, recovery, dense = C["dumbbell_group"]
LAYOUT = dict(
    pooling=C["num_poolingformer"], modules=C["num_dumbbell"], generation=generation, sparse=sparse, recovery=recovery, dense=dense
)
METHOD = FlexDiT(**LAYOUT, side_noise=C["semantic_size"], side_data=C["semantic_size"])


def listed(name):
    return bytes(G[f"out/{name}"].tolist()).decode().split("\n")


def test_forward():
    view = with_methods(load_dit(G), METHOD)
    with torch.no_grad():
        assert relative(view(G["in/x"], G["in/t"], y=G["in/y"]), G["out/out"]) <= 1e-5


def test_blocks_are_called_as_released():
    assert released_modules(METHOD.config, C["depth"]) == listed("module_order")


def test_key_report():
    """A DiT lacks what merges; the released import leaves the qkv of blocks that have no such tensor."""
    config = load_dit(G).config
    theirs, dit = released_table(config, METHOD.config).links(), official_table(config).links()
    missing = [n for name, link in theirs.items() if name not in dit for n in link.theirs]
    taken_apart = [
        dit[name].theirs[0] for name, link in theirs.items() if name in dit and "blocks." in name and link.rule != dit[name].rule
    ]
    assert sorted(missing) == listed("missing_keys")
    assert sorted(taken_apart) == listed("unexpected_keys")


def test_queries_keys_and_values_are_thirds_of_the_source():
    view = with_methods(load_dit(G), METHOD)
    written = to_released(view)
    for i, home in enumerate(released_modules(METHOD.config, C["depth"])):
        source = G[f"w/blocks.{i}.attn.qkv.weight"]
        if f"{home}.attn.v.weight" in written:
            assert torch.equal(written[f"{home}.attn.v.weight"], source[-len(source) // 3 :])
        elif f"{home}.attn.kv.weight" in written:
            assert torch.equal(torch.cat([written[f"{home}.attn.q.weight"], written[f"{home}.attn.kv.weight"]]), source)
        else:
            assert torch.equal(written[f"{home}.attn.qkv.weight"], source)
