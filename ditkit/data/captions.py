"""Captions beside pictures: bytes to text, strictly, naming the byte at fault."""

from __future__ import annotations

import codecs
import re

from ditkit.core.errors import DitkitError

_BOM = b"\xef\xbb\xbf"


class CaptionError(ValueError):
    """A caption that is no text in the given encoding: ``reason``, and ``offset`` of the first bad byte."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


def check_encoding(encoding: str) -> None:
    """Raise DitkitError unless Python knows ``encoding`` as an encoding of text."""
    try:
        b"00".decode(encoding)  # not b"": Python looks up no encoding for it
    except UnicodeDecodeError:
        return
    except (LookupError, ValueError):
        raise DitkitError(f"caption_encoding is {encoding!r}", allowed="an encoding that Python knows", hint="utf-8, cp1252, ...") from None


def decode_caption(raw: bytes, encoding: str) -> str:
    """The text of a caption without a byte-order mark and without space around it.

    Raises:
        CaptionError: naming the first byte that the encoding cannot read, or that is a control character.
    """
    utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    encoding = "utf-8" if utf8 else encoding
    start = len(_BOM) if utf8 and raw.startswith(_BOM) else 0
    try:
        text = raw[start:].decode(encoding)
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise CaptionError(f"byte 0x{raw[offset]:02x} at offset {offset} is not {encoding}{_guess(raw, utf8)}", offset) from None
    control = re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)
    if control:
        offset = start + len(text[: control.start()].encode(encoding))
        raise CaptionError(f"control character 0x{ord(control[0]):02x} at offset {offset}", offset)
    return text.removeprefix("\ufeff").strip()


def _guess(raw: bytes, utf8: bool) -> str:
    """What to try instead of UTF-8."""
    if not utf8:
        return ""
    other = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
    try:
        text = raw.decode(other).strip()
    except UnicodeDecodeError:
        return ""
    return f" (caption_encoding={other!r} reads {text[:40]!r})"
