"""Bases trained side by side: the weights are those of one after the other, and signals, errors and dead processes lose nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from ditkit.core.errors import DitkitError
from ditkit.reproduce.bases import Base, BaseStore
from ditkit.reproduce.protocol import Protocol, load_protocol, merged
from ditkit.reproduce.training import Workers, levels, shares, train_bases

NEW = {"backbone": {"name": "dit", "config": {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}}, "process": {"name": "flow"}}
TINY = {
    "title": "tiny",
    "paper": "none",
    "written": "2026-01-01",
    "seeds": [0, 1, 2],
    "num_samples": 66,
    "draws": 2,
    "resamples": 100,
    "recipe": {
        "trainer": {"steps": 3, "batch_size": 8, "ema_decay": 0.5, "device": "cpu", "dtype": "float32", "log_every": 1},
    },
    "bases": {"whole": NEW, "half": {"base": "@whole:random:1"}, "small": {**NEW, "trainer": {"batch_size": 4}}},
    "shared": ["whole"],
    "arms": {name: {"base": name, "measure": "loss"} for name in ("whole", "half", "small")},
    "claims": {
        "cut": {
            "kind": "paired",
            "hypothesis": "half the blocks are better",
            "metric": "mse",
            "relative": True,
            "smallest_effect": 0.5,
            "expected": {"between_seeds": 0.1, "within_seed": 0.1, "why": "a test"},
            "comparisons": [{"method": name, "baseline": "whole"} for name in ("half", "small")],
        }
    },
}
PROTOCOL = Protocol.parse(TINY)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def digests(found: dict[tuple[str, int], Base]) -> dict[tuple[str, int], str]:
    return {key: hashlib.sha256((base.folder / "model.safetensors").read_bytes()).hexdigest() for key, base in found.items()}


def test_threads_are_divided_among_what_stands_side_by_side() -> None:
    assert levels(PROTOCOL) == {"whole": 0, "half": 1, "small": 0}  # one shared base, three of `small`
    assert shares(PROTOCOL, 1) == shares(PROTOCOL, 2) == {"whole": 1, "half": 1, "small": 1}
    assert shares(PROTOCOL, 13) == {"whole": 3, "half": 4, "small": 3}
    alone = Protocol.parse(merged(TINY, {"shared": ["whole", "half", "small"]}))
    assert shares(alone, 2) == {"whole": 1, "half": 2, "small": 1}


@pytest.mark.parametrize("name", ["pixart-sigma", "qihoo-t2x", "ras", "harmonica"])
def test_a_level_never_asks_for_more_than_there_is(name: str) -> None:
    protocol = load_protocol(name)
    at = levels(protocol)
    assert all(at[b] == 0 for b in at if not protocol.builds_on(b))
    for level in set(at.values()):
        least = min(shares(protocol, 2)[b] for b in at if at[b] == level)
        assert least == (2 if [b in protocol.shared for b in at if at[b] == level] == [True] else 1)


@pytest.mark.slow
def test_the_weights_are_those_of_one_after_the_other_on_one_thread(tmp_path: Path, two_threads: None) -> None:
    """Also of what builds on another base; and what is there is found again."""
    store = BaseStore(tmp_path / "beside")
    beside, _ = train_bases(PROTOCOL, store, progress=False)
    assert {(b.threads, b.reused) for b in beside.values()} == {(1, False)}
    again, _ = train_bases(PROTOCOL, store, progress=False)
    assert {(b.threads, b.reused) for b in again.values()} == {(1, True)}
    assert [b.seconds for b in again.values()] == [b.seconds for b in beside.values()]
    torch.set_num_threads(1)
    in_turn, _ = train_bases(PROTOCOL, BaseStore(tmp_path / "in-turn"), progress=False)
    assert digests(beside) == digests(again) == digests(in_turn)
    assert len(set(digests(beside).values())) == 7
    assert {key: base.hash for key, base in beside.items()} == {key: base.hash for key, base in in_turn.items()}


@pytest.mark.slow
def test_what_a_process_cannot_train_this_one_does(
    tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that dies (of memory, say) or does not know a part that only the caller's script registered."""

    def dies(self: Workers) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", "exit(3)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._all.append(process)
        return process

    monkeypatch.setattr(Workers, "_begin", dies)
    found, _ = train_bases(PROTOCOL, BaseStore(tmp_path), progress=False)
    assert len(set(digests(found).values())) == 7
    assert "whole, seed 0: the process that trained it ended (3); once more, in this process" in caplog.text


@pytest.mark.slow
def test_an_error_is_the_one_that_would_be_raised_here(tmp_path: Path, two_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    wrong = Protocol.parse(merged(TINY, {"bases": {"half": {"base": "@whole:random:7"}}}))
    with pytest.raises(DitkitError, match="7 blocks of 2"):
        train_bases(wrong, BaseStore(tmp_path), progress=False)
    assert "half, seed 0: DitkitError: 7 blocks of 2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_of_them_after_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """Also where the process that asked for them is killed without a word."""
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(merged(TINY, {"recipe": {"trainer": {"steps": 1_000_000}}}), sort_keys=False))
    command = [sys.executable, "-m", "ditkit.cli.main", "reproduce", str(tmp_path / "long.yaml"), "--no-progress"]
    command += ["--out", str(tmp_path / "out"), "--bases", str(tmp_path / "bases")]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as asked:
        await_(lambda: len([p for p in (tmp_path / "bases").glob("*/log.jsonl") if '"train"' in p.read_text()]) == 2, asked)
        workers = psutil.Process(asked.pid).children()
        assert len(workers) == 2
        asked.send_signal(number)
        _, said = asked.communicate(timeout=50)
        _, alive = psutil.wait_procs(workers, timeout=50)
    assert not alive
    if number != signal.SIGKILL:
        assert (asked.returncode, said.splitlines()[-1]) == (143, "stopped; the same command goes on")
    assert len(list((tmp_path / "bases").glob("*/checkpoints/*/manifest.json"))) >= 2


def await_(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
