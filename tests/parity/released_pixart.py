"""What the released PixArt networks compute, made by ours: one function for each kind of output of a golden file."""

import torch
from golden import Golden, open_golden, relative
from torch import Tensor

from ditkit.backbones.pixart import PixArt
from ditkit.core.run import Run
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.solvers import SOLVERS
from ditkit.interop.pixart import Constructor, official_table
from ditkit.interop.tables import Renamed, load_all
from ditkit.nn.positions import sincos_table, stretched


def load_pixart(g: Golden) -> PixArt:
    """The network of a file with official names, through the project's own table; alpha's class with sizes does not say so."""
    micro = "w/csize_embedder.mlp.0.weight" in g.names
    config = Constructor.parse({**g.config, "micro_condition": micro}).to_ours()
    model = PixArt(config)
    found = {name.removeprefix("w/"): tuple(g[name].shape) for name in g.starting("w/")}
    expect = {name: tuple(u.shape) for name, u in model.state_dict().items()}
    source = Renamed("golden", found, lambda name: g["w/" + name], official_table(config), expect)
    model.load_state_dict(load_all(source))
    return model.eval()


class Released:
    """A file's network and inputs, in float32 or, for ``out64/...``, in float64."""

    def __init__(self, g: Golden, double: bool) -> None:
        self.g, self.dtype = g, torch.float64 if double else torch.float32
        self.model = load_pixart(g).to(self.dtype)
        self.process = Gaussian()

    def __getitem__(self, name: str) -> Tensor:
        u = self.g[f"in/{name}"]
        return u.to(self.dtype) if u.is_floating_point() else u

    def cond(self, masked: bool = True, null: bool = False) -> dict[str, Tensor]:
        """Captions and sizes; the null caption with the caption's mask, as released."""
        found = {"text": self["y_null" if null else "y"][:, 0]}
        if masked:
            found["mask"] = self["mask"][:, 0, 0]
        if self.model.config.micro_conditions:
            found |= {"size": self["img_hw"], "aspect": self["aspect_ratio"]}
        return found

    @torch.no_grad()
    def compute(self, name: str) -> Tensor:
        """The output ``name``."""
        match name.split("_"):
            case ["forward", "masked" | "nomask" as how]:
                return self.model(self["x"], self["t"], **self.cond(how == "masked"))
            case ["forward", "with", "cfg"]:
                return self.guided_rows(3, masked="forward_with_cfg drops the mask" not in self.g.metadata["notes"])
            case ["forward", "with", "dpmsolver"]:
                return torch.cat(self.both(masked=True))[:, : self["x"].shape[1]]
            case ["caption", "embed", "dropped"]:
                null = self.model.null(text=self["y"][:, 0])["text"]
                drop = (self["drop_ids"] == 1)[:, None, None]
                return self.model.caption(torch.where(drop, null, self["y"][:, 0]))[:, None]
            case ["pos", *places]:
                return self.positions(places)
            case ["q", "sample"]:
                return self.process.add_noise(self["x_start"], self["noise"], self.train_time())
            case ["train", part]:
                return self.losses(part)
            case ["dpms", "sample"]:
                return self.dpm_solver()
        raise AssertionError(f"{name} is new: say here what it is")

    def both(self, masked: bool) -> tuple[Tensor, Tensor]:
        """With the caption, and with the null caption."""
        x, t = self["x"], self["t"]
        return self.model(x, t, **self.cond(masked)), self.model(x, t, **self.cond(masked, null=True))

    def guided_rows(self, channels: int, masked: bool) -> Tensor:
        """The released ``forward_with_cfg``: the guided prediction twice, each with the other channels of its own half."""
        guidance = Guidance(scale=self.g.call["cfg"], channels=channels)
        public = (self["t"].double() + 1) / self.process.config.num_train_steps
        run, cond, null = Run(self.model), self.cond(masked), self.cond(masked, null=True)
        first = guided(self.model, self.process, guidance, run, cond, null)(self["x"], public)
        return torch.cat([first, torch.cat([first[:, :channels], self.both(masked)[1][:, channels:]], 1)])

    def positions(self, places: list[str]) -> Tensor:
        """The table of x's grid: the model's, or of a scale and base in the name."""
        cfg = self.model.config
        scale, base = (float(places[0]), int(places[1])) if len(places) == 2 else (cfg.position_scale, cfg.position_base)
        grid = self.model.patch_embed.grid(self["x"])
        return sincos_table(cfg.dim, stretched(grid, base, scale))[0].to(self.dtype)

    def train_time(self) -> Tensor:
        return (self["t_train"].double() + 1) / self.process.config.num_train_steps

    def losses(self, part: str) -> Tensor:
        """loss, mse or vb of each sample."""
        x0, noise, t = self["x_start"], self["noise"], self.train_time()
        x_t = self.process.add_noise(x0, noise, t)
        losses = self.process.loss(self.model(x_t, self.process.network_time(t), **self.cond()), x0, noise, t)
        return losses.loss if part == "loss" else losses.parts[part]

    def dpm_solver(self) -> Tensor:
        """DPM-Solver++ of order 2 over evenly spaced times, all channels guided."""
        guidance, steps, x = Guidance(scale=self.g.call["cfg"]), self.g.call["steps"], self["noise"]
        run = Run(self.model, steps)
        denoise = guided(self.model, self.process, guidance, run, self.cond(), self.cond(null=True))
        return SOLVERS["dpm++2m"](denoise, x, self.process, run, lambda step, purpose: x, spacing="uniform", lower_order_below=10)


def check(g: Golden, name: str) -> None:
    """An output of a file, to 1e-5."""
    kind, _, output = name.partition("/")
    got = Released(g, kind == "out64").compute(output)
    want = g[name]
    if output in ("train_vb", "train_loss") and kind == "out" and (g["in/t_train"] == 0).any():
        got, want = (u[g["in/t_train"] != 0] for u in (got, want))  # a difference of two cdfs, ill-conditioned in float32
    assert relative(got, want) <= 1e-5


__all__ = ["Released", "check", "load_pixart", "open_golden"]
