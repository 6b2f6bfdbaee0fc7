"""A run of the trainer that takes a second, for tests of training and resuming."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ditkit.core.files import folder_hash, read_tensors, write_json
from ditkit.train.logs import read_log
from ditkit.train.recipe import Recipe


def tiny_recipe(sections: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    """A DiT of width 16 on the digits, on the CPU, 6 steps of 8 samples.

    Args:
        sections: of the recipe, instead of the tiny ones.
        trainer: values of the trainer.
    """
    values: dict[str, Any] = {
        "backbone": {"name": "dit", "config": {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}},
        "process": {"name": "flow"},
        "sampling": {"solver": "euler", "num_inference_steps": 2, "guidance": {"scale": 2.0}},
        "trainer": {
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "ema_decay": 0.5,
            "device": "cpu",
            "log_every": 1,
            "save_every": 100,
            "sample_every": 0,
            "validate_every": 0,
            "validation_samples": 16,
            **trainer,
        },
    }
    return Recipe.parse({**values, **(sections or {})})


def run_in_child(recipe: dict[str, Any], folder: str, kill_at: int = 0) -> None:
    """Train to the end in this process, or die by SIGKILL at the ``kill_at``-th thing done to a file of ``folder``.

    What is done to files before the end is counted in ``folder``.count.
    """
    from ditkit.train import train

    events = _FileEvents(folder, kill_at)
    sys.addaudithook(events)
    train(Recipe.parse(recipe), folder, progress=False)
    events.kill_at = 0
    Path(folder + ".count").write_text(str(events.seen))


class _FileEvents:
    """Python's audit events for opening, renaming, removing and making files below a folder."""

    names = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def __init__(self, folder: str, kill_at: int) -> None:
        self.folder, self.kill_at, self.seen = folder, kill_at, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self.names and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder + "/"):
            self.seen += 1
            if self.seen == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def comparable(folder: str | Path) -> dict[str, Any]:
    """What must not depend on interruptions: the bits of the last checkpoint's tensors, the bundle's hash, the log without times."""
    folder = Path(folder)
    last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    timed = ("images_per_second", "mfu", "data_wait", "peak_flops")
    log = [{k: v for k, v in e.items() if k not in timed} for e in read_log(folder / "log.jsonl") if e["event"] != "resume"]
    return {
        "tensors": {(p.name, n): t.numpy().tobytes() for p in sorted(last.glob("*.safetensors")) for n, t in read_tensors(p).items()},
        "bundle": folder_hash(folder),
        "log": log,
    }


def peak_in_child(recipe: dict[str, Any], folder: str) -> None:
    """Train, and write the most memory that this process ever had, in bytes, to ``folder``.peak."""
    import resource

    run_in_child(recipe, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(folder + ".peak").write_text(str(peak))


def rows_in_child(recipe: dict[str, Any], folder: str, steps: int) -> None:
    """Write what each row of this process sees in the first steps, as hashes of its noise and time, to ``folder``/rank-R.json."""
    from ditkit.train.distributed import connect
    from ditkit.train.loop import Training

    world = connect("cpu")
    training = Training(Recipe.parse(recipe), Path(folder), world)
    seen = []
    for step in range(steps):
        tensors = training.batches(step).tensors
        rows = zip(tensors["noise"].numpy(), tensors["time"].numpy())
        seen.append([hashlib.sha256(noise.tobytes() + time.tobytes()).hexdigest() for noise, time in rows])
    write_json(Path(folder) / f"rank-{world.rank}.json", seen)
    world.close()
