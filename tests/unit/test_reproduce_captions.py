"""Experiments on captions: protocols are whole and fit their time, starts are what they say, a tiny run of each comes to a verdict."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ditkit.backbones.pixart import PixArt
from ditkit.bundle import BundleConfig
from ditkit.core.config import read_data
from ditkit.core.errors import ConfigError
from ditkit.eval.counters import count_forward
from ditkit.eval.scene_reader import SceneReader
from ditkit.pipeline import Pipeline
from ditkit.reproduce import readings
from ditkit.reproduce.costs import networks
from ditkit.reproduce.plan import _part, evaluation, plan
from ditkit.reproduce.protocol import Protocol, load_protocol, merged, protocols
from ditkit.reproduce.readings import MISSING, Captions
from ditkit.reproduce.runner import reproduce
from ditkit.reproduce.started import started
from ditkit.reproduce.starts import FromDiT, Reconfigured
from ditkit.reproduce.summary import summary

NAMES = ("pixart-alpha", "pixart-sigma", "lumina-t2x", "qihoo-t2x", "families")
TINY = {  # claims of a tiny run, and the bases that it trains
    "pixart-alpha": (("tables",), 3),
    "pixart-sigma": (("at-the-swap", "quality"), 3),
    "lumina-t2x": (("shown", "repeated"), 1),
    "qihoo-t2x": (("global",), 2),
    "families": (("object",), 2),
}
ENCODER = {"name": "bytes", "config": {"dim": 16, "depth": 1, "num_heads": 2, "byte_dim": 4, "max_length": 20}}


def part_of(backbone: str, config: dict[str, Any], encoder: dict[str, Any] | None, channels: int = 3) -> Pipeline:
    """A pipeline of an untrained network on 8 x 8 pictures."""
    from ditkit.conditioning import encoder_from
    from ditkit.core import registry

    torch.manual_seed(0)
    cls: Any = registry.get("backbones", backbone)
    model = cls(**{"input_size": (8, 8), "in_channels": 3, "out_channels": channels, **config}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    card: dict[str, Any] = {
        "backbone": {"name": backbone, "config": model.config.to_dict()},
        "process": {"name": "gaussian" if channels == 6 else "flow"},
        "data": {"name": "scenes", "config": {"size": 8}, "shape": [3, 8, 8]},
        "sampling": {"solver": "ddim" if channels == 6 else "euler"},
    }
    if encoder is not None:
        model.encoder = encoder_from(**encoder)
        card["encoder"] = encoder
    return Pipeline(model, BundleConfig.parse(card))


# ---- protocols --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_default_part_fits_twenty_minutes(name: str) -> None:
    assert plan(load_protocol(name)).everything <= 20 * 60


def test_pixart_from_nothing_is_given_as_much_work_as_the_dit_and_its_captions() -> None:
    protocol = load_protocol("pixart-alpha")

    def work(base: str) -> float:
        trainer = protocol.recipe_of(base, 0).trainer
        return evaluation(*_part(protocol, base))[0] * trainer.steps * trainer.batch_size

    assert work("scratch-total") == pytest.approx(work("dit") + work("given"), rel=0.01)
    assert work("scratch") == work("given")
    assert work("given-100") == work("random-100")


@pytest.mark.parametrize(("name", "bases"), [("pixart-sigma", ["none", "mean", "random"]), ("qihoo-t2x", ["full", "proxies", "silent"])])
def test_what_is_compared_trains_equally_long(name: str, bases: list[str]) -> None:
    protocol = load_protocol(name)
    assert len({str(protocol.recipe_of(b, 0).trainer) for b in bases}) == 1


def test_silent_proxies_are_the_only_weights_that_rest() -> None:
    from ditkit.train.build import choose_trainable

    protocol = load_protocol("qihoo-t2x")
    pipe = part_of("pt_dit", {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "window": (2, 2), "text_dim": 16}, ENCODER)
    choose_trainable(pipe.eager, protocol.recipe_of("silent", 0).trainable)
    resting = {n.split(".")[2] for n, p in pipe.eager.named_parameters() if not p.requires_grad}
    assert resting == {"proxy", "visual", "visual_out"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arms": {"mean-0": {"start": "maen"}}}, "maen"),
        ({"starts": {"mean": {"kind": "form"}}}, "kind"),
        ({"claims": {"quality": {"metric": "frechet"}}}, "frechet"),
        ({"arms": {"mean": {"size": 64}}}, "size"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    values = read_data(protocols()["pixart-sigma"])
    values.pop("full")
    with pytest.raises(ConfigError, match=named):
        Protocol.parse(merged(values, change))


@pytest.mark.parametrize("name", ["pixart-sigma", "qihoo-t2x"])
def test_the_multiply_adds_that_a_check_wants_are_saved(name: str) -> None:
    for check in load_protocol(name).costs.values():
        whole, small = (count_forward(net).macs for net in networks(check, "meta"))
        assert check.least_macs_saved <= 1 - small / whole < check.least_macs_saved + 0.1


# ---- starts -----------------------------------------------------------------------------------------------------------------


def test_a_pixart_from_a_dit_computes_what_the_dit_does_at_its_time_and_with_random_tables_does_not() -> None:
    dit = part_of("dit", {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "num_classes": 80}, None, channels=6)
    start = FromDiT.parse({"kind": "from_dit", "encoder": ENCODER, "config": {"embedding_init": "unit"}})
    given, random = started(dit, start, 0), started(dit, start.model_copy(update={"tables": "random"}), 0)
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 500.0)
    words = given.encoder.tokenize(["a red heart on a white background", "a dog"])
    cond = {"tokens": words.tokens, "mask": words.mask}
    with torch.no_grad():
        want = dit.eager(x, t, y=torch.full((2,), 80))
        assert torch.allclose(given.eager(x, t, **cond), want, atol=1e-4)
        assert not torch.allclose(random.eager(x, t, **cond), want, atol=1e-2)
    same = ("patch_embed.weight", "blocks.1.attn.qkv.weight")
    assert all(torch.equal(given.eager.state_dict()[n], random.eager.state_dict()[n]) for n in same)
    assert given.config.data.captions
    assert isinstance(given.eager, PixArt)


def test_compression_starts_as_means_or_at_random_and_keeps_all_weights() -> None:
    pipe = part_of(
        "pixart",
        {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "text_dim": 16, "text_length": 20, "null_caption": False},
        ENCODER,
    )
    start = Reconfigured.parse({"kind": "config", "config": {"kv_ratio": 2, "kv_blocks": [1]}})
    mean = started(pipe, start, 0).eager.state_dict()
    random = started(pipe, start.model_copy(update={"redraw": ("blocks.*.attn.down.conv",)}), 0).eager.state_dict()
    old, conv = pipe.eager.state_dict(), "blocks.1.attn.down.conv.weight"
    assert all(torch.equal(mean[n], v) for n, v in old.items())
    assert all(torch.equal(random[n], v) for n, v in old.items())
    assert (mean[conv] == 0.25).all()
    assert random[conv].unique().numel() > 16


def test_a_start_that_does_not_fit_says_why() -> None:
    pipe = part_of("pixart", {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "text_dim": 16, "text_length": 20}, ENCODER)
    with pytest.raises(ConfigError, match="has no place"):
        started(pipe, Reconfigured.parse({"kind": "config", "config": {"depth": 1}}), 0)
    with pytest.raises(ConfigError, match="matches no new module"):
        started(pipe, Reconfigured.parse({"kind": "config", "config": {"kv_ratio": 2, "kv_blocks": [1]}, "redraw": ["x"]}), 0)
    with pytest.raises(ConfigError, match="allowed: a dit"):
        started(pipe, FromDiT.parse({"kind": "from_dit", "encoder": ENCODER}), 0)


# ---- readings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader fitted to 64 pictures: blind, and there in a second."""
    monkeypatch.setattr(readings.SceneReader, "load", partial(SceneReader.load, num_pictures=64))


