"""The scan before the first step: every picture and caption that cannot be used is named, with the reason.

A picture is read once, checked from its header against the limits, then decoded whole. What was found is kept by (name, size,
modification time), so that a second scan reads nothing but captions. Bad files are listed, never touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import UnidentifiedImageError
from pydantic import Field
from tqdm import tqdm

from ditkit.core.config import Config
from ditkit.core.errors import DitkitError
from ditkit.core.files import atomic_file, write_json

from .captions import CaptionError, check_encoding, decode_caption
from .transforms import FORMATS, Refused, check_mode, is_turned, open_header, quiet

log = logging.getLogger("ditkit.data")
_CHUNK = 256  # samples between two writes of the cache
_SHOWN = 10  # names in one error


class Limits(Config):
    """What is refused before it is decoded."""

    max_pixels: int = Field(64_000_000, ge=1, description="pixels of a picture, read from its header")
    max_bytes: int = Field(64_000_000, ge=1, description="bytes of a picture file")
    max_aspect: float = Field(32.0, ge=1, description="longer side over shorter side")
    max_caption_bytes: int = Field(65_536, ge=1, description="bytes of a caption")


class Member(NamedTuple):
    """A file, or a part of an archive. ``name`` is what reports and caches call it; paths are relative to the root."""

    name: str
    file: str
    offset: int
    size: int
    mtime_ns: int


class Sample(NamedTuple):
    """A picture, and what belongs to it."""

    picture: Member
    caption: Member | None = None
    label: str | None = None


class Picture(NamedTuple):
    """A sample that passed the scan; ``width`` and ``height`` are of the upright picture."""

    sample: Sample
    width: int
    height: int
    sha256: str


class Fault(NamedTuple):
    """A file that is not used. ``offset``: the first bad byte of a caption."""

    name: str
    reason: str
    offset: int | None = None


@dataclass
class Listing:
    """The files of a folder: samples in the order of their names, and files that can be no sample."""

    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        pictures: the usable samples, in the order they were given.
        faults: the files that are not used, each with the reason.
        empty_captions, missing_captions: counts among ``pictures``.
        decoded: pictures that were read; the others were known from an earlier scan.
        quarantine: the file with the list of faults; None where nothing is kept on disk.
    """

    root: Path
    pictures: list[Picture]
    faults: list[Fault]
    empty_captions: int
    missing_captions: int
    decoded: int
    quarantine: Path | None

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{len(self.pictures)} usable pictures in {self.root}"]
        parts += [f"{n} {what}" for n, what in ((self.empty_captions, "empty captions"), (self.missing_captions, "without a caption")) if n]
        if self.faults:
            parts.append(f"{len(self.faults)} in quarantine ({self.quarantine or 'see .faults'}): {_listed(self.faults)}")
        return ", ".join(parts)


