"""Files are whole or refused by name: strict tensor files, atomic writing, manifests."""

import json
import math
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditkit.core.errors import WeightsError
from ditkit.core.files import (
    atomic_file,
    atomic_folder,
    fingerprint,
    folder_hash,
    read_tensors,
    remove_temporary,
    verify_manifest,
    write_json,
    write_tensors,
)


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=g),
        "half": torch.randn(5, generator=g).half(),
        "brain": torch.randn((), generator=g).bfloat16(),
        "turned": torch.randn(4, 3, generator=g).t(),
        "flags": torch.tensor([True, False, True]),
        "steps": torch.arange(4),
        "none": torch.zeros(0, 3),
    }


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def test_safetensors_reads_what_we_write_and_the_other_way(tmp_path, tensors):
    write_tensors(tmp_path / "ours", tensors, {"k": "v"})
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    for got in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())


def test_equal_content_gives_equal_bytes(tmp_path, tensors):
    write_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


MALFORMED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "claims 2^40": struct.pack("<Q", 1 << 40) + b"{}",
    "claims 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "cut header": raw({"a": f32([1], 0, 4)}, b"\0" * 4)[:20],
    "bad json": raw(b'{"a": '),
    "no object": raw(b"[1, 2]  "),
    "deep": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "not utf-8": raw(b'{"\xff": 1}'),
    "lone surrogate": raw(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
    "NaN in header": raw(b'{"a": NaN}'),
    "trailing byte": raw({"a": f32([1], 0, 4)}, b"\0" * 5),
    "cut data": raw({"a": f32([2], 0, 8)}, b"\0" * 7),
    "unknown dtype": raw({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "overlap": raw({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, b"\0" * 12),
    "hole": raw({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, b"\0" * 12),
    "negative shape": raw({"a": f32([-1], 0, 4)}, b"\0" * 4),
    "shape of true": raw(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"\0" * 4),
    "huge shape": raw({"a": f32([1 << 70], 0, 4)}, b"\0" * 4),
    "size mismatch": raw({"a": f32([3], 0, 4)}, b"\0" * 4),
    "backwards": raw({"a": f32([0], 4, 4), "b": f32([1], 0, 4)}, b"\0" * 3),
    "duplicate": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "empty inside another": raw({"a": f32([2], 0, 8), "b": f32([0], 4, 4)}, b"\0" * 8),
    "metadata of numbers": raw({"__metadata__": {"k": 1}}),
    "extra field": raw({"a": {**f32([1], 0, 4), "more": 1}}, b"\0" * 4),
    "bool of 2": raw({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"),
    "NaN": raw({"a": f32([1], 0, 4)}, struct.pack("<f", math.nan)),
    "infinity": raw({"a": f32([2], 0, 8)}, struct.pack("<ff", 1, -math.inf)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_is_refused_and_named(tmp_path, name):
    path = tmp_path / "some.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(WeightsError, match=r"some\.safetensors"):
        read_tensors(path)


def test_what_is_expected_is_checked_by_name(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, {"depth": torch.ones(2, 3), "count": torch.ones(1)})
    for expect, text in [
        ({"depth": (2, 3)}, "unknown 'count'"),
        ({"depth": (2, 3), "count": (1,), "width": (1,)}, "missing 'width'"),
        ({"depth": (2, 3), "counts": (1,)}, "did you mean 'counts'"),
        ({"depth": (3, 2), "count": (1,)}, r"'depth' is \(2, 3\); allowed: \(3, 2\)"),
        ({"depth": torch.ones(2, 3), "count": torch.ones(1, dtype=torch.int64)}, "'count' is torch.float32"),
    ]:
        with pytest.raises(WeightsError, match=text):
            read_tensors(path, expect)
    assert read_tensors(path, {"depth": torch.ones(2, 3).half(), "count": (1,)}).keys() == {"depth", "count"}
    with pytest.raises(WeightsError, match="does not exist"):
        read_tensors(tmp_path / "nowhere")


def mutations(good, count):
    """Truncations, flips in the header, bytes inserted and removed."""
    rng = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for k in range(count):
        at = rng.randrange(len(good)) if k % 4 != 1 else rng.randrange(header)
        new = bytes([rng.randrange(256)])
        yield [good[:at], good[:at] + new + good[at + 1 :], good[:at] + new + good[at:], good[:at] + good[at + 1 :]][k % 4]


def test_two_thousand_damaged_files_are_refused_or_say_the_same(tmp_path, tensors):
    """Behind a header that still says the same, data bytes are the business of the manifest: here they are left alone."""
    path = tmp_path / "f"
    write_tensors(path, tensors)
    good = path.read_bytes()
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for bad in mutations(good, 2000):
            file.seek(0)
            file.write(bad)
            file.truncate()
            try:
                got = read_tensors(path, tensors)
            except WeightsError:
                refused += 1
            else:
                assert len(bad) == len(good)
                assert all(got[k].dtype == v.dtype for k, v in tensors.items())
    assert refused > 1700


def test_a_flipped_data_byte_is_refused_by_the_manifest(tmp_path, tensors):
    folder = tmp_path / "b"
    with atomic_folder(folder) as new:
        write_tensors(new / "model.safetensors", tensors)
    path = folder / "model.safetensors"
    good = path.read_bytes()
    rng = random.Random(1)
    for _ in range(50):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
        with pytest.raises(WeightsError, match=r"model\.safetensors was altered"):
            verify_manifest(folder)


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    for value in (torch.tensor([1.0, math.nan]), torch.tensor([1 + 1j])):
        with pytest.raises(WeightsError, match="'bad'"):
            write_tensors(tmp_path / "f", {"bad": value})
        with pytest.raises(ValueError):
            write_json(tmp_path / "f", {"x": math.nan})
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "f", {"old": 1})
    writer = atomic_file(tmp_path / "f")
    writer.__enter__().write(b"half")
    writer.__exit__(RuntimeError, RuntimeError(), None)
    assert json.loads((tmp_path / "f").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "run"
    writer = atomic_folder(folder)
    write_json(writer.__enter__() / "a.json", 1)
    writer.__exit__(RuntimeError, RuntimeError(), None)
    assert not list(tmp_path.iterdir())
    with atomic_folder(folder) as new:
        write_json(new / "a.json", 1)
        write_json(new / "b.json", 2)
    (folder / "log.txt").write_text("kept")
    with atomic_folder(folder) as new:
        write_json(new / "a.json", 3)
    assert {p.name for p in folder.iterdir()} == {"a.json", "log.txt", "manifest.json"}
    assert verify_manifest(folder).keys() == {"a.json"}


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(WeightsError, match=r"config\.json exists and is not ours"), atomic_folder(tmp_path) as new:
        write_json(new / "config.json", 1)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_manifest_names_what_is_wrong(tmp_path):
    folder = tmp_path / "b"
    with atomic_folder(folder) as new:
        (new / "deep").mkdir()
        write_json(new / "deep" / "a.json", "text")
    before = folder_hash(folder)
    path = folder / "deep" / "a.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(WeightsError, match=r"a\.json has 8 bytes; allowed: 7"):
        verify_manifest(folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"a\.json is missing"):
        verify_manifest(folder)
    assert folder_hash(folder) == before
    for text in ("", "{}", '{"format": 1, "files": {"../x": {"size": 1, "sha256": "' + "0" * 64 + '"}}}', '{"format": 2, "files": {}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(WeightsError, match="manifest"):
            verify_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"no manifest\.json"):
        verify_manifest(folder)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".step-1.tmp-0badcafe").mkdir()
    (tmp_path / ".f.tmp-00000000").write_text("half")
    (tmp_path / "step-1").mkdir()
    remove_temporary(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_fingerprints_tell_shape_and_dtype_apart():
    value = torch.zeros(4)
    assert fingerprint(value) == fingerprint(value.clone())
    assert len({fingerprint(v) for v in (value, value.view(2, 2), value.int(), value + 1)}) == 4
