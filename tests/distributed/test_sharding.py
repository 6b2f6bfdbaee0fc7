"""Views under FSDP2 (lesson 12): base + LoRA, teacher + student, pruned, on 2 gloo processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("shard") / "out.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(Path(__file__).parent / "shard_worker.py"),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", ["lora", "teacher_student", "pruned"])
def test_two_processes_equal_one(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["off_is_base"], "with no method active the sharded view is its base bit for bit"
    assert found["loss"] < 1e-5
    assert found["weights"] < 1e-5
    assert found["held"] <= 0.5 * found["whole"] * 1.05, "each process holds its shards, nothing else"
    assert found["shared"], "an update to a shared parameter is seen by teacher and student"
    assert found["state"], "weights survive save and load"
