"""Shards: the layout of webdataset, read by place, written alike; archives that attack or are damaged."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ditkit import data
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.data.folder import ImageFolder
from ditkit.data.shards import ImageShards, write_shards


def png(seed=0, size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(path, *members):
    """Members are (name, bytes) or a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
    return path


def shards(root, **options):
    return ImageShards(root, progress=False, **options)


def reasons(found):
    return {f.name: f.reason for f in found.scan.faults}


@pytest.fixture
def pictures(tmp_path):
    """A class-labelled folder: 7 pictures, two of them JPEG."""
    root = tmp_path / "pictures"
    for i in range(7):
        folder = root / ("ant", "Zürich bee")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(png(i))) as image:
            image.save(folder / f"{i}.{'jpg' if i > 4 else 'png'}")
    return root


def same(a, b):
    ids = np.arange(len(a))
    x, y = a.batch(ids), b.batch(ids)
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for k in {*x, *y}) and list(a.labels) == list(b.labels)


# --- round trips ---


def test_a_folder_survives_the_way_into_shards_and_back(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    paths = write_shards(source, tmp_path / "out", max_samples=3)
    assert [p.name for p in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    found = data.load(str(tmp_path / "out"), progress=False)
    assert same(source, found)
    with tarfile.open(paths[2]) as file:  # the bytes of the file, not of its pixels
        assert file.getnames() == ["00000006.jpg", "00000006.cls"]
        assert file.extractfile("00000006.jpg").read() == (pictures / "ant" / "6.jpg").read_bytes()
    assert same(ImageShards(paths[0], progress=False), shards(paths[0]))
    assert len(shards(paths[0])) == 3


def test_equal_data_gives_equal_bytes(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    a, b = write_shards(source, tmp_path / "a"), write_shards(source, tmp_path / "b")
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_captions_are_written_as_utf8(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_bytes(f"Loïc’s hat {i}".encode("cp1252"))
    source = ImageFolder(tmp_path, caption_encoding="cp1252", progress=False)
    found = shards(write_shards(source, tmp_path / "out")[0].parent)
    assert found.captions(np.array([2, 0])) == ["Loïc’s hat 2", "Loïc’s hat 0"]


def test_embedded_data_is_written_as_png(tmp_path):
    digits = data.load("digits", "test")
    write_shards(digits, tmp_path / "out", max_samples=200)
    found = shards(tmp_path / "out", channels=1)
    ids = np.arange(0, 360, 5)
    assert torch.equal(found.batch(ids)["y"], digits.batch(ids)["y"])
    assert (found.batch(ids)["x"] - digits.batch(ids)["x"]).abs().max() <= 1 / 255 + 1e-6
    assert found.labels == digits.labels


def test_shards_are_filled_up_to_their_limits(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    for limits, counts in (({"max_samples": 4}, [4, 3]), ({"max_bytes": 1}, [1] * 7), ({}, [7])):
        out = tmp_path / f"out{len(counts)}"
        assert [len(shards(p)) for p in write_shards(source, out, **limits)] == counts
    with pytest.raises(DitkitError, match="max_samples is 0"):
        write_shards(source, tmp_path / "none", max_samples=0)
    assert not (tmp_path / "none").exists()


def test_a_write_that_fails_leaves_nothing(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    (pictures / "Zürich bee" / "5.jpg").unlink()
    with pytest.raises((DitkitError, OSError)):
        write_shards(source, tmp_path / "out", max_samples=2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.filterwarnings("ignore")  # the library leaves files open
def test_the_webdataset_library_reads_ours_and_we_read_its(pictures, tmp_path):
    wds = pytest.importorskip("webdataset")
    source = ImageFolder(pictures, progress=False)
    (path,) = write_shards(source, tmp_path / "ours")
    theirs = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in theirs] == [f"{i:08d}" for i in range(7)]
    assert [int(s["cls"]) for s in theirs] == source.labels_of(np.arange(7)).tolist()
    assert theirs[0]["png"] == source.file_of(0)[1]
    (tmp_path / "theirs").mkdir()
    with wds.TarWriter(str(tmp_path / "theirs" / "a.tar")) as writer:
        for i in range(7):
            suffix, raw = source.file_of(i)
            writer.write({"__key__": f"sub/{i}", suffix[1:]: raw, "cls": int(source.labels_of(np.array([i]))[0])})
    (tmp_path / "theirs" / "labels.json").write_text(json.dumps({"labels": source.labels}))
    assert same(source, shards(tmp_path / "theirs"))


# --- layout ---


def test_keys_end_at_the_first_dot_and_classes_are_numbers(tmp_path):
    tar(
        tmp_path / "b.tar", ("x/1.a.png", png(0)), ("x/1.cls", b"2\n"), ("x/1.json", b"{}"), ("x.y/2.PNG", png(1)), ("x.y/2.cls", b"0")
    )  # fmt: skip
    tar(tmp_path / "a.tar", ("3.png", png(2)), ("3.cls", b"1"), ("README", b"text"), ("4.txt", b"no picture"))
    found = shards(tmp_path, kind="classes")
    assert [p.sample.picture.name for p in found.pictures] == ["a.tar/3.png", "b.tar/x/1.a.png", "b.tar/x.y/2.PNG"]
    assert found.batch(np.arange(3))["y"].tolist() == [1, 2, 0]
    assert found.labels == ["0", "1", "2"]
    (tmp_path / "labels.json").write_text(json.dumps({"labels": ["ant", "bee", "cat", "dog"]}))
    named = shards(tmp_path, kind="classes")
    assert (named.labels, named.batch(np.arange(3))["y"].tolist()) == (["ant", "bee", "cat", "dog"], [1, 2, 0])
    (tmp_path / "labels.json").write_text(json.dumps({"labels": ["ant", "ant"]}))
    with pytest.raises(ConfigError, match="a class name is given twice"):
        shards(tmp_path)


def test_any_order_reads_the_same(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    write_shards(source, tmp_path / "out", max_samples=2)
    found = shards(tmp_path / "out")
    ids = np.array([6, 0, 3, 3, 5])
    assert torch.equal(found.batch(ids)["x"], source.batch(ids)["x"])


def test_splits_are_folders_or_a_share(pictures, tmp_path):
    source = ImageFolder(pictures, progress=False)
    for split in ("train", "test"):
        write_shards(source, tmp_path / "out" / split)
    assert len(data.load(str(tmp_path / "out"), "test", progress=False)) == 7
    flat = str(tmp_path / "out" / "train")
    parts = [len(data.load(flat, split, test_fraction=0.5, progress=False)) for split in ("train", "test")]
    assert sum(parts) == 7
    assert min(parts) > 0


def test_missing_parts_are_named(tmp_path):
    tar(tmp_path / "c" / "a.tar", ("1.png", png(0)), ("1.txt", b"text"), ("2.png", png(1)))
    with pytest.raises(DitkitError, match=r"1 pictures have no caption: a\.tar/2\.png"):
        shards(tmp_path / "c")
    assert shards(tmp_path / "c", allow_missing_captions=True).captions(np.arange(2)) == ["text", ""]
    tar(tmp_path / "d" / "a.tar", ("1.png", png(0)), ("1.cls", b"1"), ("2.png", png(1)), ("3.png", png(2)), ("3.cls", b"-1"))
    assert reasons(shards(tmp_path / "d")) == {
        "a.tar/2.png": "has no .cls member",
        "a.tar/3.cls": "is '-1', no class number (allowed: 0 to 99999)",
    }
    tar(tmp_path / "e" / "a.tar", ("1.png", png(0)))
    with pytest.raises(DitkitError, match=r"neither \.txt nor \.cls"):
        shards(tmp_path / "e")
    assert len(shards(tmp_path / "e", kind="unlabelled")) == 1


# --- damage and attacks ---


def test_bad_members_are_quarantined_with_the_name_of_their_shard(tmp_path):
    raw = png(1, 32)
    tar(
        tmp_path / "a.tar", ("1.png", png(0)), ("1.txt", b"fine"), ("2.png", raw[: len(raw) // 2]), ("2.txt", b"fine"),
        ("3.png", png(2)), ("3.txt", b"a man\x92s hat"), ("4.png", b""), ("4.txt", b""),
    )  # fmt: skip
    found = shards(tmp_path)
    assert len(found) == 1
    assert {f.name: f.offset for f in found.scan.faults} == {"a.tar/2.png": None, "a.tar/3.txt": 5, "a.tar/4.png": None}
    assert json.loads((tmp_path / ".ditkit" / "quarantine.json").read_text())["count"] == 3
    assert shards(tmp_path).scan.decoded == 0
    with pytest.raises(DitkitError, match="3 files"):
        shards(tmp_path, strict_data=True)


def test_names_never_become_paths_and_links_are_refused(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(png(9))
    link, device = tarfile.TarInfo("5.png"), tarfile.TarInfo("6.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    device.type = tarfile.CHRTYPE
    root = tmp_path / "in"
    tar(root / "a.tar", ("../../evil.png", png(0)), ("/etc/evil2.png", png(1)), link, device)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    found = shards(root, kind="unlabelled", cache="off")
    assert len(found) == 2
    assert reasons(found) == {"a.tar/5.png": "is no plain file", "a.tar/6.png": "is no plain file"}
    found.batch(np.arange(2))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_member_that_claims_more_than_there_is(tmp_path):
    path = tar(tmp_path / "a.tar", ("1.png", png(0)), ("2.png", png(1)))
    raw = bytearray(path.read_bytes())
    second = raw.index(b"2.png")
    info = tarfile.TarInfo("2.png")
    info.size = 10**10
    raw[second : second + 512] = info.tobuf(tarfile.USTAR_FORMAT if info.size < 8**11 else tarfile.GNU_FORMAT)
    path.write_bytes(raw)
    found = shards(tmp_path, kind="unlabelled")
    assert len(found) == 1
    assert "a.tar/2.png" in reasons(found)
    assert "a.tar" in reasons(found)


def test_given_twice(tmp_path):
    tar(tmp_path / "a.tar", ("1.png", png(0)), ("1.png", png(1)), ("2.png", png(2)), ("1.cls", b"0"))
    found = shards(tmp_path, kind="unlabelled")
    assert [p.sample.picture.name for p in found.pictures] == ["a.tar/1.png", "a.tar/2.png"]
    assert set(reasons(found)) == {"a.tar/1.png", "a.tar/1.cls"}


@pytest.mark.parametrize("share", [0.3, 0.55, 0.98])
def test_a_shard_that_is_cut_off_keeps_what_is_whole(tmp_path, share):
    path = tar(tmp_path / "a.tar", *((f"{i}.png", png(i)) for i in range(20)))
    whole = shards(tmp_path, kind="unlabelled", cache="off").batch(np.arange(20))["x"]
    raw = path.read_bytes()
    end = raw.rindex(b"IEND")  # the padding behind the last member says nothing
    path.write_bytes(raw[: int(end * share)])
    found = shards(tmp_path, kind="unlabelled", cache="off")
    assert 0 < len(found) < 20
    assert reasons(found)["a.tar"].startswith("is cut off or damaged")
    assert torch.equal(found.batch(np.arange(len(found)))["x"], whole[: len(found)])


def test_no_damage_stops_the_reader(tmp_path):
    """100 archives with flipped bytes, in headers mostly: every one is read or named."""
    raw = tar(tmp_path / "whole" / "a.tar", *((f"{i}.png", png(i, 4)) for i in range(4))).read_bytes()
    draw = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.tar").write_bytes(raw)
    for _ in range(100):
        damaged = bytearray(raw)
        for _ in range(int(draw.integers(1, 5))):
            header = int(draw.integers(0, 8)) * 512
            damaged[header + int(draw.integers(0, 512))] ^= int(draw.integers(1, 256))
        (tmp_path / "in" / "bad.tar").write_bytes(damaged)
        found = shards(tmp_path / "in", kind="unlabelled", cache="off")
        assert len(found) >= 4
        assert len(found) + len(found.scan.faults) >= 5
        found.batch(np.arange(len(found))) if found.shape == (3, 4, 4) else None


def test_compressed_shards_are_named(tmp_path):
    tar(tmp_path / "good.tar", ("1.png", png(0)))
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("2.png"))
    assert reasons(shards(tmp_path, kind="unlabelled"))["zip.tar"].startswith("is compressed: unpack it")
