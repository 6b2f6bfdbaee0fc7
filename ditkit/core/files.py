"""Files that are whole or absent: strict tensor files, JSON, folders with a manifest of sizes and SHA-256.

Everything is written under a temporary name, flushed to the disk and then renamed. Tensor files are in the safetensors format,
read more strictly than its own loader does: a key given twice, bytes that no tensor owns, and NaN or infinity are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from .errors import WeightsError, nearest

MANIFEST = "manifest.json"
MAX_HEADER_BYTES = 100_000_000  # as the format says
_TEMPORARY = ".tmp-"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Shape = Sequence[int]


class Source(Protocol):
    """Tensors by name, read one at a time, so that a large model need not be in memory twice."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What ``read`` knows: name -> shape."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


def read_tensors(path: str | Path, expect: Mapping[str, Shape | Tensor] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Args:
        expect: names and shapes that the file must hold, no more and no less; or tensors (a ``state_dict``), which also say where
            the file must hold floating-point numbers.

    Raises:
        WeightsError: naming the file and the tensor that is missing, extra, given twice, misshapen, non-finite or cut off.
    """
    with TensorFile(path) as file:
        if expect is not None:
            file.check(expect)
        return {name: file.read(name) for name in file.entries}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands in its file: bytes ``start`` to ``end`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open tensor file whose header was checked; ``read`` brings one tensor into memory. A ``Source``, and a context manager;
    without ``with`` it is closed when nobody holds it any more.

    Attributes:
        entries: what the file holds, by name, in the order of the data.
        metadata: the strings stored beside the tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise WeightsError(f"{self.path} does not exist", hint="check the path")
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be opened: {error.strerror}", hint="check its permissions") from None
        weakref.finalize(self, self._file.close)
        self.metadata, self.entries, self._data = _read_header(self._file, self.path)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def check(self, expect: Mapping[str, Shape | Tensor]) -> None:
        """Raise WeightsError unless the file holds exactly what ``expect`` says (see ``read_tensors``)."""
        check_shapes(self.path, {n: e.shape if isinstance(e, Tensor) else e for n, e in expect.items()}, self.shapes)
        for name, wanted in expect.items():
            if isinstance(wanted, Tensor):
                check_kind(self.path, name, self.entries[name].dtype, wanted.dtype)

    def read(self, name: str) -> Tensor:
        """One tensor, finite throughout."""
        entry = self.entries[name]
        value = torch.empty(entry.shape, dtype=entry.dtype)
        if value.numel():
            raw = value.reshape(-1).view(torch.uint8)
            self._file.seek(self._data + entry.start)
            if self._file.readinto(raw.numpy().data) != len(raw):  # type: ignore[attr-defined]
                raise WeightsError(f"{self.path}: {name!r} is cut off", hint="copy or download the file again")
            if entry.dtype == torch.bool and bool((raw > 1).any()):
                raise WeightsError(f"{self.path}: {name!r} holds bytes that are no booleans", hint="make the file again")
        check_finite(self.path, name, value)
        return value


def check_names(path: str | Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise WeightsError naming what ``found`` lacks of ``wanted`` or has beyond it."""
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if not missing and not extra:
        return
    parts = [f"{kind} {_some(names)}" for kind, names in (("missing", missing), ("unknown", extra)) if names]
    hint = nearest(extra[0], missing) if extra and missing else ""
    raise WeightsError(
        f"{path}: {', '.join(parts)}", allowed=f"exactly the {len(wanted)} tensors of the model", hint=hint or "check the file"
    )


def check_shapes(path: str | Path, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise WeightsError unless ``found`` has exactly the names and shapes of ``wanted``."""
    check_names(path, wanted, found)
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise WeightsError(f"{path}: {name!r} is {tuple(found[name])}", allowed=f"{tuple(shape)}", hint="check the configuration")


def check_kind(path: str | Path, name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Raise WeightsError where one dtype is of floating-point numbers and the other is not, or integers differ in theirs."""
    if found != wanted and not (found.is_floating_point and wanted.is_floating_point):
        allowed = "floating-point numbers" if wanted.is_floating_point else str(wanted)
        raise WeightsError(f"{path}: {name!r} is {found}", allowed=allowed, hint="check the file")


def check_finite(path: str | Path, name: str, value: Tensor) -> None:
    """Raise WeightsError if a floating-point tensor holds NaN or infinity."""
    if not value.is_floating_point():
        return
    for i, part in enumerate(value.reshape(-1).split(1 << 20)):  # in parts: the mask must not cost a copy of the tensor
        part = part.float() if part.element_size() == 1 else part
        if bool(part.sum(dtype=None if part.element_size() > 2 else torch.float32).isfinite()):
            continue  # NaN and infinity survive a sum, and it costs a fifth
        bad = ~torch.isfinite(part)
        if bool(bad.any()):
            at = (i << 20) + int(bad.nonzero()[0])
            raise WeightsError(f"{path}: {name!r} is not finite at element {at}", hint="use a file from before the run diverged")


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, TensorEntry], int]:
    """Metadata, entries and the place of the first data byte; 8 bytes of length, then JSON, then data without a gap."""

    def refuse(what: str) -> WeightsError:
        return WeightsError(f"{path}: {what}", allowed="a whole safetensors file", hint="copy or download the file again")

    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise refuse(f"has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise refuse(f"claims a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise refuse("has no JSON header")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(f"has a damaged header ({str(error)[:120]})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("has metadata that are no strings")
    try:
        entries = {name: _entry(name, value) for name, value in header.items()}
    except ValueError as error:
        raise refuse(str(error)) from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise refuse(f"{name!r} starts at byte {entry.start}, the tensor before it ends at {end}")
        end = entry.end
    if end != size - 8 - length:
        raise refuse(f"has {size - 8 - length} bytes of data, its tensors take {end}")
    return metadata, entries, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode("utf-8")  # a lone surrogate is no text
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r} is of dtype {value['dtype']!r}; known: {', '.join(_DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"{name!r} has shape {shape!r} and offsets {offsets!r}")
    if len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"{name!r} has {len(shape)} dimensions and {len(offsets)} offsets")
    dtype = _DTYPES[value["dtype"]]
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} of shape {shape} and {value['dtype']} does not fill bytes {offsets[0]} to {offsets[1]}")
    return TensorEntry(dtype, tuple(shape), *offsets)


