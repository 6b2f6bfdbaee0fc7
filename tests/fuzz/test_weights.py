"""2,000 weight files that are invalid by construction, through ``from_pretrained``: each is refused by the project's own error.

Every mutator makes something that no reader may accept. They change the file of a bundle whose manifest fits again (so that what
lies behind it is tested), the state of a method, or a diffusers folder without a manifest; data bytes are changed where the
manifest stands. The case is named by mutator and seed: ``rng(seed)`` makes it again.
"""

import copy
import json
import random
import struct

import pytest
from refusal import Kept, Verdict, load, seal, write_ours, write_theirs

from ditkit.core.files import read_tensors, write_tensors
from ditkit.eval.bench import peak_memory

pytestmark = pytest.mark.slow

INTEGERS = {"F32": ("I32", "U32"), "F16": ("I16", "U16")}
NOT_FINITE = [struct.pack("<f", v) for v in (float("nan"), float("inf"), float("-inf"))] + [b"\x01\x00\x80\x7f", b"\xff\xff\xff\xff"]


def split(raw):
    """Header without metadata, and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header.pop("__metadata__", None)
    return header, raw[end:]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def place(header, rng, least=1):
    """The name of a tensor with at least so many bytes."""
    sizes = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items()}
    return rng.choice(sorted(name for name, size in sizes.items() if size >= least))


def changed(change):
    """A mutator of the header only: ``change(header, name, rng)`` in place."""

    def mutate(raw, rng):
        header, data = split(raw)
        header = copy.deepcopy(header)
        change(header, place(header, rng), rng)
        return join(header, data)

    mutate.__name__ = change.__name__
    return mutate


# ---- the file as bytes


def truncated(raw, rng):
    return raw[: rng.randrange(len(raw))]


def extended(raw, rng):
    return raw + rng.randbytes(rng.randrange(1, 64))


def other_header_length(raw, rng):
    length = int.from_bytes(raw[:8], "little")
    return struct.pack("<Q", rng.choice([0, 1, length // 2, length - 1, length + 1, len(raw), 1 << 40, (1 << 64) - 1])) + raw[8:]


def zero_byte_in_header(raw, rng):
    header, data = split(raw)
    text = bytearray(json.dumps(header).encode())
    text[rng.randrange(len(text))] = 0
    return join(bytes(text), data)


def byte_of_no_text_in_header(raw, rng):
    header, data = split(raw)
    text = bytearray(json.dumps(header).encode())
    text[rng.randrange(len(text))] = rng.choice([0x80, 0xFF, 0xC0])
    return join(bytes(text), data)


def name_twice(raw, rng):
    header, data = split(raw)
    name = place(header, rng)
    text = json.dumps(header)
    return join(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), data)


def header_of_other_json(raw, rng):
    return join(rng.choice([b"[]", b"null", b"{}", b'"x"', b"[" * 50_000, b'{"a":' * 20_000, b"{" + b" " * 9]), split(raw)[1])


# ---- names, shapes, dtypes, places


@changed
def misspelled_name(header, name, rng):
    at = rng.randrange(len(name))
    header[name[:at] + rng.choice("xyz_.") + name[at:]] = header.pop(name)


@changed
def names_exchanged(header, name, rng):
    others = sorted(n for n in header if header[n]["shape"] != header[name]["shape"])
    other = rng.choice(others)
    header[name], header[other] = header[other], header[name]


def missing_tensor(raw, rng):
    """Its bytes go with it, and all others move up: the file is whole, only the tensor is not there."""
    header, data = split(raw)
    name = place(header, rng)
    start, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [n - (end - start) for n in entry["data_offsets"]]
    return join(header, data[:start] + data[end:])


def extra_tensor(raw, rng):
    header, data = split(raw)
    name = rng.choice(["x", "methods.x", place(header, rng) + "_2", "blocks.2.parts.img.qkv.weight", ""])
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    return join(header, data + b"\0" * 4)


@changed
def same_numbers_in_another_shape(header, name, rng):
    shape = header[name]["shape"]
    header[name]["shape"] = rng.choice([[1, *shape], [*shape, 1], [1, 1, *shape]] + ([shape[::-1]] if shape != shape[::-1] else []))


@changed
def another_size(header, name, rng):
    shape = list(header[name]["shape"])
    shape[rng.randrange(len(shape))] = rng.choice([0, 10_000, 1 << 40, 1 << 61, 1 << 70])
    header[name]["shape"] = shape


@changed
def no_shape(header, name, rng):
    header[name]["shape"] = rng.choice([None, "1", [-1], [1.5], [True], {}, [[1]], [1] * 70, ["16"]])


@changed
def integers_instead_of_numbers(header, name, rng):
    header[name]["dtype"] = rng.choice(INTEGERS[header[name]["dtype"]])


@changed
def no_dtype(header, name, rng):
    header[name]["dtype"] = rng.choice(["F31", "f32", "float32", "", None, 32, [], "C64", "F32 "])


@changed
def dtype_of_another_width(header, name, rng):
    header[name]["dtype"] = rng.choice(["F64", "BF16", "F8_E4M3", "U8", "BOOL", "I64"])


@changed
def other_offsets(header, name, rng):
    start, end = header[name]["data_offsets"]
    bad = [[end, start], [start + 1, end + 1], [start, end + 4], [start], [start, end, end], [-4, end - start - 4], [0, 1 << 62], None, "0"]
    header[name]["data_offsets"] = rng.choice(bad)


@changed
def field_missing_or_extra(header, name, rng):
    if rng.random() < 0.5:
        header[name]["more"] = 1
    else:
        del header[name][rng.choice(sorted(header[name]))]


@changed
def metadata_of_no_strings(header, name, rng):
    header["__metadata__"] = rng.choice([{"k": 1}, [], "x", {"k": {}}, {"k": None}])


# ---- numbers


def not_finite(raw, rng):
    header, data = split(raw)
    start, end = header[place(header, rng, least=4)]["data_offsets"]
    at = start + 4 * rng.randrange((end - start) // 4)
    return join(header, data[:at] + rng.choice(NOT_FINITE) + data[at + 4 :])


def one_copy_changed(raw, rng):
    """Of the embedders that diffusers keeps in every block, one number of one block."""
    header, data = split(raw)
    name = rng.choice(sorted(n for n in header if ".norm1.emb." in n))
    start, end = header[name]["data_offsets"]
    at = start + 4 * rng.randrange((end - start) // 4)
    value = struct.unpack("<f", data[at : at + 4])[0]
    return join(header, data[:at] + struct.pack("<f", value + rng.choice([-1.0, 1e-2, 3.0])) + data[at + 4 :])


FORM = [truncated, extended, other_header_length, zero_byte_in_header, byte_of_no_text_in_header, name_twice, header_of_other_json]
CONTENT = [
    misspelled_name,
    names_exchanged,
    missing_tensor,
    extra_tensor,
    same_numbers_in_another_shape,
    another_size,
    no_shape,
    integers_instead_of_numbers,
    no_dtype,
    dtype_of_another_width,
    other_offsets,
    field_missing_or_extra,
    metadata_of_no_strings,
    not_finite,
]


def cases(mutators, count):
    """name, mutator, random numbers: case k is a function of k alone."""
    for k in range(count):
        mutate = mutators[k % len(mutators)]
        yield f"{mutate.__name__} {k}", mutate, random.Random(k)


def fuzz(file, folder, mutators, count):
    load(folder)  # it is whole before
    verdict = Verdict()
    for name, mutate, rng in cases(mutators, count):
        with file(mutate(file.good, rng)):
            verdict(name, load, folder)
    load(folder)
    verdict.check(count)


def test_model_of_a_bundle(tmp_path):
    folder = write_ours(tmp_path / "b")
    fuzz(Kept(folder / "model.safetensors", sealed=True), folder, FORM + CONTENT, 700)


def test_state_of_a_method(tmp_path):
    folder = write_ours(tmp_path / "b")
    fuzz(Kept(folder / "methods" / "lora.safetensors", sealed=True), folder, FORM + CONTENT, 400)


def test_model_of_a_diffusers_folder(tmp_path):
    folder = write_theirs(tmp_path / "d")
    file = Kept(folder / "transformer" / "diffusion_pytorch_model.safetensors", sealed=False)
    fuzz(file, folder, [*FORM, *CONTENT, one_copy_changed], 500)


# ---- the manifest


def flipped(raw, rng):
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]


@pytest.mark.parametrize("name", ["model.safetensors", "methods/lora.safetensors", "config.json", "methods/lora.json"])
def test_a_byte_of_a_file_that_the_manifest_lists(tmp_path, name):
    folder = write_ours(tmp_path / "b")
    fuzz(Kept(folder / name, sealed=False), folder, [flipped], 75)


def listed_no_longer(manifest, name, rng):
    del manifest["files"][name]


def other_size(manifest, name, rng):
    manifest["files"][name]["size"] = rng.choice([0, -1, manifest["files"][name]["size"] + 1, "1", None, 1.5, True])


def other_hash(manifest, name, rng):
    digest = manifest["files"][name]["sha256"]
    manifest["files"][name]["sha256"] = rng.choice([digest[::-1], digest[:-1], digest.upper() + "0", "", None, 7, "0" * 64])


def other_name(manifest, name, rng):
    new = rng.choice(["../" + name, "/" + name, name + "x", name + "\0", "a\\" + name, "x" * 5000])
    manifest["files"][new] = manifest["files"].pop(name)


def other_format(manifest, name, rng):
    manifest["format"] = rng.choice([0, 2, "1", None, [1], 1.5])


def other_files(manifest, name, rng):
    manifest["files"] = rng.choice([[], None, "x", 7, {}, {name: None}, {name: []}, {name: {}}])


def test_the_manifest_itself(tmp_path):
    folder = write_ours(tmp_path / "b")
    path = folder / "manifest.json"
    good, verdict = path.read_text(), Verdict()
    for name, mutate, rng in cases([listed_no_longer, other_size, other_hash, other_name, other_format, other_files], 100):
        manifest = json.loads(good)
        mutate(manifest, rng.choice(sorted(manifest["files"])), rng)
        path.write_text(json.dumps(manifest))
        verdict(name, load, folder)
    path.write_text(good)
    load(folder)
    verdict.check(100)


def test_a_damaged_file_costs_less_than_twice_its_size(tmp_path):
    """The last number of 32 MB is not finite; and a header that claims a terabyte."""
    path, size = tmp_path / "large.safetensors", 32 * 2**20
    raw = join({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"\0" * (size - 4) + NOT_FINITE[0])
    claims = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(raw)
    (tmp_path / "claims.safetensors").write_bytes(join(claims, b"\0" * 64))
    del raw
    verdict = Verdict()
    before = peak_memory(lambda: None)
    if before is None:
        pytest.skip("this system does not say what memory a process used")
    peak = peak_memory(lambda: (verdict("large", read_tensors, path), verdict("claims", read_tensors, tmp_path / "claims.safetensors")))
    verdict.check(2)
    assert peak - before < 2 * size


def test_the_generators_are_complete(tmp_path):
    """Every mutator changes a bundle's file into one that differs, and the same seed gives the same bytes."""
    folder = write_ours(tmp_path / "b")
    raw = (folder / "model.safetensors").read_bytes()
    for mutate in FORM + CONTENT:
        assert mutate(raw, random.Random(3)) == mutate(raw, random.Random(3)) != raw
    write_tensors(folder / "model.safetensors", read_tensors(folder / "model.safetensors"))
    seal(folder)
    load(folder)  # a file written anew, without metadata, is still whole
