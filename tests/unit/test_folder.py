"""Image folders: kinds, splits, orientation, the transform of arXiv:2105.05233, and augmentation as a pure function."""

import io
import logging
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit import data
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.data.folder import ImageFolder
from ditkit.data.transforms import Transform, apply, cover, cut, mirrored, quiet


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def left_black_right_white(side=16):
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 255
    return pixels


def folder(root, **options):
    return ImageFolder(root, progress=False, **options)


# --- kinds ---


def test_class_folders_give_labels_in_order_of_their_names(tmp_path):
    for i, name in enumerate(("zebra/1.png", "ant/1.png", "ant/deep/2.png", "bee/x.PNG")):
        save(tmp_path / name, noise(8, 8, i))
    found = data.load(str(tmp_path), progress=False)
    assert (found.labels, found.num_classes, found.shape, len(found)) == (["ant", "bee", "zebra"], 3, (3, 8, 8), 4)
    batch = found.batch(np.arange(4))
    assert batch["y"].tolist() == [0, 0, 1, 2]
    assert batch["y"].dtype == torch.int64
    want = torch.from_numpy(noise(8, 8, 0)).permute(2, 0, 1) / 127.5 - 1  # zebra was written first
    torch.testing.assert_close(batch["x"][3], want, rtol=0, atol=1e-6)
    assert (batch["x"].min() >= -1, batch["x"].max() <= 1, batch["x"].dtype) == (True, True, torch.float32)


def test_captions_stand_beside_their_pictures_in_any_folder(tmp_path):
    for i, name in enumerate(("a", "sub/b", "sub/c.d")):
        save(tmp_path / f"{name}.png", noise(8, 8, i))
        (tmp_path / f"{name}.txt").write_text(f" text {i}\n")
    found = folder(tmp_path)
    assert (found.kind, found.labels, found.has_captions) == ("captions", [], True)
    assert found.captions(np.array([2, 0])) == ["text 2", "text 0"]
    assert set(found.batch(np.arange(3))) == {"x"}


