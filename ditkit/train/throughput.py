"""How much of the machine a run uses: FLOPs of a step over what the device can do (model FLOP utilisation, MFU)."""

from __future__ import annotations

import torch

from ditkit.core.backbone import Backbone
from ditkit.eval.counters import count_forward
from ditkit.eval.roof import measure_roof

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
    """FLOP/s of the device: a GPU's data sheet, otherwise the best product of the model's own shapes, measured now (a second)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in DATASHEET.items():
            if known in name:
                return peak
    roof = measure_roof(count_forward(model, batch), device=device.type, dtype=dtype, rounds=3, max_shapes=2)
    return max(rate for kind, rate in roof.gemm.items() if kind != "int8")
