"""What an experiment will cost on two cores, computed before it runs: every second follows from the protocol and a few numbers.

An upper bound of the work (methods are counted as if they saved nothing), at the rate of a machine with nothing else to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ditkit import data
from ditkit.bundle import Part, backbone_config, find_bundle, open_bundle
from ditkit.conditioning import encoder_from
from ditkit.diffusion.process import process_from
from ditkit.eval.counters import count_forward, count_run
from ditkit.train.build import fitted
from ditkit.train.recipe import Recipe

from .costs import CHECK_REPEATS, CHECK_WARMUPS, REPEATS, WARMUPS, networks
from .measures import BATCH
from .protocol import Arm, Protocol, name_of
from .started import started_part
from .training import levels, shares

RATE = 1.5 * 45e9  # FLOP a second of two AVX2 cores that sample with networks this small: 45e9 on one of them, and half as much again
TRAINING = 27e9  # FLOP a second of a thread that trains one, beside another that does: 24 to 34e9 were measured
CORES, SECOND = 2, 1.6  # two trainings of a thread each, side by side; one on both cores is so much faster than on one
BLOCK = 1e-3  # seconds of Python for a block's forward; three times that with its gradients
UPDATE = 0.02  # seconds of Python for an update: batch, optimiser, averaging
CONVERT = 10.0  # seconds until an engine or the compiler has a network as small as an experiment's, for each shape of batch and each seed
COMPILE = 40.0  # seconds until a step graph of a dozen blocks is there
PICTURE = 1e-3  # seconds to render a picture of scenes
READER = 100.0  # seconds to fit a reader of scenes
REAL = 30.0  # seconds to render real pictures and find their principal components
DISTANCE = 3e-3  # seconds of a Fréchet distance of 64 features


@dataclass(frozen=True)
class Plan:
    """Seconds, by what they are for. ``training``: of each base, all its seeds together."""

    training: dict[str, float]
    shared: tuple[str, ...]
    sampling: float
    losses: float
    timing: float
    checks: float
    judging: float

    @property
    def everything(self) -> float:
        """Of a run that finds nothing trained."""
        return sum(self.training.values()) + self.sampling + self.losses + self.timing + self.checks + self.judging

    @property
    def own(self) -> float:
        """Of a run that finds the shared bases."""
        return self.everything - sum(self.training[name] for name in self.shared if name in self.training)

    def lines(self) -> list[str]:
        """In words."""
        found = [f"{'training ' + name:<28}{seconds:7.0f} s" for name, seconds in self.training.items() if seconds]
        rest = {k: getattr(self, k) for k in ("sampling", "losses", "timing", "checks", "judging")}
        found += [f"{name:<28}{seconds:7.0f} s" for name, seconds in rest.items() if seconds]
        return [*found, f"{'all':<28}{self.everything / 60:7.1f} min, {self.own / 60:.1f} with the shared bases at hand"]


def plan(protocol: Protocol) -> Plan:
    """Of a protocol. Nothing is trained; networks are on the meta device."""
    needed = protocol.needed()
    parts = {name: _part(protocol, name) for name in needed}
    macs, depth = {}, {}
    for name, found in parts.items():
        macs[name], depth[name] = evaluation(*found)
    training, at = {}, levels(protocol)
    for name in needed:
        times = 1 if name in protocol.shared else len(protocol.seeds)
        sooner = CORES if name in at and shares(protocol, CORES)[name] == 1 else SECOND
        training[name] = times * _training(protocol, name, macs, depth[name]) / sooner
    arms = [protocol.arms[a] for names in needed.values() for a in names]
    sampled = [a for a in arms if a.measure == "samples"]
    macs |= {_sized(a): evaluation(*parts[a.base], a.size)[0] for a in sampled if a.size}
    losses = [a for a in arms if a.measure == "loss"]
    seeds, held = len(protocol.seeds), min(protocol.held_out, len(data.load(protocol.data, "test", **protocol.data_config)))
    calls = 1 + WARMUPS + REPEATS  # counted, then timed
    equal = [protocol.arms[u] for a in sampled if a.equal_time_to for u in (a.equal_time_to,)]
    timing = sum(calls * _sampling(protocol, a, protocol.timed, macs, depth) for a in sampled)
    timing += sum((WARMUPS + REPEATS) * 2 * _sampling(protocol, a, protocol.timed, macs, depth) for a in equal)
    shapes = 1 + bool(protocol.num_samples > BATCH and protocol.num_samples % BATCH)
    timing += CONVERT * (1 + seeds * shapes) * sum("compile" in a.methods for a in sampled)
    return Plan(
        training=training,
        shared=protocol.shared,
        sampling=sum(seeds * _sampling(protocol, a, protocol.num_samples, macs, depth) for a in sampled),
        losses=sum(seeds * protocol.draws * (held * 2 * macs[a.base] / RATE + depth[a.base] * BLOCK) for a in losses),
        timing=timing,
        checks=sum(_check(c) for c in protocol.costs.values()),
        judging=(REAL if protocol.reader is None else READER * bool(sampled)) + _judging(protocol),
    )


def evaluation(backbone: Part, encoder: Part | None, side: int = 0) -> tuple[int, int]:
    """Multiply-adds of an evaluation for one picture, of ``side`` if given, and blocks, of a network without methods; with the encoder that
    is learned along.
    """
    return _evaluation(*(None if part is None else json.dumps(part.to_dict(), sort_keys=True) for part in (backbone, encoder)), side)


@lru_cache(maxsize=64)
def _evaluation(backbone: str, encoder: str | None, side: int) -> tuple[int, int]:
    cls, values = backbone_config(Part.parse(json.loads(backbone)))
    with torch.device("meta"):
        net = cls(values).eval()  # type: ignore[call-arg]
    x, t, cond = net.example(1)
    if encoder is not None:
        words = encoder_from(**json.loads(encoder))
        tokens = words.tokenize(["a word"])
        net.encoder, cond = words.to("meta"), {"tokens": tokens.tokens, "mask": tokens.mask}
    if side:
        x = torch.zeros(1, x.shape[1], side, side)
    return count_forward(net, inputs=(x, t, cond)).macs, len(net.blocks)


def _sized(arm: Arm) -> str:
    return f"{arm.base} at {arm.size}" if arm.size else arm.base


def _part(protocol: Protocol, base: str) -> tuple[Part, Part | None]:
    """Backbone of a base and its settings, and the encoder that is learned along."""
    if bundle := protocol.bundle_of(base):
        return _bundled(bundle)
    recipe = protocol.recipe_of(base, protocol.seeds[0])
    if recipe.backbone is None:
        text = str(recipe.base)
        part, encoder = _part(protocol, name_of(text)) if text.startswith("@") else _bundled(text)
        if start := protocol.starts.get(text.partition(":")[2]):
            return started_part(part, encoder, start)
        kept = _kept(protocol, text, int(part.config["depth"]))
        return Part(name=part.name, config={**part.config, "depth": kept}), encoder
    noise = recipe.process or Part(name="flow")
    train, process = data.load(recipe.data.name, "train", **recipe.data.config), process_from(noise.name, noise.config)
    told = encoder_from(recipe.encoder.name, recipe.encoder.config) if recipe.encoder else None
    cls, _ = backbone_config(Part(name=recipe.backbone.name))
    return Part(name=recipe.backbone.name, config={**fitted(cls, train, process, told), **recipe.backbone.config}), recipe.encoder


def _bundled(name: str) -> tuple[Part, Part | None]:
    config = open_bundle(find_bundle(name)).config
    return config.backbone, config.encoder


def _kept(protocol: Protocol, text: str, depth: int) -> int:
    """How many blocks ``@NAME:CUT`` has."""
    how = text.partition(":")[2]
    if how == "learned":
        searched = protocol.recipe_of(name_of(text), protocol.seeds[0])
        n, m = next(part.config["groups"][0] for part in searched.methods if part.name == "tinyfusion")
        return depth * n // m
    return int(how.partition(":")[2]) if how else depth


def _training(protocol: Protocol, base: str, macs: dict[str, int], depth: int) -> float:
    """Seconds of one seed's training on a thread."""
    if protocol.bundle_of(base):
        return 0.0
    recipe = protocol.recipe_of(base, protocol.seeds[0])
    work = forwards(recipe) * macs[base]
    teacher = recipe.objective.config.get("teacher")
    if teacher:
        work += macs[name_of(teacher)] if teacher.startswith("@") else macs[base]
    trainer = recipe.trainer
    drawn = trainer.batch_size * PICTURE * (protocol.data == "scenes")
    return trainer.steps * (drawn + trainer.batch_size * 2 * work / TRAINING + forwards(recipe) * depth * BLOCK + UPDATE)