def test_a_folder_of_neither_kind_is_refused_and_can_be_unlabelled(tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    save(tmp_path / "b" / "c.png", noise(8, 8))
    with pytest.raises(DitkitError, match=r"no captions, and not all are in class folders \(a\.png\).*kind='unlabelled'"):
        folder(tmp_path)
    found = folder(tmp_path, kind="unlabelled")
    assert (len(found), found.num_classes) == (2, 0)
    with pytest.raises(DitkitError, match="has no captions"):
        found.captions(np.arange(1))
    loose = folder(tmp_path, kind="classes")
    assert [(f.name, f.reason) for f in loose.scan.faults] == [("a.png", "is in no class folder")]


def test_hidden_files_are_left_out_and_loops_of_links_end(tmp_path):
    save(tmp_path / "c" / "a.png", noise(8, 8))
    save(tmp_path / "c" / "._a.png", noise(8, 8))
    (tmp_path / "c" / "again").symlink_to(tmp_path, target_is_directory=True)
    found = folder(tmp_path)
    assert [p.sample.picture.name for p in found.pictures] == ["c/a.png"]


def test_options_are_strict(tmp_path):
    with pytest.raises(ConfigError, match="'resolutoin'.*did you mean 'resolution'"):
        folder(tmp_path, resolutoin=64)
    with pytest.raises(DitkitError, match="is no folder"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(DitkitError, match="digits.*a path"):
        data.load("digit")


# --- splits ---


def test_folders_named_after_splits_are_the_splits_and_share_their_numbers(tmp_path):
    for name in ("train/ant/1.png", "train/zebra/2.png", "val/zebra/3.png"):
        save(tmp_path / name, noise(8, 8))
    train, test = (data.load(str(tmp_path), split, progress=False) for split in ("train", "test"))
    assert train.labels == test.labels == ["ant", "zebra"]
    assert test.batch(np.arange(1))["y"].tolist() == [1]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/1.png", "car/2.png"):
        save(tmp_path / name, noise(8, 8))
    assert folder(tmp_path).labels == ["car", "train"]


def test_held_out_pictures_are_chosen_by_content(tmp_path):
    for i in range(60):
        save(tmp_path / "c" / f"{i:02d}.png", noise(4, 4, i))
        save(tmp_path / "c" / f"copy{i:02d}.png", noise(4, 4, i))
    train, test = (folder(tmp_path, split=s, test_fraction=0.3) for s in ("train", "test"))
    assert len(train) + len(test) == 120
    assert 0.1 < len(test) / 120 < 0.5
    assert not {p.sha256 for p in train.pictures} & {p.sha256 for p in test.pictures}
    before = {p.sample.picture.name for p in test.pictures}
    save(tmp_path / "c" / "new.png", noise(4, 4, 999))
    after = {p.sample.picture.name for p in folder(tmp_path, split="test", test_fraction=0.3).pictures}
    assert after - {"c/new.png"} == before
    with pytest.raises(DitkitError, match="split 'test' is empty.*test_fraction"):
        folder(tmp_path, split="test")


# --- A16: orientation ---


def test_a16_orientation_is_applied_everywhere(tmp_path):
    """A 64 x 32 JPEG with orientation 6 is 32 wide and 64 high: its left side is shown at the top."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "c" / "phone.jpg", pixels, exif=exif, quality=95)
    found = folder(tmp_path)
    (picture,) = found.pictures
    assert (picture.width, picture.height) == (32, 64)  # of the scan
    assert found.shape == (3, 64, 32)
    x = found.batch(np.arange(1))["x"][0]
    assert x[:, :28].min() > 0.9
    assert x[:, 36:].max() < -0.9
    square_one = folder(tmp_path, resolution=32)
    assert square_one.batch(np.arange(1))["x"].shape == (1, 3, 32, 32)
    assert square_one.batch(np.arange(1))["x"][0, :, :12].min() > 0.9  # the crop is of the upright picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_every_orientation_shows_the_same_picture(tmp_path, orientation, suffix):
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8, :4], upright[8:, :4], upright[:8, 4:] = 255, 90, 170
    undo = {
        1: lambda u: u, 2: lambda u: u[:, ::-1], 3: lambda u: u[::-1, ::-1], 4: lambda u: u[::-1],
        5: lambda u: u.swapaxes(0, 1), 6: lambda u: np.rot90(u, 1), 7: lambda u: u[::-1, ::-1].swapaxes(0, 1), 8: lambda u: np.rot90(u, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](upright))
    options = {"png": {}, "jpg": {"quality": 100}, "webp": {"lossless": True}}[suffix]
    save(tmp_path / "c" / f"a.{suffix}", stored, exif=exif, **options)
    found = folder(tmp_path)
    assert (found.pictures[0].width, found.pictures[0].height) == (8, 16)
    got = (found.batch(np.arange(1))["x"][0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - upright).max() < 6


# --- colour ---


def read(image, channels=3, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return apply(Transform(channels=channels), file.getvalue())


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    x = read(image)
    assert x[:, 0, 0].tolist() == [1, -1, -1]
    assert (x[:, 1, 1] == 1).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (read(palette, transparency=0) == 1).all()


def test_sixteen_bits_keep_their_brightness():
    """Value 32896 of 65535 is byte 128; Pillow's own conversion would clip it to 255."""
    image = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    np.testing.assert_allclose(read(image), 128 / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(read(image, channels=1), 128 / 127.5 - 1, atol=1e-6)


def test_grey_and_colour(tmp_path):
    save(tmp_path / "c" / "grey.png", np.full((4, 4), 51))
    x = folder(tmp_path).batch(np.arange(1))["x"]
    assert x.shape == (1, 3, 4, 4)
    torch.testing.assert_close(x, torch.full_like(x, 51 / 127.5 - 1))
    assert folder(tmp_path, channels=1).shape == (1, 4, 4)


# --- resize and crop ---


def test_cover_halves_by_boxes_then_resizes():
    """Four times the side is two halvings of rows and of columns: means of 4 x 4 blocks, to four roundings to whole numbers."""
    pixels = noise(32, 64)
    image = cover(Image.fromarray(pixels), (8, 8))
    assert image.size == (16, 8)
    blocks = pixels.reshape(8, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(image, np.float64) - blocks).max() <= 4 * 0.5


def test_cover_below_twice_the_side_is_bicubic():
    image = Image.fromarray(noise(15, 20))
    want = image.resize((round(20 * 8 / 15), 8), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(cover(image, (8, 8))), np.asarray(want))
    assert min(cover(Image.fromarray(noise(3, 5)), (8, 8)).size) == 8


@pytest.mark.parametrize("size", [(31, 17), (16, 16), (200, 33), (33, 200), (5, 7), (64, 63)])
def test_every_size_becomes_the_square_that_was_asked(size):
    file = io.BytesIO()
    Image.fromarray(noise(size[1], size[0])).save(file, "PNG")
    assert apply(Transform(resolution=16), file.getvalue()).shape == (3, 16, 16)


def test_the_crop_is_the_centre():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert (np.asarray(cut(Image.fromarray(pixels), (8, 8))) == 255).all()


def test_random_crops_reach_both_ends():
    wide = np.zeros((1, 10, 3), np.uint8)
    wide[0, :, 0] = np.arange(10)
    image = Image.fromarray(np.repeat(wide, 8, 0))
    lefts = {int(np.asarray(cut(image, (8, 8), (x, 0.0)))[0, 0, 0]) for x in np.arange(0, 1, 0.01)}
    assert lefts == {0, 1, 2}


def test_pictures_of_several_sizes_need_a_resolution(tmp_path):
    save(tmp_path / "c" / "a.png", noise(8, 8))
    save(tmp_path / "c" / "b.png", noise(8, 9))
    with pytest.raises(DitkitError, match=r"c/a\.png is 8x8, c/b\.png is 9x8.*give resolution"):
        folder(tmp_path)
    assert folder(tmp_path, resolution=4).shape == (3, 4, 4)


# --- augmentation ---


def test_flips_are_fair_coins_of_seed_step_and_index():
    flips = torch.stack([mirrored(range(100), 0, step) for step in range(100)])
    assert abs(flips.float().mean() - 0.5) < 0.02
    assert (flips.float().mean(0) - 0.5).abs().max() < 0.25  # no picture is flipped nearly always
    assert torch.equal(mirrored([7, 3], 0, 5), flips[5, [7, 3]])  # whatever else is in the batch
    assert not torch.equal(mirrored(range(100), 1, 5), flips[5])


def test_augmented_pictures_do_not_depend_on_the_batch(tmp_path):
    for i in range(6):
        save(tmp_path / "c" / f"{i}.png", noise(12, 20, i))
    found = folder(tmp_path, resolution=8, flip=True, crop="random")
    whole = found.augmented(np.arange(6), seed=3, step=9)["x"]
    parts = torch.cat([found.augmented(np.array([i]), seed=3, step=9)["x"] for i in range(6)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, found.augmented(np.arange(6), seed=3, step=10)["x"])
    plain = found.batch(np.arange(6))["x"]
    assert torch.equal(plain, folder(tmp_path, resolution=8).augmented(np.arange(6), seed=3, step=9)["x"])


def test_training_sees_both_ways_round_and_validation_one(tmp_path):
    from ditkit.train.batches import Batches

    save(tmp_path / "c" / "a.png", left_black_right_white())
    found = folder(tmp_path, flip=True)
    batches = Batches(found, lambda shape: {}, seed=0, batch_size=1)
    lefts = [batches(step).tensors["x"][0, 0, 0, 0].item() for step in range(200)]
    assert 80 <= lefts.count(1.0) <= 120
    assert set(lefts) == {-1.0, 1.0}
    assert batches.fixed(1)[0].tensors["x"][0, 0, 0, 0] == -1


# --- after the scan ---


def test_a_file_that_vanishes_later_is_named(tmp_path):
    path = save(tmp_path / "c" / "a.png", noise(8, 8))
    save(tmp_path / "c" / "b.png", noise(8, 8))
    found = folder(tmp_path)
    path.unlink()
    with pytest.raises(DitkitError, match=r"c/a\.png passed the scan and cannot be read now"):
        found.batch(np.arange(2))
    with pytest.raises(DitkitError, match="there is no sample 2; allowed: 0 to 1"):
        found.batch(np.array([0, 2]))


def test_warnings_are_back_when_the_last_thread_has_left(recwarn):
    order = [threading.Event() for _ in range(2)]

    def first():
        with quiet:
            order[0].set()
            order[1].wait(5)

    before = list(warnings.filters)
    thread = threading.Thread(target=first)
    thread.start()
    order[0].wait(5)
    with quiet:
        order[1].set()
        thread.join(5)
    assert warnings.filters == before


def test_a_good_folder_is_silent(tmp_path, caplog):
    save(tmp_path / "c" / "a.png", noise(8, 8))
    with caplog.at_level(logging.INFO):
        folder(tmp_path)
    assert not [r for r in caplog.records if r.name.startswith("ditkit")]
