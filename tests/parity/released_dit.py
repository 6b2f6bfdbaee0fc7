"""What the released DiT and SiT networks compute, made by ours: one function for each output of a golden file."""

import torch
from golden import Golden
from torch import Tensor

from ditkit.core.run import Run
from ditkit.core.seams import Seam
from ditkit.diffusion.gaussian import Gaussian
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.diffusion.process import Process
from ditkit.nn.embeddings import timestep_code
from ditkit.train.objectives import Diffusion, DiffusionConfig


@torch.no_grad()
def compute(g: Golden, model: torch.nn.Module, process: Process, name: str, batched: bool = False) -> Tensor:
    """The tensor ``name`` of the file, from its inputs."""
    x, t, y = g["in/x"], g["in/t"], g["in/y"]
    channels = process.output_channels(x.shape[1]) if isinstance(process, Gaussian) else x.shape[1]  # SiT drops its second half
    prepared = model.prepare(y=y)
    if name == "out/y":
        return model(x, t, y=y)[:, :channels]
    if name == "out64/y":
        return model.double()(x.double(), t, y=y)[:, :channels]
    if name == "out/y_frac_t":
        return model(x, g["in/t_frac"], y=y)
    if name == "out/cfg":
        return guide(model, process, x, t, y, g.call["cfg_scale"], batched)[:, :channels]
    if name == "out/y_train_drop":
        return model(x, t, y=dropped(g, model, process, y))
    if name == "out/label_force_drop":
        return model.label(torch.where(torch.tensor(g.call["force_drop"]) == 1, model.null(y)["y"], y))
    if name == "out/stage/patch_embed":
        return model.patch_embed(x)
    if name == "out/stage/timestep_sinusoid":
        return timestep_code(t)
    streams = model.embed(x, t, prepared)
    if name == "out/stage/cond":
        return streams["img"].c[:, 0]
    if name == "out/stage/block0":
        return model.blocks[0](streams, Seam())["img"].x
    raise AssertionError(f"{name} is new: say here what it is")


def dropped(g: Golden, model: torch.nn.Module, process: Process, y: Tensor) -> Tensor:
    """Labels as training sees them, by the project's own objective and the draws of the file."""
    objective = Diffusion(process, DiffusionConfig(label_dropout=g.config["class_dropout_prob"]))
    return objective.conditioning(model, {"x": g["in/x"], "y": y, "drop": torch.tensor(g.call["drop_u"])})["y"]


def guide(model: torch.nn.Module, process: Process, x: Tensor, t: Tensor, y: Tensor, scale: float, batched: bool) -> Tensor:
    """The released ``forward_with_cfg``: rows of the guided prediction, then the same with what the null pass says of the rest."""
    guidance = Guidance(scale=scale, channels=3, batched=batched)
    public = (t.double() + 1) / process.config.num_train_steps if isinstance(process, Gaussian) else 1 - t.double()
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        first = guided(model, process, guidance, Run(model), {"y": y}, model.null(y))(x, public)
    finally:
        handle.remove()
    null = seen[0].chunk(2)[1] if batched else seen[1]
    return torch.cat([first, torch.cat([first[:, :3], null[:, 3:]], 1)])