def forwards(recipe: Recipe) -> float:
    """How many forward passes a sample of an update is worth; a backward pass is two, one where no weight of the network learns."""
    config: dict[str, Any] = recipe.objective.config
    if recipe.objective.name == "harmonica":  # teacher, student and its backward pass at each step; and the weights of the steps
        steps = recipe.methods[0].config["num_inference_steps"]
        refresh = 0.0 if config.get("proxy") == "none" else steps * (steps + 1) / config.get("refresh", 50)
        return (1 if config.get("guidance_scale") == 1 else 2) * (3 * steps + refresh)
    return 4.0 if recipe.objective.name == "l2c" else 3.0


def _sampling(protocol: Protocol, arm: Arm, num: int, macs: dict[str, int], depth: dict[str, int]) -> float:
    """Seconds of ``num`` pictures of an arm; one of equal time takes no more than the arm that it is equal to."""
    if arm.equal_time_to:
        arm = protocol.arms[arm.equal_time_to]
    evaluations = arm.num_inference_steps * (1 if arm.guidance_scale == 1 else 2)
    return evaluations * (num * 2 * macs[_sized(arm)] / RATE + -(-num // BATCH) * depth[arm.base] * BLOCK)


def _check(check: Any) -> float:
    cost = sum(count_run(u, check.num_steps, check.batch).macs for u in networks(check, "meta"))
    return 2 * COMPILE * bool(check.compile) + (CHECK_WARMUPS + CHECK_REPEATS) * 2 * cost / RATE


def _judging(protocol: Protocol) -> float:
    """The bootstrap: a distance for each draw, seed and arm."""
    arms = sum(len(c.arms) for c in protocol.claims.values() if c.metric == "frechet")
    return arms * len(protocol.seeds) * protocol.resamples * DISTANCE