def test_rows_are_what_the_scores_say_of_each_picture(small_reader: None) -> None:
    from ditkit.eval.scene_scores import Found, Reading

    protocol = load_protocol("families")
    real = Captions(protocol)
    text = ["a red heart on a white background", "a red heart above a blue club on a white background"]
    one, other = Found("heart", "blue", 0.5, 0.2), Found("club", "blue", 0.5, 0.8)
    real.reader.read = lambda x: [Reading((one, other), "white"), Reading((one, other), "white")]  # type: ignore[method-assign]
    rows = real.read(torch.zeros(2, 3, 64, 64), text)
    assert rows["object"].tolist() == [1, 1]
    assert rows["color"].tolist() == [0, 0.5]
    assert rows["relation"].tolist() == [MISSING, 1]
    assert rows["extra"].tolist() == [1, 0]
    assert set(real.read(torch.zeros(1, 3, 32, 32), text[:1])) == {"object", "color", "extra"}


# ---- all of it --------------------------------------------------------------------------------------------------------------


def tiny(name: str, claims: tuple[str, ...]) -> dict[str, Any]:
    """The package's protocol with some of its claims, its numbers made small: the same bases, starts and arms. Of families only
    Hunyuan-DiT, which has two texts."""
    values = read_data(protocols()[name])
    values.pop("full")
    trainer = {"steps": 1, "batch_size": 2, "warmup_steps": 0, "device": "cpu", "save_every": 10}
    world = {"length": 8, "size": 16}
    values = merged(values, {"num_samples": 65, "held_out": 4, "draws": 1, "timed": 1, "resamples": 100, "data_config": world})
    values["recipe"] = merged(values["recipe"], {"trainer": trainer})
    for base in values["bases"].values():
        if "trainer" in base:
            base["trainer"] = {"warmup_steps": 1}
    for arm in values["arms"].values():
        if arm.get("measure") == "samples":
            arm["num_inference_steps"] = 1
        if arm.get("size"):
            arm["size"] = 32
    values |= {"claims": {n: values["claims"][n] for n in claims}, "shared": list(values["bases"]), "costs": {}}  # each base once
    if name == "families":
        for claim in values["claims"].values():
            claim["comparisons"] = [c for c in claim["comparisons"] if c["method"].startswith("hunyuan")]
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_run_comes_to_verdicts(name: str, tmp_path: Path, small_reader: None) -> None:
    claims, trained = TINY[name]
    values = tiny(name, claims)
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    found, _, figure = reproduce(path, tmp_path / "out", store=tmp_path / "bases", progress=False)
    assert tuple(c.name for c in found.claims) == claims
    assert {r.arm for r in found.rows} == {a for c in found.protocol.claims.values() for a in c.arms}
    assert len(found.protocol.needed()) == trained == len(list((tmp_path / "bases").glob("*/base.json")))
    assert np.isfinite([v for r in found.rows for v in r.metrics.values()]).all()
    assert figure.is_file()
    assert claims[0] in summary(found)
