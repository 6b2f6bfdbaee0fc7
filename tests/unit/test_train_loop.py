"""The loop: EMA never in the trained model (A13), accumulation, previews (A06), methods, and what it leaves behind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit.cli import main as cli
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.files import read_tensors
from ditkit.core.view import compile_view
from ditkit.testing.training import tiny_recipe
from ditkit.train import loop, train
from ditkit.train.checkpoint import Checkpoints
from ditkit.train.distributed import World
from ditkit.train.logs import Log, cut_log, read_log


def run(folder: Path, **trainer) -> loop.TrainResult:
    return train(tiny_recipe(**trainer), folder, progress=False)


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of the last checkpoint."""
    last = (folder / "checkpoints" / "latest").read_text().strip()
    return read_tensors(folder / "checkpoints" / last / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_log(folder / "log.jsonl") if e["event"] == kind]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without previews, validation or checkpoints on the way."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(folder)
    return folder


def test_a13_previews_validation_and_saves_leave_the_raw_weights_alone(tmp_path: Path, plain: Path) -> None:
    run(tmp_path / "often", sample_every=2, validate_every=2, save_every=2)
    assert equal(raw(tmp_path / "often"), raw(plain))
    assert [e["step"] for e in events(tmp_path / "often", "samples")] == [2, 4, 6]


def test_a13_a_preview_that_raises_is_reported_and_nothing_else(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pipe):
        with torch.no_grad():
            next(pipe.model.parameters()).zero_()
        raise RuntimeError("out of paper")

    monkeypatch.setattr(loop, "sample_grid", fail)
    run(tmp_path / "run", sample_every=2, save_every=2)
    assert equal(raw(tmp_path / "run"), raw(plain))
    assert [(e["step"], e["error"]) for e in events(tmp_path / "run", "samples failed")] == [(s, "out of paper") for s in (2, 4, 6)]


def test_a13_a_checkpoint_written_during_a_preview_goes_on_from_raw_weights(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    trainings = []
    begin = loop.Training.begin
    monkeypatch.setattr(loop.Training, "begin", lambda self, start: (trainings.append(self), begin(self, start))[1])

    def save_and_die(pipe):
        trainings[-1].save()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "sample_grid", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", sample_every=3)
    monkeypatch.undo()
    result = run(tmp_path / "run")
    assert result.resumed_from == 3
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_a06_samples_that_are_not_finite_are_reported_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = loop.sample_grid

    def poisoned(pipe):
        weight = pipe.model.blocks[1].parts["img"].proj.bias
        old = weight.clone()
        weight.data[0] = float("inf")
        try:
            return grid(pipe)
        finally:
            weight.data.copy_(old)

    monkeypatch.setattr(loop, "sample_grid", poisoned)
    assert run(tmp_path / "run", sample_every=6).finished
    (failure,) = events(tmp_path / "run", "samples failed")
    assert "step 1 of 2" in failure["error"]
    assert "blocks.1.parts.img.proj" in failure["error"]
    assert not list((tmp_path / "run").glob("samples/*"))


def test_eight_micro_batches_of_one_are_one_of_eight(tmp_path: Path) -> None:
    folders = [tmp_path / "1x8", tmp_path / "8x1"]
    for folder, accumulation in zip(folders, (1, 8)):
        run(folder, accumulation=accumulation, learning_rate=1e-3)
    a, b = map(raw, folders)
    losses = [[e["loss"] for e in events(folder, "train")] for folder in folders]
    assert np.allclose(*losses, rtol=1e-6)
    drift = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm() / torch.cat([a[k].flatten() for k in a]).norm()
    assert drift < 1e-6


def test_gradients_of_micro_batches_add_up() -> None:
    grads = []
    for accumulation in (1, 8):
        training = loop.Training(tiny_recipe(accumulation=accumulation), Path("none"), loop.connect("cpu"))
        for p in training.model.parameters():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        training.backward(training.batches(0))
        grads.append(torch.cat([p.grad.flatten() for p in training.model.parameters()]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-6


def test_the_result_is_a_bundle_of_the_averaged_weights(plain: Path) -> None:
    pipe = ditkit.from_pretrained(plain)
    last = (plain / "checkpoints" / "latest").read_text().strip()
    ema = read_tensors(plain / "checkpoints" / last / "ema.safetensors")
    assert all(torch.equal(value, ema[f"ema.{name}"]) for name, value in pipe.model.state_dict().items())
    assert not equal({f"model.{n}": t for n, t in pipe.model.state_dict().items()}, raw(plain))
    assert pipe.config.data.labels == tuple("0123456789")
    assert pipe.config.process.name == "flow"
    assert pipe([3], progress=False).x.shape == (1, 1, 8, 8)


def test_pictures_while_training_are_the_bundle_s(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2, sample_every=2)
    picture = Image.open(tmp_path / "run" / "samples" / "step-0000002.png")
    assert picture.size == (356, 356)  # ten labels, ten of each, 8 pixels and a gap, four times enlarged
    again = ditkit.from_pretrained(tmp_path / "run")(list(range(10)), num_images=100, seed=0, progress=False)
    again.save(tmp_path / "again.png", zoom=4)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "again.png")))


