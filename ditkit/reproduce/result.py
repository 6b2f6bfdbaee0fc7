"""What an experiment found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ditkit.eval.bench import plain
from ditkit.eval.roof import Machine

from .protocol import Name, Protocol
from .verdicts import ClaimResult


@dataclass(frozen=True)
class Row:
    """One arm and seed, with what it cost. ``macs``: multiply-adds of one evaluation of one sample."""

    arm: str
    label: str
    base: str
    base_hash: str
    seed: int
    measure: str
    num_inference_steps: int
    evaluations: int  # of the network, for one sample
    macs: int
    parameters: int
    trained_seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Reproduction:
    """What an experiment found."""

    name: str
    part: Name
    protocol: Protocol
    protocol_sha256: str
    date: str
    machine: Machine
    commit: str
    command: str
    others_before: float | None
    others_after: float | None
    seconds: dict[str, float]  # wall time of this run: training, measuring, judging, all
    bases: dict[str, int]  # how many were trained by this run, and how many were there
    real: dict[str, Any]  # what real test pictures score
    rows: tuple[Row, ...]
    claims: tuple[ClaimResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written."""
        values = {
            **vars(self),
            "protocol": self.protocol.to_dict(),
            "machine": asdict(self.machine),
            "rows": [asdict(r) for r in self.rows],
            "claims": [asdict(c) for c in self.claims],
            "verdicts": {c.name: c.verdict for c in self.claims},
        }
        return dict(plain(values))
