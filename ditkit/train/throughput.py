"""How much of the machine a run uses: FLOPs of a step over what the device can do (model FLOP utilisation, MFU)."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from ditkit.core.backbone import Backbone
from ditkit.eval.counters import count_forward

DATASHEET = {  # dense bfloat16 FLOP/s, from the makers' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def training_flops(model: Backbone) -> float:
    """FLOPs of one sample's forward and backward pass: three times the forward's (each product has two in the backward)."""
    return 3.0 * count_forward(model, 1).flops


def peak_flops(model: Backbone, batch: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device: a GPU's data sheet, otherwise the model's own largest product at its best of some, measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in DATASHEET.items():
            if known in name:
                return peak
    rows, k, n = max(count_forward(model, 1).linears, key=lambda shape: shape[0] * shape[1] * shape[2])
    x, w = torch.ones(rows * batch, k, device=device, dtype=dtype), torch.ones(n, k, device=device, dtype=dtype)
    return 2.0 * len(x) * k * n / min(_seconds(x, w) for _ in range(6))


def _seconds(x: torch.Tensor, w: torch.Tensor) -> float:
    start = time.perf_counter()
    out = F.linear(x, w)
    float(out[0, 0])  # waits for a GPU
    return time.perf_counter() - start
