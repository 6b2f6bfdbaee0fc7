"""Noise by counter: a picture's numbers are its own."""

import numpy as np
import pytest
import torch

from ditkit.core.errors import DitkitError
from ditkit.diffusion import noise


def test_a_row_depends_on_its_seed_alone():
    whole = noise.normal([7, 8, 9], 3, "step", (2, 5))
    for k, seed in enumerate([7, 8, 9]):
        assert torch.equal(whole[k : k + 1], noise.normal([seed], 3, "step", (2, 5)))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    counter, key = ([np.array([word], np.uint64) for word in values] for values in (counter, key))
    assert noise.philox(counter, key)[:, 0].tolist() == words


def test_a_longer_row_starts_with_the_shorter_one():
    for draw in (noise.normal, noise.uniform):
        assert torch.equal(draw([3], 0, "a", (100,))[:, :17], draw([3], 0, "a", (17,)))


def test_seeds_steps_and_purposes_are_independent():
    rows = torch.cat([noise.normal([s], step, purpose, (4096,)) for s in (0, 1) for step in (0, 1) for purpose in ("start", "step")])
    off_diagonal = torch.corrcoef(rows) - torch.eye(len(rows))
    assert off_diagonal.abs().max() < 5 / 4096**0.5


def test_normal_numbers_are_normal():
    x = noise.normal([0], 0, "start", (200_001,))[0].double()  # an odd count
    assert abs(x.mean()) < 5 / len(x) ** 0.5
    assert abs(x.var() - 1) < 5 * (2 / len(x)) ** 0.5
    sorted_x = x.sort().values
    distance = (torch.special.ndtr(sorted_x) - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()
    assert distance < 1.95 / len(x) ** 0.5  # Kolmogorov and Smirnov at 0.1 %
    assert x.isfinite().all()
    assert noise.normal([0], 0, "start", (2,)).dtype == torch.float32


def test_uniform_numbers():
    u = noise.uniform(range(50_000), 0, "time")
    assert u.shape == (50_000,)
    assert u.dtype == torch.float32
    assert (u >= 0).all()
    assert (u < 1).all()
    assert abs(float(u.mean()) - 0.5) < 5 / (12 * len(u)) ** 0.5
    assert (u * 2**24 == (u * 2**24).round()).all()


def test_source_is_like_its_tensor():
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    draw = noise.source([4, 5], x)
    assert draw(1, "step").shape == x.shape
    assert draw(1, "step").dtype == x.dtype
    assert torch.equal(draw(1, "step"), draw(1, "step"))
    with pytest.raises(DitkitError, match="2 seeds for a batch of 3"):
        noise.source([4, 5], torch.zeros(3, 1))


def test_nothing_to_draw():
    assert noise.normal([], 0, "start", (2, 3)).shape == (0, 2, 3)


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_out_of_range(seed, step):
    with pytest.raises(DitkitError, match="0 to 2"):
        noise.normal([seed], step, "start", (1,))
