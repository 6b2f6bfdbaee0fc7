"""PT-DiT against the released code: every output of qihoo-t2x.safetensors.

The file's grids are ours with a frame axis; its windows come one after the other, our tokens row by row. Non-square grids need the preset
"released"; its output with modulations that changed places between samples is made from samples run alone.
"""

import pytest
import torch
from golden import open_golden, relative

from ditkit.backbones.pt_dit import PTDiT
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.streams import grid_layout
from ditkit.core.view import with_methods
from ditkit.core.windows import Cells
from ditkit.diffusion.flow import Flow, shift_time
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.solvers import SOLVERS
from ditkit.interop.pt_dit import Constructor, Ours, official_table
from ditkit.interop.tables import Renamed, load_all
from ditkit.nn.proxy import Proxies, ProxyBlock
from ditkit.nn.windows import Windows

G = open_golden("qihoo-t2x")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def model():
    values = Constructor.parse(G.config)
    made = PTDiT(values.to_ours(Ours(frames=G.call["fhw"][0], positions="released")))
    found = {n.removeprefix("w/"): tuple(G[n].shape) for n in G.starting("w/")}
    expect = {n: tuple(u.shape) for n, u in made.state_dict().items()}
    made.load_state_dict(load_all(Renamed("golden", found, lambda n: G["w/" + n], official_table(made.config), expect)))
    return made.eval()


def windows(model, grid, shifted=False):
    sides = model.config.window
    return Windows(grid, sides, tuple(side // 2 for side in sides) if shifted else ())


def cond(mask=True, null=False):
    end = "_null" if null else ""
    return {"text": G[f"in/y{end}"], **({"mask": G[f"in/mask{end}"].long()} if mask else {})}


def run_blocks(model):
    """The streams before and after the first block."""
    seen = []

    class Watch(Method):
        name = "watch"

        def block(self, nxt, s, at):
            seen.extend([s, out := nxt(s)])
            return out

    with_methods(model, Watch())(G["in/x"], G["in/t_same"], **cond())
    return seen[:2]


def first_block(model, name):
    """Its input and output, as windows; its modulation; the text."""
    before, after = run_blocks(model)
    grid = before["img"].layout.grid
    match name:
        case "block0_in" | "block0_out":
            return windows(model, grid).partition((before if name == "block0_in" else after)["img"].x)
        case "block0_t6":
            return before["img"].c[:, 0, model.config.dim :]
    return before["text"].x


def of_windows(model, name):
    """Proxies and shifted windows of the first block's input; which of a shifted window see each other."""
    grid = model.patch_embed.grid(G["in/x"])
    shifted = windows(model, grid, shifted=True)
    if name == "shift_mask":
        places = grid_layout(grid).coords[0]
        rows = shifted.partition(torch.arange(len(places))[None, :, None])[..., 0]
        inside = places[rows]
        near = Cells(sides=shifted.sides, shift=shifted.shift).near(inside[:, :, None].unbind(-1), inside[:, None].unbind(-1))
        return near.float() - 1
    x = windows(model, grid).reverse(G["out/block0_in"])
    if name == "window_shift":
        return shifted.partition(x)
    pool = model.config.pool()
    return Proxies(pool.sides, pool.counts, name.removeprefix("proxy_")).pool(x, grid)


def tiled(model):
    """Each sample's rows modulated by another's: tiled over windows that lie sample by sample (a defect of the released code)."""
    x, t, dim = G["in/x"], G["in/t_mixed"], model.config.dim
    grid, batch = model.patch_embed.grid(x), len(x)
    own = model.modulation(model.time(t))

    def rows(shifted):
        w = windows(model, grid, shifted)
        count = torch.Size(w.counts).numel()
        chosen = torch.arange(batch * count) % batch
        return w.reverse(own[chosen, 0][:, None].expand(-1, torch.Size(w.sides).numel(), -1))

    plain, moved = rows(False), rows(True)
    c = torch.cat([own[..., :dim].expand(-1, plain.shape[1], -1), plain[..., dim:]], -1)
    shift = torch.cat([c[..., :dim], moved[..., dim : 3 * dim], c[..., 3 * dim :]], -1)  # gated once the windows are back

    class Exchange(Method):
        name = "exchange"

        def trunk(self, nxt, s, run):
            return nxt({**s, "img": s["img"]._replace(c=c)})

    view = with_methods(model, Exchange())
    for block in view.own_blocks():
        block.attend_shifted = lambda s, seam, c, block=block: ProxyBlock.attend_shifted(block, s, seam, shift)
    return view(x, t, **cond())


def forward(model, name):
    if name == "forward_mixed_t_tiled_bug":
        return tiled(model)
    if name == "forward_mixed_t_one_by_one":
        return model(G["in/x"], G["in/t_mixed"], **cond())
    x = G["in/x_" + name.removeprefix("forward_")] if "other" in name else G["in/x"]
    return model(x, G["in/t_same"], **cond(mask="nomask" not in name))


def positions(number):
    """The table alone: [D, h, w, F, scale]."""
    dim, h, w, frames, scale = G.call["pos"][number]
    sizes = dict(input_size=(frames, h, w), patch_size=1, dim=dim, num_heads=1, depth=1, text_dim=1, window=(1, 1, 1))
    table = PTDiT(**sizes, position_scale=scale, positions="released").table((frames, h, w))
    return table.view(frames, h * w, dim)


def process(number):
    """The flow for the resolution of one sample; latents have 8 pixels a side, clips of 17 frames 5."""
    frames, half = int(G["in/res_f"][number]), G.config["out_channels"] == 2 * G.config["in_channels"]
    h, w = (side / 8 for side in G["in/res_hw"][number].tolist())
    flow = Flow(backward=True, discard_half=half, resolution="sqrt", base_area=4096)
    return flow.at((1, 1 if frames == 1 else frames // 17 * 5, h, w))


def training(model, name):
    x0, eps = G["in/x0"], G["in/noise"]
    flows = [process(i) for i in range(len(x0))]
    t = torch.stack([shift_time(u.double() / 1000, flow.config.train_shift) for u, flow in zip(G["in/t_mixed"], flows)])
    x_t = flows[0].add_noise(x0, eps, t)
    match name:
        case "timestep_transform":
            return 1000 * t
        case "rflow_xt":
            return x_t
        case "rflow_model_out":
            return model(x_t, flows[0].network_time(t), **cond())
    return flows[0].loss(G["out/rflow_model_out"], x0, eps, t).loss


def sample(model):
    flow, steps = process(0), G.call["steps"]
    run = Run(model, steps)
    denoise = guided(model, flow, Guidance(scale=G.call["cfg"]), run, cond(), cond(null=True))
    return SOLVERS["euler"].function(denoise, G["in/noise"], flow, run, None, flow.grid(steps, "uniform"))


@torch.no_grad()
@pytest.mark.parametrize("name", [n.removeprefix("out/") for n in G.starting("out/")])
def test_output(model, name):
    match name.split("_"):
        case ["block0", *_]:
            got = first_block(model, name)
        case ["forward", *_]:
            got = forward(model, name)
        case ["pos", number]:
            got = positions(int(number))
        case ["proxy" | "window" | "shift", *_]:
            got = of_windows(model, name)
        case ["rflow", "sample"]:
            got = sample(model)
        case _:
            got = training(model, name)
    assert relative(got, G["out/" + name]) <= 1e-5
