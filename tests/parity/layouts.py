"""What the tests of diffusers' layouts share: a model's configuration in our words, its weights by a table, and weights that are wrong."""

import torch

from ditkit.interop.tables import Renamed


def config_of(family, model):
    """Our configuration of a live diffusers model; ``family``: its module in ``ditkit.interop``."""
    return family.config_from_diffusers({k: v for k, v in model.config.items() if not k.startswith("_")})


def source(backbone, weights, table, config):
    """Foreign weights under our names. Raises WeightsError where they are not what the table says."""
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in backbone(config).state_dict().items()}
    return Renamed("weights", {k: tuple(v.shape) for k, v in weights.items()}, weights.__getitem__, table, ours)


CHANGES = ("missing", "extra", "misshapen")


def damaged(weights, name, change):
    """The weights, with one tensor ``missing``, one ``extra`` beside it, or itself ``misshapen`` or ``differing``."""
    value = weights[name]
    if change == "missing":
        return {k: v for k, v in weights.items() if k != name}
    new = {"extra": (name + "_2", value), "misshapen": (name, value[:-1]), "differing": (name, value + 1)}
    return {**weights, new[change][0]: new[change][1]}
