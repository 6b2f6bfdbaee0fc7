"""What the released Flag-DiT and Next-DiT compute, made by ours: one function for each kind of output of a golden file."""

import torch
from golden import Golden, open_golden, relative
from torch import Tensor

from ditkit.backbones.lumina import Lumina
from ditkit.core.run import Run
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.interop.lumina import Constructor, Ours, official_table
from ditkit.interop.tables import Renamed, load_all


def load_lumina(g: Golden, variant: str) -> Lumina:
    """The network of a file with official names, through the project's own table."""
    values = Constructor.parse(g.config)
    plain = values.to_ours()
    scaling = {"rope_linear": values.rope_scaling_factor, "rope_ntk": values.ntk_factor}
    model = Lumina(values.to_ours(Ours(variant=variant, input_size=plain.input_size, **scaling)))
    found = {name.removeprefix("w/"): tuple(g[name].shape) for name in g.starting("w/")}
    expect = {name: tuple(u.shape) for name, u in model.state_dict().items()}
    source = Renamed("golden", found, lambda name: g["w/" + name], official_table(model.config), expect)
    model.load_state_dict(load_all(source))
    return model.eval()


class Released:
    """A file's network and inputs, in float32 or, for ``out64/...``, in float64."""

    def __init__(self, g: Golden, variant: str, double: bool) -> None:
        self.g, self.dtype = g, torch.float64 if double else torch.float32
        self.model = load_lumina(g, variant).to(self.dtype)
        self.channels = self.model.config.in_channels
        self.process = Flow(network_time="sit", discard_half=self.model.config.out_channels != self.channels)

    def __getitem__(self, name: str) -> Tensor:
        u = self.g[f"in/{name}"]
        return u.to(self.dtype) if u.is_floating_point() else u

    def cond(self, null: bool = False) -> dict[str, Tensor]:
        """Labels, or a text; the null text is among the inputs."""
        if self.model.label is not None:
            return self.model.null(self["y"]) if null else {"y": self["y"]}
        return {"text": self["null_feats" if null else "cap_feats"], "mask": self["null_mask" if null else "cap_mask"]}

    @torch.no_grad()
    def compute(self, name: str) -> Tensor:
        """The output ``name``."""
        match name.split("_"):
            case ["forward"]:
                return self.model(self["x"], self["t"], **self.cond())[:, : self.channels]
            case ["forward", "list", number]:
                return self.canvas(int(number))
            case ["forward", "with", "cfg", number]:
                return self.guided_rows(self.g.call["cfg"][int(number)])
            case ["tokens", part]:
                return self.packed(part)
            case ["label", "embed", "dropped"]:
                dropped = torch.where(self["drop_ids"] == 1, self.model.config.num_classes, self["y"])
                return self.model.label(dropped)
        raise AssertionError(f"{name} is new: say here what it is")

    def pictures(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures of several sizes on one canvas, which holds rubbish beside them."""
        images = [self[name.removeprefix("in/")] for name in self.g.starting("in/img")]
        sizes = torch.tensor([u.shape[1:] for u in images])
        x = torch.full((len(images), images[0].shape[0], *sizes.amax(0).tolist()), 1e3, dtype=self.dtype)
        for row, image in zip(x, images):
            row[:, : image.shape[1], : image.shape[2]] = image
        return x, {**self.cond(), "sizes": sizes}

    def canvas(self, number: int) -> Tensor:
        """One of these pictures."""
        x, cond = self.pictures()
        h, w = cond["sizes"][number].tolist()
        return self.model(x, self["t"], **cond)[number, : self.channels, :h, :w]

    def packed(self, part: str) -> Tensor:
        """Their tokens as the released code packs them: one after the other, then padding."""
        x, cond = self.pictures()
        stream = self.model.embed(x, self["t"], self.model.prepare(**cond))["img"]
        seen = [row[valid] for row, valid in zip(stream.x, stream.layout.valid)]
        longest = max(map(len, seen))
        if part == "mask":
            return torch.stack([torch.arange(longest) < len(u) for u in seen]).int()
        return torch.stack([torch.cat([u, self.model.pad_token.expand(longest - len(u), -1)]) for u in seen])

    def scaled(self, values: dict[str, float]) -> Lumina:
        """The network with the settings of a call."""
        how = {"proportional": values.get("proportional_attn", False), "base_tokens": values.get("base_seqlen")}
        if "scale_factor" in values:
            how |= {"rule": "switch", "scale": values["scale_factor"], "watershed": values.get("scale_watershed", 1.0)}
        cfg = self.model.config
        rope = {"rope_linear": values.get("rope_scaling_factor", cfg.rope_linear), "rope_ntk": values.get("ntk_factor", cfg.rope_ntk)}
        other = Lumina(cfg.model_copy(update=rope)).to(self.dtype).eval()
        other.load_state_dict(self.model.state_dict())
        return other.extrapolating(**how)

    def guided_rows(self, call: list | dict) -> Tensor:
        """The released ``forward_with_cfg``: the guided prediction twice, each with the other channels of its own half."""
        time, values = (self["t"], call) if isinstance(call, dict) else (torch.full_like(self["t"], call[0]), call[1])
        model, chosen = self.scaled(values), min(3, self.channels)
        run = Run(model)
        guidance = Guidance(scale=values["cfg_scale"], channels=chosen)
        denoise = guided(model, self.process, guidance, run, self.cond(), self.cond(null=True))
        first = denoise(self["x"], 1 - time.double())[:, : self.channels]
        other = model(self["x"], time, **self.cond(null=True))[:, chosen : self.channels]
        return torch.cat([first, torch.cat([first[:, :chosen], other], 1)])


def check(g: Golden, variant: str, name: str) -> None:
    """An output of a file, to 1e-5."""
    kind, _, output = name.partition("/")
    got, want = Released(g, variant, kind == "out64").compute(output), g[name]
    assert torch.equal(got, want) if output.endswith("mask") else relative(got, want) <= 1e-5


__all__ = ["check", "load_lumina", "open_golden", "relative"]