def fingerprint(value: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{_NAMES.get(value.dtype, value.dtype)} {list(value.shape)} ".encode())
    digest.update(_bytes(value))
    return digest.hexdigest()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata for ``write_tensors`` by which a tensor that is changed later can be named."""
    return {"sha256": json.dumps({name: fingerprint(value) for name, value in tensors.items()})}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically; equal content gives equal bytes.

    Raises:
        WeightsError: a tensor is not finite, or of a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))  # large items first keeps all of them aligned
    start = 0
    for name in order:
        value = tensors[name]
        if value.dtype not in _NAMES:
            raise WeightsError(f"{path}: {name!r} is {value.dtype}", allowed=", ".join(_NAMES[d] for d in _NAMES))
        check_finite(path, name, value.detach())
        end = start + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(tensors[name]))


def _bytes(value: Tensor) -> Any:
    if not value.numel():
        return b""
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_json(path: str | Path, data: Any) -> None:
    """Write plain data, atomically."""
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for writing that becomes ``path`` when the block ends without an error, and never existed otherwise."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write into. When the block ends without an error its files are on the disk at ``path``, with a manifest.

    Where ``path`` exists, its files are replaced by name, what the old manifest listed and the new one lacks is removed, and
    everything else in it (checkpoints, logs) is left alone.

    Raises:
        WeightsError: ``path`` is a file, or holds a file of one of these names that no manifest of ours lists.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise WeightsError(f"{path} is a file", hint="choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        if path.exists():
            _replace_files(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def write_manifest(folder: Path) -> None:
    """Flush all files of ``folder`` to the disk and write ``manifest.json``, last."""
    files = {}
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    for sub in {(folder / name).parent for name in files}:
        _sync(sub)
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """Check every file that the manifest lists; returns the list (file -> size, sha256).

    Raises:
        WeightsError: naming the file that is missing or altered, or saying that there is no manifest.
    """
    folder = Path(folder)
    files = _read_manifest(folder)
    again = "save or copy the folder again"
    for name, want in files.items():
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name} is missing", allowed="every file that manifest.json lists", hint=again)
        if (folder / name).stat().st_size != want["size"]:
            size = (folder / name).stat().st_size
            raise WeightsError(f"{folder / name} has {size} bytes", allowed=f"{want['size']}, as manifest.json says", hint=again)
        if _sha256(folder / name) != want["sha256"]:
            raise WeightsError(f"{folder / name} was altered: its SHA-256 is not the one in manifest.json", hint=again)
    return files


def folder_hash(folder: str | Path, names: Sequence[str] | None = None) -> str:
    """SHA-256 of names and contents: of the files ``names``; or of those that the manifest lists; or, without one, of all files."""
    folder = Path(folder)
    if names is None and (folder / MANIFEST).is_file():
        listed = {name: want["sha256"] for name, want in _read_manifest(folder).items()}
    else:
        listed = {name: _sha256(folder / name) for name in (_files(folder) if names is None else names)}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def remove_temporary(folder: str | Path) -> None:
    """Remove what writers that were killed left in ``folder``. Only for the one process that writes there."""
    for leftover in Path(folder).glob(f".*{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{folder} has no {MANIFEST}", hint="the folder was not saved to the end; save or copy it again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        files = data["files"]
        if data["format"] != 1 or not all(_plain_name(n) and type(f["size"]) is int and len(f["sha256"]) == 64 for n, f in files.items()):
            raise ValueError("it lists no files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({str(error)[:120]})", hint="save or copy the folder again") from None
    return files


def _plain_name(name: str) -> bool:
    """A relative name inside the folder."""
    parts = PurePosixPath(name).parts
    known = bool(parts) and len(name.encode()) < 1024 and all(len(part.encode()) < 256 for part in parts)  # longer: no file system has it
    return known and not PurePosixPath(name).is_absolute() and ".." not in parts and "\\" not in name and "\0" not in name


def _replace_files(new: Path, old: Path) -> None:
    listed = set(_read_manifest(old)) if (old / MANIFEST).is_file() else set()
    names = _files(new)
    for name in names:
        if (old / name).exists() and name not in listed:
            raise WeightsError(f"{old / name} exists and is not ours", hint="choose another folder, or move that file away")
    for name in names:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, old / name)
    for name in listed - set(names):
        (old / name).unlink(missing_ok=True)
    os.replace(new / MANIFEST, old / MANIFEST)
    _sync(old)


def _files(folder: Path) -> list[str]:
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != MANIFEST)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
