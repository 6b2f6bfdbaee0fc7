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
    """The DiT (or SiT) of a file with official names."""
    from ditkit.backbones.dit import DiT

    c = g.config
    size, channels = c["input_size"], c["in_channels"]
    model = DiT(
        input_size=(size, size) if isinstance(size, int) else tuple(size),
        in_channels=channels,
        out_channels=2 * channels if c.get("learn_sigma", True) else channels,
        patch_size=c["patch_size"],
        dim=c["hidden_size"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        num_classes=c["num_classes"],
        null_label=c["class_dropout_prob"] > 0,
    )
    names = {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "time.fc1",
        "t_embedder.mlp.2": "time.fc2",
        "y_embedder.embedding_table": "label",
        "adaLN_modulation.1": "ada",
        "attn.": "",
        "final_layer.linear": "final.proj",
        "final_layer.": "final.",
    }
    weights = {}
    for name in g.starting("w/"):
        if name == "w/pos_embed":
            continue
        new = name.removeprefix("w/")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        parts = new.split(".")
        if parts[0] == "blocks":
            new = ".".join([*parts[:2], "parts.img", *parts[2:]])
        weights[new] = g[name].flatten(1) if new == "patch_embed.weight" else g[name]
    model.load_state_dict(weights)
    return model.eval()
