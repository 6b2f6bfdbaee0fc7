"""Bases of experiments that build on others, with fewer blocks."""

from __future__ import annotations

import pytest

import ditkit
from ditkit.core.errors import ConfigError
from ditkit.reproduce import cuts
from ditkit.reproduce.protocol import Protocol, load_protocol


@pytest.mark.parametrize("how", ["importance", "error", "random", "loss"])
def test_cuts_of_experiments(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "SAMPLES", 8)
    keep = cuts.choose(ditkit.from_pretrained("digits"), f"{how}:5", "digits", seed=1)
    assert len(keep) == 5
    assert set(keep) < set(range(6))


def test_a_cut_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="random:3"):
        cuts.choose(ditkit.from_pretrained("digits"), "magnitude:3", "digits", seed=0)


def test_an_experiment_builds_on_bases_that_stand_before() -> None:
    protocol = load_protocol("tinyfusion")
    assert protocol.builds_on("distilled") == ["@search:learned", "@whole"]
    assert protocol.recipe_of("distilled", 0, {"@search:learned": "a", "@whole": "b"}).base == "a"
    values = protocol.to_dict()
    values["bases"] = dict(reversed(values["bases"].items()))
    with pytest.raises(ConfigError, match="builds on '@search:learned'"):
        Protocol.parse(values)
