"""CLEAR's window over 4 processes is the window in one: halos are exchanged exactly (arXiv 2412.16112, section 3.4)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
def test_four_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "strips_worker.py"), str(tmp_path / "store"), str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads((tmp_path / "out.json").read_text())
    assert len(errors) == 2 * 3 * 4
    assert max(errors.values()) < 1e-6, errors
