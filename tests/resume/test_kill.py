"""SIGKILL at random points, saves included: the run goes on as if nothing had happened, and a loadable checkpoint is always left.

Each kill strikes at a random open, rename or removal of a file of the run, or at a random time. DITKIT_KILLS sets their number.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from ditkit.core.files import verify_manifest
from ditkit.testing import processes
from ditkit.testing.training import comparable, run_in_child, tiny_recipe

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("DITKIT_KILLS", "5"))
A_RUN = 5  # kills of one run
RECIPE = tiny_recipe(steps=12, save_every=2, sample_every=4, validate_every=3, log_every=3).to_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, int, float]:
    """What the run comes to, how many file events it has, how long it takes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    processes.run(run_in_child, tiny_recipe(steps=1).to_dict(), str(folder.with_name("warm")))
    start = time.perf_counter()
    assert processes.run(run_in_child, RECIPE, str(folder)) == 0
    seconds = time.perf_counter() - start
    return comparable(folder), int(Path(f"{folder}.count").read_text()), seconds


def loadable(folder: Path) -> list[int]:
    """Steps of the checkpoints whose every file is as the manifest says."""
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        verify_manifest(path)
        found.append(int(path.name.removeprefix("step-")))
    return sorted(found)


def kill_one(folder: Path, choice: random.Random, events: int, seconds: float) -> bool:
    """Go on with the run and kill it somewhere; False if it came to its end before."""
    if choice.random() < 0.7:
        return processes.run(run_in_child, RECIPE, str(folder), choice.randrange(1, events)) == -signal.SIGKILL
    child = processes.start(run_in_child, RECIPE, str(folder))
    child.join(choice.uniform(0, seconds))
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", range(-(-KILLS // A_RUN)))
def test_resumes_bit_identical_after_kills(number: int, tmp_path: Path, uninterrupted: tuple[dict, int, float]) -> None:
    expected, events, seconds = uninterrupted
    choice, folder, saved = random.Random(number), tmp_path / "run", 0
    kills = 0
    while kills < min(A_RUN, KILLS - number * A_RUN):
        if (folder / "checkpoints" / "step-12").exists():
            folder, saved = tmp_path / f"run-{kills}", 0  # it had come to its end: the next kill needs a new run
        kills += kill_one(folder, choice, events, seconds)
        steps = loadable(folder)
        assert not saved or steps, "a kill left no loadable checkpoint"
        assert max(steps, default=0) >= saved, "a checkpoint that was there is gone"
        saved = max(steps, default=0)
    assert processes.run(run_in_child, RECIPE, str(folder)) == 0
    assert comparable(folder) == expected
