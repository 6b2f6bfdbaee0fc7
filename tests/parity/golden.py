"""Golden files: what reference implementations computed. The folder is DITKIT_GOLDEN, by default tests/golden."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("DITKIT_GOLDEN") or Path(__file__).parents[1] / "golden")


class Golden:
    """One file: ``g["in/x"]`` is a tensor, ``g.config`` and ``g.call`` are its metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as f:
            self.metadata = f.metadata()
            self._tensors = {name: f.get_tensor(name) for name in f.keys()}
        self.names = sorted(self._tensors)
        self.config, self.call = (json.loads(self.metadata.get(key, "{}")) for key in ("config", "call"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def starting(self, prefix: str) -> list[str]:
        """Names that begin with ``prefix``."""
        return [name for name in self.names if name.startswith(prefix)]


def open_golden(name: str) -> Golden:
    """The file ``name``; the calling test module is skipped if the folder lacks it."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there", allow_module_level=True)
    return Golden(path)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; shapes must be equal."""
    assert got.shape == want.shape, (got.shape, want.shape)
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def load_dit(g: Golden, without: tuple[str, ...] = ()) -> torch.nn.Module:
    """The DiT (or SiT) of a file with official names, through the project's own table; ``without``: as in ``load_diffusers``."""
    from ditkit.backbones.dit import DiT
    from ditkit.interop.dit import Constructor, official_table
    from ditkit.interop.tables import Renamed, load_all

    config = Constructor.parse({k: v for k, v in g.config.items() if k in Constructor.model_fields}).to_ours()
    model = DiT(config)
    found = {n.removeprefix("w/"): tuple(g[n].shape) for n in g.starting("w/") if not any(part in n for part in without)}
    expect = {name: tuple(u.shape) for name, u in model.state_dict().items()}
    source = Renamed("golden", found, lambda name: g["w/" + name], official_table(config), expect)
    model.load_state_dict(load_all(source))
    return model.eval()


def load_diffusers(g: Golden, name: str, values: dict, without: tuple[str, ...] = ()) -> torch.nn.Module:
    """The backbone ``name`` of a file with diffusers' names; ``without``: parts of names that belong to a method."""
    from ditkit.core.registry import get
    from ditkit.interop.families import family
    from ditkit.interop.tables import Renamed, load_all

    tables = family(name)
    model = get("backbones", name)(tables.config_from_diffusers(values, "golden", False))
    found = {n.removeprefix("w/"): tuple(g[n].shape) for n in g.starting("w/") if not any(part in n for part in without)}
    expect = {n: tuple(u.shape) for n, u in model.state_dict().items()}
    source = Renamed("golden", found, lambda n: g["w/" + n], tables.diffusers_table(model.config), expect)
    model.load_state_dict(load_all(source))
    return model.eval()
