"""clear-attn: FLUX's joint and single attention, full, in windows, and with averaged keys; each with the proportional scale too."""

import pytest
import torch
from golden import open_golden, relative

from ditkit.core.masks import render
from ditkit.core.seams import Attn, Site, sdpa
from ditkit.core.streams import Layout, grid_layout
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.nn.adaln import AdaLNPart
from ditkit.nn.layers import plain
from ditkit.nn.positions import Rope

G = open_golden("clear-attn")
pytestmark = pytest.mark.parity
C, BASE = G.config, 4608  # tokens of FLUX at 1024 x 1024, which the proportional scale counts from
GRID, TEXT = (C["H"], C["W"]), C["T"]
ROPE = Rope(tuple(C["axes"]), ntk=C["ntk"]).table((1, *GRID))
NAMES = (
    ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0"),
    ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"),
)


def part(prefix: str, names: tuple[str, ...]) -> AdaLNPart:
    made = AdaLNPart(C["dim"], C["heads"], qk_norm=True)
    state = {f"qkv.{u}": torch.cat([G[f"w/{prefix}.{n}.{u}"] for n in names[:3]]) for u in ("weight", "bias")}
    state |= {f"{ours}.weight": G[f"w/{prefix}.{n}.weight"] for ours, n in (("q_norm", names[3]), ("k_norm", names[4]))}
    if f"w/{prefix}.{names[5]}.weight" in G.names:
        state |= {f"proj.{u}": G[f"w/{prefix}.{names[5]}.{u}"] for u in ("weight", "bias")}
    assert not made.load_state_dict(state, strict=False).unexpected_keys
    return made


def attention(method: CLEAR, parts: dict[str, AdaLNPart], weight: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """{stream: (B, N, D)}, heads concatenated, of the file's inputs."""
    x, rope = {"text": G["in/txt"], "img": G["in/img"]}, {"text": None, "img": ROPE}
    layouts = {"text": Layout(torch.zeros(1, TEXT, 2), TEXT), "img": grid_layout(GRID)}
    qkv = {n: parts[n].to_qkv(x[n], plain, rope[n]) for n in x}
    q, k, v = ({n: u[i] for n, u in qkv.items()} for i in range(3))
    mask = render([method.mask], layouts, method.keys("attn", layouts, None))
    given = {} if weight is None else {"weight": weight}
    out = method.attend(sdpa, Attn("attn", q, k, v, layouts, layouts, mask), Site((), given, {}))
    return {n: u.transpose(1, 2).flatten(2) for n, u in out.items()}


def case(name: str, how: str) -> tuple[CLEAR, torch.Tensor | None]:
    kind = name.removesuffix("_prop")
    down, radius = (C["d"] if kind.startswith("down") else None), (None if kind == "full" else C["r"])
    initial = torch.full((C["d"],) * 2, 1 / C["d"] ** 2)
    weight = {"down": G["w/spatial_weight"].view(C["d"], C["d"]), "down_init": initial}.get(kind)
    return CLEAR(radius=radius, down=down, proportional=BASE if name.endswith("_prop") else None, how=how), weight


def test_rope():
    for ours, theirs in zip(ROPE, (G["out/rope_cos"], G["out/rope_sin"])):
        assert relative(ours[0], theirs[TEXT:]) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("how", ["dense", "gathered"])
@pytest.mark.parametrize("name", sorted({n.split("/")[1] for n in G.starting("out/") if n.count("/") == 2}))
def test_attention(name, how):
    method, weight = case(name, how)
    image, text = (part("joint", names) for names in NAMES)
    joint = attention(method, {"text": text, "img": image}, weight)
    assert relative(image.proj(joint["img"]), G[f"out/{name}/joint_img"]) <= 1e-5
    assert relative(text.proj(joint["text"]), G[f"out/{name}/joint_txt"]) <= 1e-5
    both = part("single", NAMES[0])
    single = attention(method, {"text": both, "img": both}, weight)
    assert relative(torch.cat([single["text"], single["img"]], 1), G[f"out/{name}/single"]) <= 1e-5
