"""Steps of corpus preparation: pure functions from a document's text to a text, or to the reason why it is dropped."""

from __future__ import annotations

import re
import unicodedata

import xxhash

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Unicode in NFC, line ends as \\n, no control characters, no trailing blanks, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _TRAILING.sub("", _CONTROL.sub("", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def content_hash(text: str) -> bytes:
    """16 bytes, equal for texts that differ in letter case and white space only."""
    return bytes(xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode("utf-8", "surrogatepass")))


def drop_reason(text: str, min_characters: int) -> str | None:
    if len(text) < min_characters:
        return "too short"
    return None


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split: by its content, so it stays there when the corpus grows."""
    return int.from_bytes(digest[:8], "big") < share * 2**64
