"""Caption recall on made-up features whose answer is known."""

import numpy as np
import pytest

from ditkit.core.errors import DitkitError
from ditkit.eval.recall import caption_recall


def test_the_real_pictures_themselves_are_recalled() -> None:
    real = np.eye(6)
    found = caption_recall(real[:4], real, [0, 1, 2, 3], k=(1, 6))
    assert found.top == {1: 1.0, 6: 1.0}
    assert (found.num_samples, found.num_real) == (4, 6)
    assert found.chance == {1: 0.0, 6: 1.0}  # another caption's picture is never the nearest, and always among all


def test_order_of_nearness_decides() -> None:
    """On a circle, pictures at 0, 10, ..., 90 degrees: from 12 degrees the nearest are those at 10, 20, 0, 30."""
    angles = np.radians(np.arange(0, 100, 10))
    real = np.stack([np.cos(angles), np.sin(angles)], 1)
    sample = np.array([[np.cos(np.radians(12)), np.sin(np.radians(12))]] * 2)
    found = caption_recall(3.7 * sample, real, [1, 0], k=(1, 2, 3))  # their length does not matter
    assert found.top == {1: 0.5, 2: 0.5, 3: 1.0}


def test_chance_is_that_of_the_other_captions() -> None:
    """Samples that ignore their caption: all are picture 0, so caption 0 is recalled for everyone, the others never."""
    real = np.eye(5)
    found = caption_recall(np.repeat(real[:1], 5, 0), real, np.arange(5), k=(1,))
    assert found.top[1] == pytest.approx(1 / 5)
    assert found.chance[1] == pytest.approx(4 / 20)  # as asked 1, 2, 3, 4, the other caption 0 would have been right: 1 of 4 each


def test_chance_of_unrelated_features_is_k_over_the_number_of_pictures() -> None:
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(400, 20)), rng.normal(size=(400, 20))
    found = caption_recall(samples, real, np.arange(400), k=(1, 5, 40))
    for k, share in found.chance.items():
        assert share == pytest.approx(k / 400, rel=0.02)  # 399 of 400 captions for each sample: all but exact
        assert found.top[k] == pytest.approx(k / 400, abs=4 * np.sqrt(k / 400 / 400))


def test_an_extractor_that_sees_nothing_recalls_nothing() -> None:
    """Equally near pictures count against each other."""
    found = caption_recall(np.ones((3, 4)), np.ones((7, 4)), [0, 1, 2], k=(1, 5, 7))
    assert found.top == {1: 0.0, 5: 0.0, 7: 1.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"true": [0, 1]}, "one a sample"),
        ({"true": [0.0, 1.0, 2.0]}, "integers"),
        ({"true": [0, 1, 6]}, "0 to 5"),
        ({"true": [-1, 1, 2]}, "0 to 5"),
        ({"true": [2, 2, 2]}, "same caption"),
        ({"k": (0,)}, "1 to 6"),
        ({"k": (7,)}, "1 to 6"),
        ({"k": ()}, "1 to 6"),
        ({"samples": np.ones((3, 5))}, "same extractor"),
        ({"samples": np.full((3, 4), np.nan)}, "not finite in row 0"),
    ],
)
def test_wrong_inputs_are_named(changed: dict, said: str) -> None:
    values = {"samples": np.ones((3, 4)), "real": np.ones((6, 4)), "true": [0, 1, 2], **changed}
    with pytest.raises(DitkitError, match=said):
        caption_recall(**values)
