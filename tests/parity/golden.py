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


def load_dit(g: Golden) -> torch.nn.Module:
    """The DiT (or SiT) of a file with released names, through the project's own tables."""
    from ditkit.backbones.dit import DiT
    from ditkit.interop import dit
    from ditkit.interop.tables import Renamed, load_all

    arguments = {k: g.config[k] for k in dit.Constructor.model_fields if k in g.config}
    model = DiT(dit.Constructor(**arguments).to_ours())
    weights = {name.removeprefix("w/"): g[name] for name in g.starting("w/")}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    model.load_state_dict(load_all(Renamed(str(g.path), theirs, weights.__getitem__, dit.official_table(model.config), ours)))
    return model.eval()
