"""A resume needs no more memory than a start (case A27)."""

from pathlib import Path

import pytest

from ditkit.testing import processes
from ditkit.testing.training import peak_in_child, tiny_recipe


def peak(folder: Path, steps: int) -> int:
    network = {"backbone": {"name": "dit", "config": {"dim": 256, "depth": 3, "num_heads": 4, "patch_size": 4}}}
    recipe = tiny_recipe(network, steps=steps, batch_size=2, validation_samples=2)
    assert processes.run(peak_in_child, recipe.to_dict(), str(folder)) == 0
    return int(Path(f"{folder}.peak").read_text())


@pytest.mark.slow
def test_a27_the_peak_of_a_resume(tmp_path: Path) -> None:
    fresh = peak(tmp_path / "run", steps=1)
    files = {p.stem: p.stat().st_size for p in (tmp_path / "run" / "checkpoints" / "step-1").glob("*.safetensors")}
    assert sum(files.values()) > 50e6
    resumed = peak(tmp_path / "run", steps=2)
    assert resumed <= fresh + max(files.values())
