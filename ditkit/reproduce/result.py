"""What an experiment found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ditkit.eval.bench import plain
from ditkit.eval.roof import Machine

from .costs import CheckResult
from .protocol import Name, Protocol
from .verdicts import ClaimResult


@dataclass(frozen=True)
class Row:
    """One arm and seed, with what it cost. ``macs``: multiply-adds of one evaluation of one sample by the base alone."""

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
    trained_threads: int
    metrics: dict[str, float]
    methods: str = ""
    sample_macs: float | None = None  # counted, of one picture, methods included; measured with the first seed's base, as all of these
    sample_seconds: float | None = None  # median, of one picture in a batch
    macs_saved: float | None = None  # share of the baseline's
    time_saved: float | None = None
    report: dict[str, Any] = field(default_factory=dict)  # what its methods say of a run


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
    checks: tuple[CheckResult, ...] = ()
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)  # learned tables, by arm and seed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written."""
        values = {
            **vars(self),
            "protocol": self.protocol.to_dict(),
            "machine": asdict(self.machine),
            "rows": [asdict(r) for r in self.rows],
            "claims": [asdict(c) for c in self.claims],
            "checks": [asdict(c) for c in self.checks],
            "verdicts": {c.name: c.verdict for c in self.claims},
        }
        return dict(plain(values))