def test_validation_is_at_fixed_times_and_noise(tmp_path: Path) -> None:
    training = loop.Training(tiny_recipe(), tmp_path, loop.connect("cpu"))
    (first,), (second,) = training._held_out.fixed(16), training._held_out.fixed(16)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    assert torch.equal(training._held_out.fixed(8)[0].tensors["noise"], first.tensors["noise"][:8])
    a, b = (loop.validation_loss(training.model, training.objective, [first], size) for size in (16, 5))
    assert a == pytest.approx(b, rel=1e-6)
    assert training.model.training


def test_another_process_and_methods(tmp_path: Path) -> None:
    """A LoRA is trained on a base bundle: the base stays as it is, the bundle holds both."""
    gaussian = {"process": {"name": "gaussian"}, "sampling": {"solver": "ddim", "num_inference_steps": 2}}
    train(tiny_recipe(gaussian, steps=2), tmp_path / "base", progress=False)
    lora = {"base": str(tmp_path / "base"), "backbone": None, "process": None, "trainable": ["methods.*"]}
    lora |= {"methods": [{"name": "lora", "config": {"rank": 2}}], "sampling": gaussian["sampling"]}
    recipe = tiny_recipe(lora, steps=3, save_every=2)
    assert train(recipe, tmp_path / "lora", progress=False).finished
    assert (tmp_path / "lora" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    learnt = read_tensors(tmp_path / "lora" / "methods" / "lora.safetensors")
    assert any(bool(t.abs().max() > 0) for n, t in learnt.items() if "b" in n.rsplit(".", 1)[-1].lower())
    assert all(n.startswith("model.methods.") for n in raw(tmp_path / "lora"))
    assert [m.label for m in ditkit.from_pretrained(tmp_path / "lora").model.attached] == ["lora"]
    (tmp_path / "lora" / "checkpoints" / "step-3").rename(tmp_path / "gone")
    train(tiny_recipe(gaussian, steps=3), tmp_path / "base2", progress=False)
    with pytest.raises(ConfigError, match="other values of base"):
        train(tiny_recipe({**lora, "base": str(tmp_path / "base2")}, steps=3, save_every=2), tmp_path / "lora", progress=False)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block.*matches no parameter"):
        train(tiny_recipe({"trainable": ["block.*"]}), tmp_path, progress=False)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(how: str, tmp_path: Path, plain: Path) -> None:
    run(tmp_path / "run", activation_checkpointing=how)
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_compiling_is_for_one_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 processes"):
        loop.Training(tiny_recipe(compile="block"), tmp_path, World(0, 2, torch.device("cpu")))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while it captures
def test_a_compiled_run_is_the_same_run(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "compile_view", lambda model, grain, **kw: compile_view(model, grain, backend="eager", **kw))
    run(tmp_path / "run", compile="step")
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_bfloat16_is_a_matter_of_arithmetic(tmp_path: Path, plain: Path) -> None:
    run(tmp_path / "run", dtype="bfloat16", steps=2)
    weights = raw(tmp_path / "run")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    first = [next(e["loss"] for e in events(f, "train")) for f in (plain, tmp_path / "run")]
    assert first[0] == pytest.approx(first[1], rel=2e-2)
    assert not equal(weights, raw(plain))


STRUCK = """
import os, signal, sys
from pathlib import Path
from ditkit.testing.training import tiny_recipe
from ditkit.train import loop, train

update = loop.Training.update

def strike(self, batch):
    update(self, batch)
    if self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)

loop.Training.update = strike
before = signal.getsignal(signal.SIGTERM)
result = train(tiny_recipe(), Path(sys.argv[1]), progress=False)
assert (result.finished, result.step) == (False, 3), result
assert signal.getsignal(signal.SIGTERM) is before
"""


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path, plain: Path) -> None:
    """In a process of its own: a signal that is not caught ends the one it is sent to."""
    done = subprocess.run([sys.executable, "-c", STRUCK, str(tmp_path / "run")], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "run" / "config.json").exists()
    result = run(tmp_path / "run")
    assert (result.finished, result.resumed_from) == (True, 3)
    assert equal(raw(tmp_path / "run"), raw(plain))
    assert [e["step"] for e in events(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_finished_and_can_be_extended(tmp_path: Path, plain: Path) -> None:
    run(tmp_path / "run", steps=4)
    again = run(tmp_path / "run", steps=4)
    assert (again.resumed_from, again.step, again.finished) == (4, 4, True)
    assert run(tmp_path / "run", steps=6).resumed_from == 4
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_starting_anew_loses_nothing(tmp_path: Path, plain: Path) -> None:
    run(tmp_path / "run", steps=2)
    result = train(tiny_recipe(), tmp_path / "run", resume=False, progress=False)
    assert result.resumed_from is None
    assert (tmp_path / "run" / "earlier-1" / "checkpoints" / "step-2").is_dir()
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match="other values of trainer.batch_size, trainer.seed;"):
        run(tmp_path / "run", steps=3, seed=1, batch_size=4, learning_rate=0.1)


def test_a_changed_learning_rate_is_said_and_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "run", steps=2)
    run(tmp_path / "run", steps=3, learning_rate=0.1)
    assert "other values of trainer.learning_rate" in caplog.text
    assert [e["learning_rate"] for e in events(tmp_path / "run", "train")] == [0.01, 0.01, 0.1]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "run", steps=4, save_every=2)
    path = tmp_path / "run" / "checkpoints" / "step-4" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert run(tmp_path / "run", save_every=2).resumed_from == 2
    assert "step-4 is damaged" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-4").is_dir()
    assert equal(raw(tmp_path / "run"), raw(plain))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", save_every=1, keep=3)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 3, loop.connect("cpu"))
    assert sorted(checkpoints.steps()) == [4, 5, 6]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.state["versions"]["torch"] == torch.__version__
    assert (newest.folder / "recipe.yaml").is_file()


def test_the_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    with Log(tmp_path, 0, 4, quiet=True) as log:
        for step in range(1, 5):
            log.event("train", step, loss=float(step))
        log.event("resume", 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # killed while writing
    cut_log(tmp_path / "log.jsonl", 2)
    assert [(e["event"], e["step"]) for e in read_log(tmp_path / "log.jsonl")] == [("train", 1), ("train", 2)]
    (tmp_path / "log.jsonl").write_text('{"event"\n{"event": "train", "step": 1}\n')
    with pytest.raises(DitkitError, match="line 1"):
        list(read_log(tmp_path / "log.jsonl"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--backbone.config", "{dim: 16, depth: 1, num_heads: 2, patch_size: 4}", "--trainer.batch_size", "4", "--trainer.steps", "2"]
    small += ["--sampling.num_inference_steps", "1", "--trainer.device", "cpu", "--trainer.validation_samples", "8", "--no-progress"]
    assert cli.main(["train", "digits", *small]) == 0
    assert "runs/digits: 2 steps, validation loss" in capsys.readouterr().out
    assert ditkit.from_pretrained("runs/digits").config.data.name == "digits"
    assert list((tmp_path / "runs" / "digits" / "tensorboard").iterdir())
