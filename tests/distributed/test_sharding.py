"""Views under FSDP2 (lesson 12): base + LoRA, teacher + student, pruned, on 2 gloo processes against one; and windows in strips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CASES = ["lora", "teacher_student", "pruned"]


@pytest.mark.timeout(180)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One test for all cases: starting two processes is most of it."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parent / "shard_worker.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())
    for case in CASES:
        found = results[case]
        assert found["off_is_base"], f"{case}: with no method active the sharded view is its base bit for bit"
        assert found["loss"] < 1e-5, case
        assert found["weights"] < 1e-5, case
        assert found["held"] <= 0.5 * found["whole"] * 1.05, f"{case}: each process holds its shards, nothing else"
        assert found["shared"], f"{case}: an update to a shared parameter is seen by teacher and student"
        assert found["state"], f"{case}: weights survive save and load"
    assert len(results["strips"]) == 9
    assert max(results["strips"].values()) < 1e-5, results["strips"]
    assert "2 processes share equally, 3 or more each" in results["thin"]