def scan(
    root: Path,
    samples: Sequence[Sample],
    *,
    cache: Path | None = None,
    faults: Iterable[Fault] = (),
    limits: Limits | None = None,
    caption_encoding: str = "utf-8",
    strict: bool = False,
    refuse: Callable[[int, int], str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Scan:
    """Check every sample of ``root``.

    Args:
        cache: folder for what was found (``scan.jsonl``) and the list of faults (``quarantine.json``); None keeps nothing.
        faults: found while listing, to be reported with the rest.
        strict: stop at the end of the scan if there is any fault.
        refuse: (height, width) -> why a good picture of that size is not used, or "".
        workers: threads that decode; default: up to 8, one a processor.

    Raises:
        DitkitError: no sample is usable; or ``strict`` and one is not; naming files and reasons.
    """
    limits = limits or Limits()
    known = _Cache(cache / "scan.jsonl" if cache else None)
    bad, good = list(faults), []
    empty = decoded = 0
    check = _Checker(root, limits, caption_encoding, known)
    workers = workers or min(8, os.cpu_count() or 1)
    with known, quiet, ThreadPoolExecutor(workers) as pool, tqdm(total=len(samples), desc="scan", delay=2, disable=not progress) as bar:
        for chunk in _chunks(samples, _CHUNK):
            apply = map if all(check.knows(s) for s in chunk) else pool.map
            for sample, (record, is_new, caption) in zip(chunk, apply(check, chunk)):
                decoded += is_new
                if is_new:
                    known.add(sample.picture, record)
                reason = record.reason or (refuse(record.height, record.width) if refuse else "")
                found = [f for f in (Fault(sample.picture.name, reason) if reason else None, caption.fault) if f]
                bad += found
                if not found:
                    good.append(Picture(sample, record.width, record.height, record.sha256))
                    empty += caption.empty
            known.flush()
            bar.update(len(chunk))
    missing = sum(p.sample.caption is None for p in good) if any(s.caption for s in samples) else 0
    result = Scan(root, good, sorted(bad, key=_by_name), empty, missing, decoded, _write_quarantine(cache, root, bad))
    _judge(result, strict)
    return result


def _judge(result: Scan, strict: bool) -> None:
    if not result.pictures:
        why = _listed(result.faults) or "it holds no picture files"
        raise DitkitError(f"there is no usable picture in {result.root}: {why}", hint="check the path and the files")
    if result.faults and strict:
        raise DitkitError(
            f"{len(result.faults)} files of {result.root} cannot be used: {_listed(result.faults)}",
            hint="mend or remove them, or leave strict_data off to train without them",
        )
    if result.faults or result.empty_captions:
        log.warning("%s", _printable(result.summary()))


def _listed(faults: Sequence[Fault]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(f"{f.name}: {f.reason}" for f in faults[:_SHOWN]) + more


def _write_quarantine(cache: Path | None, root: Path, faults: list[Fault]) -> Path | None:
    """The list of faults, always rewritten: an old list must not outlive the files that it names."""
    if cache is None:
        return None
    path = cache / "quarantine.json"
    files = [{k: _printable(v) for k, v in f._asdict().items()} for f in sorted(faults, key=_by_name)]
    write_json(path, {"format": 1, "root": _printable(str(root)), "count": len(files), "files": files})
    return path


def _by_name(fault: Fault) -> str:
    return fault.name


def _printable(value: Any) -> Any:
    """File names that are no Unicode text, with their bytes written out."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if isinstance(value, str) else value


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while chunk := list(islice(rest, size)):
        yield chunk


# --- one sample ---


class _Record(NamedTuple):
    """What is known of a picture; ``reason`` is empty where it is good."""

    rule: str
    sha256: str
    width: int
    height: int
    reason: str


class _Caption(NamedTuple):
    fault: Fault | None
    empty: bool


class _Checker:
    """Checks one sample; called from several threads, changes nothing."""

    def __init__(self, root: Path, limits: Limits, encoding: str, known: _Cache) -> None:
        self.root, self.limits, self.encoding, self.known = root, limits, encoding, known
        self.rule = hashlib.sha256(json.dumps(limits.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
        check_encoding(encoding)

    def __call__(self, sample: Sample) -> tuple[_Record, bool, _Caption]:
        record = self.known.get(sample.picture, self.rule)
        if record is not None:
            return record, False, self._caption(sample.caption)
        try:
            record, is_new = self._picture(sample.picture), True
        except OSError as error:  # the disk's fault, perhaps not for long: reported, not remembered
            record, is_new = self._bad(f"cannot be read: {error.strerror or error}"), False
        return record, is_new, self._caption(sample.caption)

    def knows(self, sample: Sample) -> bool:
        """Whether nothing has to be read."""
        return sample.caption is None and self.known.get(sample.picture, self.rule) is not None

    def _picture(self, member: Member) -> _Record:
        limits = self.limits
        if not 0 < member.size <= limits.max_bytes:
            return self._bad(f"has {member.size} bytes (allowed: 1 to {limits.max_bytes})")
        raw = read_member(self.root, member)
        try:
            width, height = check_picture(raw, limits)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes Pillow raise almost any exception; the reason is kept
            return self._bad(_reason(error, limits))
        return _Record(self.rule, hashlib.sha256(raw).hexdigest(), width, height, "")

    def _bad(self, reason: str) -> _Record:
        return _Record(self.rule, "", 0, 0, reason)

    def _caption(self, member: Member | None) -> _Caption:
        if member is None:
            return _Caption(None, False)
        if member.size > self.limits.max_caption_bytes:
            return _Caption(Fault(member.name, f"has {member.size} bytes (allowed: {self.limits.max_caption_bytes})"), False)
        try:
            return _Caption(None, not decode_caption(read_member(self.root, member), self.encoding))
        except CaptionError as error:
            return _Caption(Fault(member.name, error.reason, error.offset), False)
        except OSError as error:
            return _Caption(Fault(member.name, f"cannot be read: {error.strerror or error}"), False)


def read_member(root: Path, member: Member) -> bytes:
    """The bytes of a file or of a part of an archive. Raises OSError where it is gone or shorter than it was."""
    with open(root / member.file, "rb") as file:
        file.seek(member.offset)
        raw = file.read(member.size)
    if len(raw) != member.size:
        raise OSError(f"{member.name} has {len(raw)} bytes, it had {member.size} when it was listed")
    return raw


def check_picture(raw: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) of the upright picture, once all of it was read. Raises Refused, or what Pillow raises."""
    image = open_header(raw)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise Refused(f"has {width * height} pixels, {width}x{height} (allowed: {limits.max_pixels})")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Refused(f"has sides of {width} and {height} pixels (allowed: one up to {limits.max_aspect:g} times the other)")
    check_mode(image)
    if image.format == "PNG":
        image.verify()  # checksums, which decoding ignores; after it the file must be opened anew
        image = open_header(raw)
    image.draft(image.mode, (width // 8, height // 8))  # a JPEG is read to its end, but computed at an eighth of its size
    image.load()
    return (height, width) if is_turned(image) else (width, height)


def _reason(error: Exception, limits: Limits) -> str:
    """Pillow's exception in words that say what is the matter with the file."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"is no picture of a known format ({', '.join(FORMATS)})"
    if bomb := re.search(r"Image size \((\d+) pixels\)", str(error)):
        return f"has {bomb[1]} pixels (allowed: {limits.max_pixels})"
    text = str(error).strip() or type(error).__name__
    return f"is cut off ({text})" if "truncated" in text.lower() else f"is damaged ({text})"


# --- what earlier scans found ---


class _Cache:
    """``scan.jsonl``: one line for each picture checked, appended as the scan goes, so that a scan that is cut off goes on.

    A line that was cut off, or is no record, is dropped: its picture is checked again. Of several processes that scan one
    folder, such as those of one training run, one does the work and the others wait for it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, tuple[int, int, _Record]] = {}
        self._new: list[str] = []
        self._held = ExitStack()

    def __enter__(self) -> _Cache:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(_alone(self.path.parent / "scan.lock"))
            if self.path.is_file():
                self._load(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._known.clear()
        self._held.close()

    def _load(self, path: Path) -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = sum(self._take(line) for line in file)
        if lines > 2 * len(self._known) + _CHUNK:
            self._rewrite(path)

    def _take(self, line: str) -> bool:
        try:
            name, size, mtime_ns, rule, sha256, width, height, reason = json.loads(line)
            well_formed = all(type(v) is int for v in (size, mtime_ns, width, height)) and all(
                type(v) is str for v in (name, rule, sha256, reason)
            )
        except (ValueError, TypeError, RecursionError):
            return False
        if well_formed and (reason or (len(sha256) == 64 and width > 0 and height > 0)):
            self._known[name] = (size, mtime_ns, _Record(rule, sha256, width, height, reason))
        return True

    def _rewrite(self, path: Path) -> None:
        """Without the lines that later ones replaced."""
        with atomic_file(path) as file:
            for name, (size, mtime_ns, record) in self._known.items():
                file.write(json.dumps([name, size, mtime_ns, *record]).encode() + b"\n")

    def get(self, member: Member, rule: str) -> _Record | None:
        size, mtime_ns, record = self._known.get(member.name, (-1, -1, None))
        fits = record is not None and (size, mtime_ns, record.rule) == (member.size, member.mtime_ns, rule)
        return record if fits else None

    def add(self, member: Member, record: _Record) -> None:
        self._new.append(json.dumps([member.name, member.size, member.mtime_ns, *record]))

    def flush(self) -> None:
        if self.path is not None and self._new:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(["", *self._new, ""]))  # the line feed before ends a line that was cut off
        self._new.clear()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the system can lock files; a process that dies lets go of it."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


__all__ = ["Fault", "Limits", "Member", "Picture", "Sample", "Scan", "check_picture", "read_member", "scan"]
