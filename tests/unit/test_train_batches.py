"""What a step sees is a function of (seed, step) and the row: not of batch, split or process (case A25)."""

import numpy as np
import pytest
import torch

from ditkit import data
from ditkit.core.errors import DitkitError
from ditkit.train.batches import Batches, Draw, Prefetch, draw_rows


def draws(shape: tuple[int, ...]) -> dict[str, Draw]:
    return {"noise": Draw("normal", shape), "time": Draw("uniform")}


def no_draws(shape: tuple[int, ...]) -> dict[str, Draw]:
    return {}


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def test_the_digits_are_those_of_scikit_learn() -> None:
    whole = [data.load("digits", split) for split in ("train", "test")]
    assert [len(part) for part in whole] == [1437, 360]
    x = torch.cat([part.batch(np.arange(len(part)))["x"] for part in whole])
    y = torch.cat([part.batch(np.arange(len(part)))["y"] for part in whole])
    assert x.shape == (1797, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's table of classes
    assert float(((x + 1) * 8).sum()) == 561718  # of all pixels, 0 to 16


def test_unknown_data_are_refused() -> None:
    with pytest.raises(DitkitError, match="did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(DitkitError, match="split"):
        data.load("digits", "val")  # type: ignore[arg-type]


def test_every_epoch_is_a_permutation_and_epochs_follow_without_a_gap(digits: data.Dataset) -> None:
    batches = Batches(digits, no_draws, seed=0, batch_size=100)
    ids = np.concatenate([batches.ids(step) for step in range(30)])
    first, second = ids[:1437], ids[1437:2874]
    assert sorted(first) == sorted(second) == list(range(1437))
    assert (first != second).any()
    assert (first != np.arange(1437)).any()
    assert (Batches(digits, no_draws, seed=1, batch_size=100).ids(0) != batches.ids(0)).any()
    assert (Batches(digits, no_draws, seed=0, batch_size=100).ids(17) == batches.ids(17)).all()


def test_a25_two_processes_see_the_rows_of_one_and_share_none(digits: data.Dataset) -> None:
    one = Batches(digits, draws, seed=0, batch_size=8)
    two = [Batches(digits, draws, seed=0, batch_size=8, rank=rank, world=2) for rank in (0, 1)]
    for step in range(3):
        whole, parts = one(step), [b(step) for b in two]
        assert np.concatenate([p.ids for p in parts]).tolist() == whole.ids.tolist()
        for name in ("x", "y", "noise", "time"):
            assert torch.equal(torch.cat([p.tensors[name] for p in parts]), whole.tensors[name])
        assert not set(parts[0].tensors["noise"].flatten().tolist()) & set(parts[1].tensors["noise"].flatten().tolist())
        assert not set(parts[0].tensors["time"].tolist()) & set(parts[1].tensors["time"].tolist())


def test_rows_do_not_depend_on_the_batch_and_seeds_share_none() -> None:
    draw = Draw("normal", (4,))
    few, many = draw_rows(draw, 3, 5, "train.noise", range(2, 4)), draw_rows(draw, 3, 5, "train.noise", range(64))
    assert torch.equal(few, many[2:4])
    others = [draw_rows(draw, 4, 5, "train.noise", range(64)), draw_rows(draw, 3, 6, "train.noise", range(64))]
    others.append(draw_rows(draw, 3, 5, "validation.noise", range(64)))
    for other in others:
        assert not set(many.flatten().tolist()) & set(other.flatten().tolist())


def test_prefetching_changes_nothing(digits: data.Dataset) -> None:
    batches = Batches(digits, draws, seed=0, batch_size=8)
    ahead = Prefetch(batches, last=4)
    try:
        for step in (0, 1, 2, 3, 1):  # a step back is computed afresh
            assert torch.equal(ahead(step).tensors["noise"], batches(step).tensors["noise"])
    finally:
        ahead.close()
    assert ahead.waited > 0


def test_sets_that_change_from_step_to_step_are_told_the_step(digits: data.Dataset) -> None:
    class Shifted:
        name, shape, num_classes, labels = "shifted", (1, 8, 8), 10, digits.labels

        def __len__(self) -> int:
            return len(digits)

        def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
            return digits.batch(indices)

        def augmented(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, torch.Tensor]:
            return {"x": digits.batch(indices)["x"] + 100 * seed + step}

    batches = Batches(Shifted(), no_draws, seed=2, batch_size=4)
    assert torch.equal(batches(3).tensors["x"], digits.batch(batches.ids(3))["x"] + 203)
    assert torch.equal(batches.fixed(4)[0].tensors["x"], digits.batch(np.arange(4))["x"])


def test_a_batch_that_cannot_be_shared_out_is_refused(digits: data.Dataset) -> None:
    with pytest.raises(DitkitError, match="multiples of 6"):
        Batches(digits, no_draws, seed=0, batch_size=8, world=3, parts=2)
