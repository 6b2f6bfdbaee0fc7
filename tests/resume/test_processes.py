"""Two gloo processes with sharded parameters against one: equal numbers, equal rows, and a run that survives the death of one."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit.core.files import read_tensors
from ditkit.testing import processes
from ditkit.testing.training import comparable, rows_in_child, run_in_child, tiny_recipe
from ditkit.train import Recipe, train
from ditkit.train.logs import read_log

pytestmark = pytest.mark.slow

TRAINER = {"steps": 6, "save_every": 2, "validate_every": 3, "sample_every": 6, "learning_rate": 1e-3, "grad_clip": 0.5}


def recipe(**trainer) -> dict:
    return tiny_recipe(**{**TRAINER, **trainer}).to_dict()


def train_with(size: int, folder: Path, **trainer) -> list[int]:
    """Train with ``size`` processes; returns their exit codes."""
    return finish(processes.world(size, run_in_child, recipe(**trainer), str(folder)))


def finish(children: list) -> list[int]:
    """Wait for all; once one has failed the others are ended, as torchrun does."""
    for child in children:
        child.join(25)
        if child.exitcode != 0:
            for other in children:
                other.terminate()
    for child in children:
        child.join(5)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in ditkit.from_pretrained(folder).model.parameters()])


def close(a: Path, b: Path) -> bool:
    """Losses, gradient norms and weights of two runs, to 1e-5."""
    x, y = weights(a), weights(b)
    return np.allclose(losses(a), losses(b), rtol=1e-5) and float((x - y).norm() / x.norm()) < 1e-5


def same(a: Path, b: Path) -> bool:
    """Losses, gradient norms and weights of two runs, bit for bit."""
    return losses(a) == losses(b) and torch.equal(weights(a), weights(b))


def losses(folder: Path) -> list[float]:
    events = read_log(folder / "log.jsonl")
    return [e[k] for e in events for k in ("loss", "grad_norm", "raw", "ema") if e["event"] in ("train", "validation") and k in e]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, which takes the halves of its batch in turn."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert processes.run(run_in_child, recipe(accumulation=2), str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    assert train_with(2, folder) == [0, 0]
    return folder


def test_two_processes_equal_one(tmp_path: Path, two: Path) -> None:
    train(Recipe.parse(recipe()), tmp_path / "run", progress=False)
    assert close(tmp_path / "run", two)


def test_two_processes_are_two_micro_batches_of_one_bit_for_bit(one: Path, two: Path) -> None:
    assert same(one, two)


def test_each_process_holds_half(two: Path) -> None:
    shards = sorted((two / "checkpoints" / "step-6").glob("shard-*.safetensors"))
    assert len(shards) == 2
    sizes = [shard.stat().st_size for shard in shards]
    assert max(sizes) < 1.3 * min(sizes)


def test_a25_two_processes_see_different_rows_the_same_as_one(tmp_path: Path) -> None:
    assert finish(processes.world(2, rows_in_child, recipe(), str(tmp_path), 3)) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    rows_in_child(recipe(), str(tmp_path), 3)
    whole = json.loads((tmp_path / "rank-0.json").read_text())
    for step in range(3):
        assert not set(first[step]) & set(second[step])
        assert first[step] + second[step] == whole[step]


def test_the_death_of_one_process_costs_nothing(tmp_path: Path, two: Path) -> None:
    folder = tmp_path / "run"
    children = processes.world(2, run_in_child, recipe(), str(folder), 0)
    while not (folder / "checkpoints" / "latest").exists():
        children[0].join(0.02)
    children[1].kill()
    assert finish(children)[1] == -signal.SIGKILL
    assert train_with(2, folder) == [0, 0]
    assert comparable(folder) == comparable(two)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_bit_for_bit(before: int, after: int, tmp_path: Path, one: Path, two: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two if before == 2 else one, folder)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    assert train_with(after, folder, accumulation=2 // after) == [0] * after
    assert same(folder, one)
    assert [e["step"] for e in read_log(folder / "log.jsonl") if e["event"] == "resume"] == [4]


def test_replicas_of_shards_and_recomputed_activations_change_no_bit(tmp_path: Path, one: Path) -> None:
    assert train_with(2, tmp_path / "run", replicas=2, activation_checkpointing="selective") == [0, 0]
    assert same(tmp_path / "run", one)


def test_a_lora_on_a_sharded_base(tmp_path: Path, one: Path) -> None:
    """A view is sharded as one module: what is frozen stays, what is learned equals one process bit for bit."""
    lora = {"base": str(one), "backbone": None, "process": None, "trainable": ["methods.*"]}
    lora["methods"] = [{"name": "lora", "config": {"rank": 2}}]
    folders = [tmp_path / str(size) for size in (1, 2)]
    for size, folder in zip((1, 2), folders):
        values = tiny_recipe(lora, steps=4, save_every=2, learning_rate=1e-2, accumulation=2 // size).to_dict()
        assert finish(processes.world(size, run_in_child, values, str(folder))) == [0] * size
    states = [read_tensors(folder / "methods" / "lora.safetensors") for folder in folders]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert all((folder / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes() for folder in folders)


def test_came_in_two_processes(tmp_path: Path) -> None:
    """Its factored state is sharded with the parameters; its sums over rows and of the clipping go over both processes.

    Against two micro-batches, whose gradients have the same bits: where a gradient is 0 but for rounding, a first step has its sign.
    """
    values = {"optimizer": "came", "learning_rate": 1e-3, "steps": 4, "validate_every": 0, "sample_every": 0}
    train(Recipe.parse(recipe(**values, accumulation=2)), tmp_path / "one", progress=False)
    assert train_with(2, tmp_path / "two", **values) == [0, 0]
    assert same(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-4")
    train(Recipe.parse(recipe(**values, accumulation=2)), tmp_path / "two", progress=False)
    assert same(tmp_path / "one", tmp_path / "two")


def test_two_processes_in_buckets_are_one_bit_for_bit(tmp_path: Path) -> None:
    """Both take their halves of a batch of one size, which differs from step to step."""
    for k, (height, width) in enumerate(((16, 16), (8, 32), (32, 8), (20, 20), (8, 30), (40, 10))):
        for i in range(4):
            path = tmp_path / "data" / f"class{i % 2}" / f"{k}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(10 * k + i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    own = {"data": {"name": str(tmp_path / "data"), "config": {"buckets": {"resolutions": [16], "multiple": 8}, "crop": "random"}}}
    values = tiny_recipe(own, steps=4, batch_size=4, learning_rate=1e-3)
    train(values.model_copy(update={"trainer": values.trainer.model_copy(update={"accumulation": 2})}), tmp_path / "one", progress=False)
    assert finish(processes.world(2, run_in_child, values.to_dict(), str(tmp_path / "two"))) == [0, 0]
    assert same(tmp_path / "one", tmp_path / "two")
