"""A step that is not finite is skipped, counted and explained; three in a row end the run."""

import json

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.testing.training import tiny_recipe
from ditkit.train import loop, train
from ditkit.train.guards import Guard, TrainingStopped, first_non_finite
from ditkit.train.logs import read_log
from ditkit.train.objectives import Diffusion

INF, NAN = float("inf"), float("nan")


def test_three_in_a_row_are_hopeless_two_are_not() -> None:
    guard = Guard()
    assert [guard.judge(*v) for v in ((1.0, 1.0), (NAN, 1.0), (1.0, INF), (1.0, 1.0))] == ["", "not finite", "not finite", ""]
    guard.stop_if_hopeless(4, "")
    assert (guard.skipped, guard.in_a_row) == (2, 0)
    for _ in range(3):
        guard.judge(NAN, 1.0)
    with pytest.raises(TrainingStopped, match="step 7.*first non-finite: output of final"):
        guard.stop_if_hopeless(7, "output of final")


def test_spikes_are_judged_only_if_asked_and_with_history() -> None:
    steady = [(1.0 + 0.1 * (i % 2), 2.0) for i in range(64)]  # mean 1.05, sigma 0.05
    careless, careful, young = Guard(), Guard(spike_sigma=6.0), Guard(spike_sigma=6.0)
    for value in steady:
        assert careless.judge(*value) == careful.judge(*value) == ""
    assert careless.judge(100.0, 2.0) == ""
    assert young.judge(100.0, 2.0) == ""
    assert careful.judge(1.3, 2.0) == ""  # below 1.05 + 6 * 0.05
    assert careful.judge(1.5, 2.0) == "spike of the loss"
    assert careful.judge(1.0, 9.0) == "spike of the gradient norm"
    assert careful.skipped == 2
    again = Guard(spike_sigma=6.0)
    again.restore(json.loads(json.dumps(careful.state())))
    assert again == careful


def loss_of(model: DiT, scale: float = 1.0):
    x, t, cond = model.example()
    return lambda: scale * model(x, t, **cond).square().mean()


def test_the_first_place_that_is_not_finite_is_named() -> None:
    model = DiT.tiny()
    assert first_non_finite(model, loss_of(model)) == ""
    assert first_non_finite(model, loss_of(model, INF)) == "the loss, of a finite output"
    model.blocks[1].parts["img"].mlp.fc2.bias.data[0] = INF
    assert first_non_finite(model, loss_of(model)) == "parameter blocks.1.parts.img.mlp.fc2.bias"
    model = DiT.tiny()
    model.blocks[1].parts["img"].proj.weight.data.fill_(3e38)
    assert first_non_finite(model, loss_of(model)) == "output of blocks.1.parts.img.proj"
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = DiT.tiny()
    model.final.proj.weight.register_hook(lambda g: g * NAN)
    assert first_non_finite(model, loss_of(model)) == "gradient of final.proj.weight"


class Poisoned(Diffusion):
    """Infinite at the steps whose batches hold a chosen sample."""

    bad: frozenset[float] = frozenset()

    def loss(self, model, batch):
        losses = super().loss(model, batch)
        if float(batch["time"][0]) in self.bad:
            losses.loss.mul_(INF)  # type: ignore[misc]
        return losses


def poison(monkeypatch: pytest.MonkeyPatch, folder, steps: list[int], **trainer) -> loop.Training:
    """A run whose loss is infinite at ``steps``."""
    times = loop.Training(tiny_recipe(**trainer), folder, loop.connect("cpu")).batches
    monkeypatch.setattr(Poisoned, "bad", frozenset(float(times(s).tensors["time"][0]) for s in steps))
    monkeypatch.setattr("ditkit.train.objectives.OBJECTIVES", {"diffusion": Poisoned})


@pytest.mark.parametrize("on_device", [False, True])
def test_a_bad_step_leaves_the_weights_alone(on_device: bool, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, tmp_path, [2, 3])
    monkeypatch.setattr(loop.Training, "_judged_on_device", property(lambda self: on_device))
    seen = {}
    update = loop.Training.update

    def watch(self, batch):
        update(self, batch)
        seen[self.step] = [
            t.detach().clone() for t in (*self.model.parameters(), *self.ema.shadow.values(), *self.optimizers.tensors().values())
        ]

    monkeypatch.setattr(loop.Training, "update", watch)
    result = train(tiny_recipe(log_every=6), tmp_path / "run", progress=False)
    same = [all(map(torch.equal, seen[i], seen[i + 1])) for i in range(5)]
    assert same == [False, True, True, False, False]
    assert result.skipped == 2
    skipped = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "skipped"]
    assert [e["step"] for e in skipped] == [3, 4]
    assert skipped[0]["samples"] == loop.Training(tiny_recipe(), tmp_path, loop.connect("cpu")).batches.ids(2).tolist()
    assert skipped[0]["first"] == "the loss, of a finite output"
    assert skipped[0]["loss"] == "inf"


def test_three_bad_steps_end_the_run_and_say_where(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, tmp_path, [3, 4, 5])
    with pytest.raises(TrainingStopped, match="3 steps in a row, up to step 6"):
        train(tiny_recipe(save_every=2, steps=8), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-4\n"


def test_judging_on_the_device_changes_no_bit(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for on_device in (False, True):
        monkeypatch.setattr(loop.Training, "_judged_on_device", property(lambda self, v=on_device: v))
        train(tiny_recipe(log_every=4), tmp_path / str(on_device), progress=False)
        weights.append((tmp_path / str(on_device) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
