"""Buckets: equal budgets, no picture enlarged, one size a batch, each picture once an epoch, whatever stops or splits the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditkit
from ditkit.codecs.identity import Identity
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.view import compile_view
from ditkit.data.buckets import Buckets, sizes_within
from ditkit.data.folder import ImageFolder
from ditkit.data.latents import cache_latents
from ditkit.data.transforms import corner, cover, scalings
from ditkit.testing.training import comparable, tiny_recipe
from ditkit.train import Recipe, loop, train
from ditkit.train.batches import Batches, Draw
from ditkit.train.build import build

# PixArt-alpha (2310.00426), appendix, at 1024: "height x width", by their ratio
PIXART_1024 = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344
768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768
1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512""".split()
SHAPES = {"wide": (20, 60), "high": (50, 20), "square": (40, 40), "small": (18, 17), "long": (16, 90), "tiny": (12, 15)}  # height, width
BUCKETS = {"resolutions": [16, 32], "multiple": 4}


def draws(shape: tuple[int, ...]) -> dict[str, Draw]:
    return {"noise": Draw("normal", shape), "time": Draw("uniform")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures of noise: three of each shape."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, (name, (height, width)) in enumerate(SHAPES.items()):
        for i in range(3):
            pixels = np.random.default_rng(10 * k + i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            (folder / f"{name}{i}.txt").write_text(f"a {name} one")
    return folder


def load(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(root, progress=False, **{"buckets": BUCKETS, **options})


# the sizes


@pytest.mark.parametrize(("resolution", "scale"), [(1024, 1), (512, 2), (256, 4), (2048, 0.5)])
def test_the_sizes_are_the_published_ones(resolution: int, scale: float) -> None:
    """In their order; and one more, which the tables have lying (704x1344) and not standing."""
    found = [f"{int(h * scale)}x{int(w * scale)}" for h, w in sizes_within(resolution, resolution // 16)]
    assert [size for size in found if size != "1344x704"] == PIXART_1024
    assert len(found) == 41


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 16), (64, 8), (32, 4), (48, 8)])
def test_budgets_are_equal(resolution: int, multiple: int) -> None:
    """Tokens of a size are at most those of the square, at least nine tenths; all sides are multiples; wide and high alike."""
    found = sizes_within(resolution, multiple)
    assert (resolution, resolution) in found
    assert all(0.9 * resolution**2 <= h * w <= resolution**2 and h % multiple == w % multiple == 0 for h, w in found)
    assert {(w, h) for h, w in found} == set(found)
    assert len(set(found)) == len(found)


def test_no_picture_is_enlarged_and_the_nearest_ratio_is_taken() -> None:
    buckets = Buckets(resolutions=(32, 64), multiple=8)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 200, (300, 2)).tolist():
        for h, w in buckets.of(height, width):
            assert h <= height
            assert w <= width
            last = scalings((width, height), (h, w))[-1]
            assert last[0] <= width
            assert last[1] <= height
            assert min(last[0] - w, last[1] - h) == 0
    for h, w in sizes_within(64, 8):  # a picture of the size of a bucket, or three times that, goes there whole
        assert buckets.of(h, w) == buckets.of(3 * h, 3 * w) == ((h, w),)
    assert buckets.of(63, 64) == ((56, 72),) or buckets.of(63, 64)[0][0] * buckets.of(63, 64)[0][1] <= 32 * 32  # never 64 x 64
    assert buckets.of(31, 31) == ()
    assert buckets.of(64, 257) == ()  # beyond 4 to 1


def test_all_budgets_that_a_picture_fills() -> None:
    buckets = Buckets(resolutions=(16, 32, 64), multiple=8, sizes="all")
    assert buckets.of(40, 40) == ((32, 32), (16, 16))
    assert buckets.of(64, 64) == ((64, 64), (32, 32), (16, 16))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resolutions": [30], "multiple": 4}, "30 is no multiple of 4"),
        ({"resolutions": [32, 16], "multiple": 4}, "do not rise"),
        ({"resolutions": [32], "multipel": 4}, "multiple"),
        ({"resolutions": [32], "multiple": 4, "fill": 0.0}, "fill"),
    ],
)
def test_wrong_buckets_are_named(values: dict, words: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(root, buckets=values)


def test_a_resolution_and_buckets_exclude_each_other(root: Path) -> None:
    with pytest.raises(ConfigError, match="both given"):
        load(root, resolution=32)


# the pictures


def test_the_scan_names_what_fits_no_size(root: Path) -> None:
    found = load(root)
    assert {f.name[:4] for f in found.scan.faults} == {"long", "tiny"}
    assert "has 15x12 pixels, too few to fill any size of 16 x 16 without enlarging it" in {f.reason for f in found.scan.faults}
    assert "has sides of 90 and 16 pixels (buckets: one up to 4 times the other)" in {f.reason for f in found.scan.faults}
    assert len(found) == 12
    assert load(root, strict_data=False, buckets={**BUCKETS, "resolutions": [8]}).scan.decoded == 0  # the scan itself is kept
    with pytest.raises(DitkitError, match=r"tiny0\.png: has 15x12"):
        load(root, strict_data=True)


def test_a_sample_is_the_middle_of_its_scaled_picture(root: Path) -> None:
    found = load(root)
    assert found.shape == (3, 32, 32)
    for group in found.groups or []:
        x = found.batch(group)["x"]
        assert x.shape[2:] == (found.sizes or [])[group[0]]
        for i, row in zip(group, x):
            image = Image.open(root / found.pictures[i].sample.picture.name)
            scaled = np.asarray(cover(image, tuple(row.shape[1:])), np.float32) / 127.5 - 1  # type: ignore[arg-type]
            top, left = (scaled.shape[0] - row.shape[1]) // 2, (scaled.shape[1] - row.shape[2]) // 2
            want = scaled[top : top + row.shape[1], left : left + row.shape[2]]
            assert np.allclose(row.permute(1, 2, 0).numpy(), want, atol=1e-6)
    with pytest.raises(DitkitError, match="are asked for together"):
        found.batch(np.arange(len(found)))


def test_a16_the_bucket_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    """A16: 64 x 32 (wide) with orientation 6 is 64 high and 32 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    found = load(tmp_path, kind="unlabelled")
    assert found.batch(np.array([0]))["x"].shape[2] > found.batch(np.array([0]))["x"].shape[3]
    assert found.framing(np.array([0]))[0, :2].tolist() == [64, 32]


def test_framing_says_what_is_shown(root: Path) -> None:
    """Cut the scaled picture at the corner that is told: it is the sample, also where crops are random."""
    found = load(root, crop="random")
    for group in found.groups or []:
        x, told = found.augmented(group, seed=3, step=5)["x"], found.framing(group, seed=3, step=5)
        for i, row, (height, width, top, left) in zip(group, x, told.tolist()):
            picture = found.pictures[i]
            assert (height, width) == SHAPES[picture.sample.picture.name[:-5]]
            scaled = np.asarray(cover(Image.open(root / picture.sample.picture.name), tuple(row.shape[1:])), np.float32)  # type: ignore[arg-type]
            want = scaled[top : top + row.shape[1], left : left + row.shape[2]] / 127.5 - 1
            assert np.allclose(row.permute(1, 2, 0).numpy(), want, atol=1e-6)
    assert corner((10, 8), (8, 8)) == (1, 0)


# the batches


def sized(counts: tuple[int, ...]) -> Any:
    """A data set whose groups have these counts, mixed among its numbers; x holds the number of the sample."""

    which = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))

    class Sized:
        name, shape, num_classes, labels = "sized", (1, 4, 4), 0, ()
        groups = [np.flatnonzero(which == g) for g in range(len(counts))]

        def __len__(self) -> int:
            return sum(counts)

        def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
            (width,) = set(which[indices])
            return {"x": torch.from_numpy(indices).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4 + int(width))}

    return Sized()


def test_each_sample_once_an_epoch_where_batches_divide_the_groups() -> None:
    batches = Batches(sized((8, 4, 12)), draws, seed=0, batch_size=4)
    epochs = [np.sort(np.concatenate([batches.ids(step) for step in range(e * 6, e * 6 + 6)])) for e in range(5)]
    assert all((ids == np.arange(24)).all() for ids in epochs)
    turns = [[batches.turn(step)[0] for step in range(e * 6, e * 6 + 6)] for e in range(5)]
    assert len({tuple(t) for t in turns}) > 1


@pytest.mark.parametrize("counts", [(5, 1, 17), (3,), (40, 7, 2, 9), (1, 1)])
def test_leftovers_are_carried_on_and_nobody_is_forgotten(counts: tuple[int, ...]) -> None:
    """After E epochs a sample of a group of n was seen E times, or up to ceil(B / n) times less; after B epochs exactly B times."""
    size = 4
    found = sized(counts)
    batches = Batches(found, draws, seed=1, batch_size=size)
    ends = [sum(e * n // size for n in counts) for e in range(1, 2 * size + 1)]
    seen, late = np.zeros(sum(counts), np.int64), np.zeros(sum(counts), np.int64)
    for group in found.groups:
        late[group] = -(-size // len(group))
    for epoch, (start, end) in enumerate(zip([0, *ends], ends), 1):
        for step in range(start, end):
            ids = batches.ids(step)
            assert any(set(ids) <= set(group) for group in found.groups)
            np.add.at(seen, ids, 1)
        least = epoch - late
        assert (seen <= epoch).all(), epoch
        assert (seen >= least).all()
        if epoch % size == 0:
            assert (seen == epoch).all()


def test_any_step_can_be_had_first_and_processes_share_one_group() -> None:
    found = sized((5, 1, 17))
    order = [Batches(found, draws, seed=2, batch_size=4).ids(step).tolist() for step in range(20)]
    assert [Batches(found, draws, seed=2, batch_size=4).ids(step).tolist() for step in range(19, -1, -1)] == order[::-1]
    two = [Batches(found, draws, seed=2, batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    one = Batches(found, draws, seed=2, batch_size=4)
    for step in range(20):
        for name in ("x", "noise", "time"):
            assert torch.equal(torch.cat([b(step).tensors[name] for b in two]), one(step).tensors[name])
        assert one(step).tensors["noise"].shape == one(step).tensors["x"].shape


def test_validation_takes_the_first_samples_a_batch_for_each_size() -> None:
    found = sized((5, 1, 17))
    parts = Batches(found, draws, seed=0, batch_size=4).fixed(9)
    assert sorted(np.concatenate([p.ids for p in parts])) == list(range(9))
    assert all(p.tensors["noise"].shape == p.tensors["x"].shape for p in parts)


# training

PIXART = {"dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2.0, "position_base": 4, "micro_conditions": True}
BYTES = {"name": "bytes", "config": {"dim": 16, "depth": 1, "num_heads": 2, "max_length": 16}}


def recipe(root: Path, options: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    return tiny_recipe(
        {
            "backbone": {"name": "pixart", "config": PIXART},
            "encoder": BYTES,
            "data": {
                "name": str(root),
                "config": {"buckets": BUCKETS, "test_fraction": 0.2, "flip": True, "crop": "random", **(options or {})},
            },
        },
        **{"batch_size": 4, **trainer},
    )


def test_the_network_is_told_the_originals_size_and_the_aspect_of_what_is_shown(root: Path) -> None:
    """PixArt-alpha, micro-conditions: size of the original in pixels, height over width of the bucket."""
    parts = build(recipe(root), torch.device("cpu"))
    batches = Batches(parts.train, parts.objective.draws, seed=0, batch_size=4)
    seen = set()
    for step in range(12):
        batch = batches(step)
        for i, size, aspect in zip(batch.ids, batch.tensors["size"], batch.tensors["aspect"]):
            name = parts.train.data.pictures[i].sample.picture.name[:-5]  # type: ignore[attr-defined]
            assert tuple(size.tolist()) == SHAPES[name]
            assert float(aspect) == pytest.approx(batch.tensors["x"].shape[2] / batch.tensors["x"].shape[3])
            seen.add(name)
        cond = parts.objective.conditioning(parts.model, {**batch.tensors, "drop": torch.zeros(4)})  # type: ignore[attr-defined]
        assert torch.equal(cond["size"], batch.tensors["size"])  # no caption is no reason to forget the size
    assert seen == {"wide", "high", "square", "small"}


def test_a_resumed_run_in_buckets_is_bit_exact(root: Path, tmp_path: Path) -> None:
    train(recipe(root), tmp_path / "whole", progress=False)
    train(recipe(root, steps=2), tmp_path / "parts", progress=False)
    assert train(recipe(root), tmp_path / "parts", progress=False).resumed_from == 2
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "parts")
    pipe = ditkit.from_pretrained(tmp_path / "whole", device="cpu")
    assert pipe(prompt="a wide one", progress=False).x.shape == (1, 3, 32, 32)


def test_class_folders_train_in_buckets_too(tmp_path: Path) -> None:
    for k, (height, width) in enumerate(((16, 32), (32, 16), (16, 16), (40, 20))):
        folder = tmp_path / "data" / ("ant" if k % 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (60 * k,) * 3).save(folder / f"{k}.png")
    own = {"data": {"name": str(tmp_path / "data"), "config": {"buckets": {**BUCKETS, "sizes": "all"}}}}
    assert train(tiny_recipe(own, batch_size=2), tmp_path / "run", progress=False).finished


# cached latents


def test_latents_keep_their_buckets_and_what_is_told_of_them(root: Path, tmp_path: Path) -> None:
    found = load(root, flip=True)
    codec = Identity()
    cached = cache_latents(found, codec, tmp_path, shard_bytes=20_000, progress=False)
    assert [len(g) for g in cached.groups or []] == [len(g) for g in found.groups or []]
    for mine, theirs in zip(cached.groups or [], found.groups or []):
        assert torch.equal(cached.batch(mine)["x"], found.batch(theirs)["x"])
        assert cached.framing is not None
        assert (cached.framing(mine, seed=0, step=3) == found.framing(theirs)).all()
        assert cached.captions(mine) == found.captions(theirs)
        assert cached.augmented(mine, seed=0, step=1)["x"].shape == found.batch(theirs)["x"].shape
    with pytest.raises(DitkitError, match="are asked for together"):
        cached.batch(np.arange(len(cached)))
    again = cache_latents(load(root, flip=True, buckets={**BUCKETS, "max_ratio": 3.0}), codec, tmp_path, progress=False)
    assert again.report is not None
    assert again.report.encoded < again.report.samples  # pictures whose bucket is the same are copied


def test_training_on_latents_is_told_the_same_as_on_pictures(root: Path, tmp_path: Path) -> None:
    cache_latents(load(root), Identity(), tmp_path / "latents", progress=False)
    own = {"data": {"name": str(tmp_path / "latents"), "config": {}}}
    parts = build(Recipe.parse({**recipe(root).to_dict(), **own}), torch.device("cpu"))
    group = parts.train.groups[-1]  # type: ignore[attr-defined]
    batch = parts.train.batch(group)
    shapes = {tuple(size) for size in batch["size"].tolist()}
    assert shapes <= {(float(h), float(w)) for h, w in SHAPES.values()}
    assert float(batch["aspect"][0]) == pytest.approx(batch["x"].shape[2] / batch["x"].shape[3])
    result = train(Recipe.parse({**recipe(root, validate_every=6).to_dict(), **own}), tmp_path / "run", progress=False)
    assert result.finished


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_run_has_one_graph_a_size(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shapes: every size is a graph of its own, and dynamo's limit is raised to as many as there are."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(loop, "compile_view", lambda model, grain, **kw: compile_view(model, grain, backend=count, **kw))
    with torch._dynamo.config.patch(recompile_limit=1):
        options = {"buckets": {"resolutions": [16], "multiple": 8}}  # 16 x 16, 8 x 32, 32 x 8
        training = loop.Training(recipe(root, options, compile="step"), tmp_path, loop.connect("cpu"))
        shapes = set()
        for step in range(9):
            batch = training.batches(step)
            training.backward(batch)
            shapes.add(tuple(batch.tensors["x"].shape[2:]))
    assert shapes == {(16, 16), (8, 32), (32, 8)}
    assert len(graphs) == len(shapes)
