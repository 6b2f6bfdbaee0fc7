"""What a child process of the metrics' test does: its share of a set of features, gathered with the others'."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ditkit.eval.metrics import Moments, frechet_distance, gather_features, gather_moments


def gather(folder: str) -> None:
    """Reads ``part-RANK.npy`` and ``reference.npy``; writes the distance of all parts together, and their rows, to ``answer-RANK.json``."""
    rank = os.environ["RANK"]
    part, reference = (np.load(Path(folder) / name) for name in (f"part-{rank}.npy", "reference.npy"))
    dist.init_process_group("gloo")
    distance = frechet_distance(gather_moments(Moments.of(part)), Moments.of(reference))
    answer = {"distance": distance, "features": gather_features(part).tolist()}
    dist.destroy_process_group()
    (Path(folder) / f"answer-{rank}.json").write_text(json.dumps(answer))
