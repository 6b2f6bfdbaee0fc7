"""The scan: what it names, what it never decodes, what it remembers, and that nothing is deleted."""

import codecs
import io
import json
import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ditkit import data
from ditkit.core.errors import DitkitError
from ditkit.data import scan as scan_module
from ditkit.data.captions import CaptionError, decode_caption
from ditkit.data.folder import ImageFolder, list_folder
from ditkit.data.scan import Limits, Member, Sample, scan


def picture_bytes(size=(8, 8), seed=0, suffix="PNG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, suffix)
    return file.getvalue()


def put(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def reasons(found):
    return {f.name: f.reason for f in found.faults}


def run(root, **options):
    listing = list_folder(root, progress=False)
    return scan(root, listing.samples, cache=root / ".ditkit", faults=listing.faults, progress=False, **options)


# --- A18: oversized and cut-off pictures ---


@pytest.fixture(scope="module")
def huge():
    """A whole PNG of 20000 x 20000 one-bit pixels, 49 kB."""
    rows = zlib.compress(bytes(2501 * 20000), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.fixture
def a18(tmp_path, huge):
    """Two good PNGs, one cut at half its bytes, one of 20000 x 20000 one-bit pixels."""
    put(tmp_path / "a" / "good1.png", picture_bytes(seed=1))
    put(tmp_path / "a" / "good2.png", picture_bytes(seed=2))
    raw = picture_bytes((64, 64), seed=3)
    put(tmp_path / "b" / "half.png", raw[: len(raw) // 2])
    put(tmp_path / "b" / "huge.png", huge)
    return tmp_path


def test_a18_bad_pictures_are_quarantined_and_the_rest_is_used(a18, caplog):
    found = ImageFolder(a18, resolution=8, progress=False)
    assert len(found) == 2
    assert set(reasons(found.scan)) == {"b/half.png", "b/huge.png"}
    assert reasons(found.scan)["b/half.png"].startswith("is cut off")
    assert reasons(found.scan)["b/huge.png"] == "has 400000000 pixels (allowed: 64000000)"
    assert "2 in quarantine" in caplog.text
    listed = json.loads((a18 / ".ditkit" / "quarantine.json").read_text())
    assert listed["count"] == 2
    assert {f["name"] for f in listed["files"]} == {"b/half.png", "b/huge.png"}
    assert (a18 / "b" / "half.png").exists()  # listed, never deleted
    assert found.batch(np.arange(2))["x"].shape == (2, 3, 8, 8)
    assert found.labels == ["a", "b"]  # the number of a class does not depend on which of its files are damaged


def test_a18_strict_data_stops_and_names_the_files(a18):
    with pytest.raises(DitkitError, match=r"2 files .*b/half\.png: is cut off.*b/huge\.png: has 400000000 pixels"):
        data.load(str(a18), resolution=8, strict_data=True, progress=False)


def test_a18_peak_memory_does_not_follow_the_large_picture(tmp_path):
    """Pixels of a picture over the limit are never there: 81 Mpx would take 81 MB, 20000 x 20000 even 400 MB."""
    put(tmp_path / "good.png", picture_bytes())
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    tracemalloc.start()
    opened = []
    real = Image.Image.load
    try:
        Image.Image.load = lambda self: opened.append(self.size) or real(self)
        found = run(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        Image.Image.load = real
        tracemalloc.stop()
    assert reasons(found) == {"large.png": "has 81000000 pixels, 9000x9000 (allowed: 64000000)"}
    assert (9000, 9000) not in opened
    assert peak < 5_000_000


def test_a_file_over_the_byte_limit_is_not_read(tmp_path, monkeypatch):
    put(tmp_path / "good.png", picture_bytes())
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(64_000_001)
    (tmp_path / "none.png").touch()
    read = []
    real = scan_module.read_member
    monkeypatch.setattr(scan_module, "read_member", lambda root, m: read.append(m.name) or real(root, m))
    found = run(tmp_path)
    assert reasons(found) == {
        "big.png": "has 64000001 bytes (allowed: 1 to 64000000)",
        "none.png": "has 0 bytes (allowed: 1 to 64000000)",
    }
    assert read == ["good.png"]


def test_an_empty_set_stops_with_the_reasons(tmp_path):
    with pytest.raises(DitkitError, match="no usable picture.*holds no picture files"):
        run(tmp_path)
    put(tmp_path / "a.jpg", b"no picture")
    with pytest.raises(DitkitError, match=r"no usable picture.*a\.jpg: is no picture"):
        run(tmp_path)


def test_limits_are_options(tmp_path):
    put(tmp_path / "c" / "a.png", picture_bytes((8, 8)))
    put(tmp_path / "c" / "b.png", picture_bytes((9, 8)))
    put(tmp_path / "c" / "long.png", picture_bytes((66, 1)))
    found = ImageFolder(tmp_path, resolution=8, limits={"max_pixels": 66, "max_aspect": 8}, progress=False)
    assert [p.sample.picture.name for p in found.pictures] == ["c/a.png"]
    assert reasons(found.scan)["c/b.png"] == "has 72 pixels, 9x8 (allowed: 66)"
    assert reasons(found.scan)["c/long.png"] == "has sides of 66 and 1 pixels (allowed: one up to 8 times the other)"


# --- damage of every kind is a line in the list, never an exception ---


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["png", "jpg", "webp", "gif", "bmp", "tiff"]),
    cut=st.floats(0.02, 0.98),
    flips=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_damaged_files_never_stop_the_scan(tmp_path_factory, suffix, cut, flips, seed):
    tmp_path = tmp_path_factory.mktemp("damaged")
    raw = bytearray(picture_bytes((24, 16), suffix={"jpg": "JPEG"}.get(suffix, suffix.upper())))
    draw = np.random.default_rng(seed)
    for _ in range(flips):
        raw[draw.integers(len(raw))] ^= int(draw.integers(1, 256))
    raw = raw[: max(1, int(len(raw) * cut))] if seed % 2 else raw
    put(tmp_path / "good.png", picture_bytes())
    put(tmp_path / f"bad.{suffix}", bytes(raw))
    listing = list_folder(tmp_path, progress=False)
    found = scan(tmp_path, listing.samples, progress=False)
    assert len(found.pictures) + len(found.faults) == 2
    for p in found.pictures:  # what passed can be used
        with Image.open(tmp_path / p.sample.picture.name) as image:
            image.load()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_found(tmp_path, suffix, share):
    raw = picture_bytes((64, 48), suffix={"jpg": "JPEG"}.get(suffix, suffix.upper()))
    put(tmp_path / f"cut.{suffix}", raw[: int(len(raw) * share)])
    put(tmp_path / "good.png", picture_bytes())
    assert list(reasons(run(tmp_path))) == [f"cut.{suffix}"]


def test_a_flipped_byte_in_png_data_is_found(tmp_path):
    raw = bytearray(picture_bytes((64, 64)))
    raw[len(raw) // 2] ^= 1
    put(tmp_path / "flipped.png", bytes(raw))
    put(tmp_path / "good.png", picture_bytes())
    assert "flipped.png" in reasons(run(tmp_path))


def test_pictures_of_other_formats_are_named(tmp_path):
    put(tmp_path / "good.png", picture_bytes())
    put(tmp_path / "phone.HEIC", b"x")
    put(tmp_path / "disguised.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start ghostscript
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = reasons(run(tmp_path))
    assert found["phone.HEIC"] == ".heic pictures cannot be read: convert to .png or .jpg"
    assert found["disguised.png"].startswith("is no picture of a known format")
    assert found["gone.png"].startswith("cannot be read: No such file")


# --- A17: caption bytes ---


def test_a17_captions(tmp_path, caplog):
    folder = tmp_path / "Loïc"
    for i, name in enumerate(("quote", "bom", "empty", "plain")):
        put(folder / f"{name}.png", picture_bytes(seed=i))
    put(folder / "quote.txt", b"a man\x92s hat")
    put(folder / "bom.txt", codecs.BOM_UTF8 + "Loïc".encode())
    put(folder / "empty.txt", b"")
    put(folder / "plain.txt", b"a hat\n")
    found = ImageFolder(tmp_path, progress=False)
    (fault,) = found.scan.faults
    assert (fault.name, fault.offset) == ("Loïc/quote.txt", 5)
    assert "byte 0x92 at offset 5 is not utf-8" in fault.reason
    assert "cp1252" in fault.reason
    names = [p.sample.picture.name for p in found.pictures]
    captions = dict(zip(names, found.captions(np.arange(3))))
    assert captions == {"Loïc/bom.png": "Loïc", "Loïc/empty.png": "", "Loïc/plain.png": "a hat"}
    assert found.scan.empty_captions == 1
    assert "1 empty captions" in caplog.text
    (listed,) = json.loads((tmp_path / ".ditkit" / "quarantine.json").read_text())["files"]
    assert (listed["name"], listed["offset"]) == ("Loïc/quote.txt", 5)


def test_a17_encoding_overrides(tmp_path):
    put(tmp_path / "a.png", picture_bytes())
    put(tmp_path / "a.txt", b"a man\x92s hat")
    found = ImageFolder(tmp_path, caption_encoding="cp1252", strict_data=True, progress=False)
    assert found.captions(np.arange(1)) == ["a man\u2019s hat"]
    with pytest.raises(DitkitError, match="caption_encoding is 'cp1253x'"):
        ImageFolder(tmp_path, caption_encoding="cp1253x", progress=False)


def test_a17_missing_captions_are_an_error_unless_allowed(tmp_path):
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.png", picture_bytes())
    put(tmp_path / "a.txt", b"text")
    with pytest.raises(DitkitError, match=r"2 pictures have no caption: b\.png, c\.png.*allow_missing_captions"):
        ImageFolder(tmp_path, progress=False)
    found = ImageFolder(tmp_path, allow_missing_captions=True, progress=False)
    assert found.captions(np.arange(3)) == ["text", "", ""]
    assert (found.scan.missing_captions, found.scan.empty_captions) == (2, 0)


@pytest.mark.parametrize(
    ("raw", "encoding", "offset"),
    [
        (codecs.BOM_UTF8 + b"ab\xff", "utf-8", 5),
        (codecs.BOM_UTF8 + b"ab\xff", "utf-8-sig", 5),
        (b"a\x00b", "utf-8", 1),
        ("é\x1b".encode(), "utf-8", 2),
        (b"ab\x81", "cp1252", 2),
        ("hi".encode("utf-16"), "utf-8", 0),
    ],
)
def test_offsets_are_those_of_the_file(raw, encoding, offset):
    with pytest.raises(CaptionError) as caught:
        decode_caption(raw, encoding)
    assert caught.value.offset == offset


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40), st.booleans())
def test_utf8_captions_are_read_as_they_were_written(text, bom):
    raw = (codecs.BOM_UTF8 if bom else b"") + text.encode()
    assert decode_caption(raw, "utf-8") == text.removeprefix("\ufeff" if not bom else "").strip()


# --- memory of earlier scans ---


def numbered(root, count):
    for i in range(count):
        put(root / f"{i:04d}.png", picture_bytes(seed=i))


def test_a_second_scan_reads_no_picture_again(tmp_path, monkeypatch):
    numbered(tmp_path, 20)
    put(tmp_path / "bad.png", b"no picture")
    first = run(tmp_path)
    monkeypatch.setattr(scan_module, "read_member", None)  # any read would fail
    second = run(tmp_path)
    assert (first.decoded, second.decoded) == (21, 0)
    assert second.pictures == first.pictures
    assert second.faults == first.faults


def test_only_what_changed_is_read_again(tmp_path):
    numbered(tmp_path, 20)
    before = run(tmp_path)
    put(tmp_path / "0003.png", picture_bytes(seed=99))
    os.utime(tmp_path / "0003.png", ns=(1, 1))
    put(tmp_path / "new.png", picture_bytes())
    (tmp_path / "0004.png").unlink()
    after = run(tmp_path)
    assert after.decoded == 2
    changed = {p.sample.picture.name for p in set(after.pictures) ^ set(before.pictures)}
    assert changed == {"0003.png", "new.png", "0004.png"}
    assert run(tmp_path, limits=Limits(max_pixels=10_000)).decoded == 20  # other limits, other verdicts


def test_a_mended_file_leaves_the_quarantine(tmp_path):
    numbered(tmp_path, 1)
    put(tmp_path / "bad.png", b"no picture")
    assert len(run(tmp_path).faults) == 1
    put(tmp_path / "bad.png", picture_bytes())
    assert run(tmp_path).faults == []
    assert json.loads((tmp_path / ".ditkit" / "quarantine.json").read_text())["count"] == 0


def test_a_scan_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    numbered(tmp_path, 12)
    monkeypatch.setattr(scan_module, "_CHUNK", 4)
    real, calls = scan_module.check_picture, []

    def fails_at_the_ninth(raw, limits):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError
        return real(raw, limits)

    monkeypatch.setattr(scan_module, "check_picture", fails_at_the_ninth)
    with pytest.raises(MemoryError):
        run(tmp_path, workers=1)
    log = tmp_path / ".ditkit" / "scan.jsonl"
    log.write_bytes(log.read_bytes() + b'["0011.png", 12')  # and the last line is torn
    assert run(tmp_path, workers=1).decoded == 4
    assert run(tmp_path).decoded == 0


def test_of_several_scans_at_once_one_does_the_work(tmp_path):
    numbered(tmp_path, 40)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(tmp_path, workers=1), range(4)))
    assert sorted(f.decoded for f in found) == [0, 0, 0, 40]
    assert all(f.pictures == found[0].pictures for f in found)


def test_a_damaged_log_is_not_trusted(tmp_path):
    numbered(tmp_path, 3)
    first = run(tmp_path)
    log = tmp_path / ".ditkit" / "scan.jsonl"
    for junk in (b"\xff\xfe\x00", b"[]\n[1,2]\nnull\n", b'["0000.png", "8", 1, "", "", 8, 8, ""]\n', b"[" * 100_000):
        log.write_bytes(junk)
        again = run(tmp_path)
        assert again.decoded == 3
        assert again.pictures == first.pictures


def test_the_log_does_not_grow_for_ever(tmp_path):
    numbered(tmp_path, 2)
    sizes = []
    for i in range(400):
        os.utime(tmp_path / "0000.png", ns=(i, i))
        if i > 200:
            run(tmp_path, workers=1) if i > 398 else None
        with (tmp_path / ".ditkit" / "scan.jsonl").open("a") if i else _made(tmp_path) as file:
            file.write(json.dumps(["0000.png", 1, i, "r", "0" * 64, 8, 8, ""]) + "\n")
        sizes.append((tmp_path / ".ditkit" / "scan.jsonl").stat().st_size)
    assert sizes[-1] < sizes[-2]


def _made(root):
    (root / ".ditkit").mkdir()
    return (root / ".ditkit" / "scan.jsonl").open("w")


def test_a_read_error_is_reported_and_not_remembered(tmp_path):
    numbered(tmp_path, 2)
    listing = list_folder(tmp_path, progress=False)
    gone = Sample(Member("gone.png", "gone.png", 0, 10, 0))
    found = scan(tmp_path, [*listing.samples, gone], cache=tmp_path / ".ditkit", progress=False)
    assert reasons(found) == {"gone.png": "cannot be read: No such file or directory"}
    assert "gone.png" not in (tmp_path / ".ditkit" / "scan.jsonl").read_text()


def test_names_that_are_no_unicode_are_reported(tmp_path):
    numbered(tmp_path, 1)
    with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as file:
        file.write(b"no picture")
    found = run(tmp_path)
    assert len(found.faults) == 1
    (listed,) = json.loads((tmp_path / ".ditkit" / "quarantine.json").read_text())["files"]
    assert listed["name"] == "bad\\xff.png"
    assert run(tmp_path).decoded == 0


def test_nothing_is_written_with_the_cache_off(tmp_path):
    put(tmp_path / "c" / "a.png", picture_bytes())
    ImageFolder(tmp_path, cache="off", progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "c"]
    ImageFolder(tmp_path, cache=str(tmp_path / "kept"), progress=False)
    assert (tmp_path / "kept" / "quarantine.json").is_file()


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """150 and 300 pictures of 64 kB each: what grows is the list of names, not the pictures."""
    peaks = []
    for count in (150, 300):
        folder = tmp_path / str(count)
        raw = picture_bytes((146, 146), suffix="BMP")
        for i in range(count):
            put(folder / f"{i}.bmp", raw)
        listing = list_folder(folder, progress=False)
        tracemalloc.start()
        scan(folder, listing.samples, cache=folder / ".ditkit", workers=2, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 150 * 2_000  # bytes a picture
    assert peaks[1] < 300 * len(raw) / 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("DITKIT_SLOW" not in os.environ, reason="10,000 files: set DITKIT_SLOW=1")
def test_ten_thousand_files(tmp_path):
    psutil = pytest.importorskip("psutil")
    raw = [picture_bytes((64, 64), seed=i, suffix="JPEG") for i in range(10)]
    for i in range(10_000):
        put(tmp_path / f"{i % 100:02d}" / f"{i:05d}.jpg", raw[i % 10] + i.to_bytes(4, "little"))
    process = psutil.Process()
    ImageFolder(tmp_path / "00", kind="unlabelled", cache="off", progress=False)  # what importing and threads cost
    before = process.memory_info().rss
    found = ImageFolder(tmp_path, resolution=64, progress=False)
    grown = process.memory_info().rss - before
    assert (len(found), found.num_classes, found.scan.faults) == (10_000, 100, [])
    assert grown < 40_000_000
