"""Compressed streams by the suffix of a file's name: .gz .tgz .bz2 .xz .zst."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What a stream that is no such compression, or is cut short, raises while it is read."""


def inner_name(name: str) -> str:
    """The name without the suffix of its compression: `a.jsonl.gz` -> `a.jsonl`, `a.tgz` -> `a.tar`."""
    if name.lower().endswith(".tgz"):
        return name[: -len("tgz")] + "tar"
    return name[: len(name) - len(_suffix(name))]


def decompressed(name: str, stream: IO[bytes]) -> IO[bytes]:
    """The stream itself where the name says no compression."""
    suffix = _suffix(name)
    return _CODECS[suffix](stream) if suffix else stream


def _suffix(name: str) -> str:
    lower = name.lower()
    return ".tgz" if lower.endswith(".tgz") else next((s for s in _CODECS if lower.endswith(s)), "")


class _Zstandard(io.RawIOBase):
    """zstandard's reader, with the error that the other codecs have."""

    def __init__(self, stream: IO[bytes]) -> None:
        import zstandard

        super().__init__()
        self._error = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error:
            raise EOFError("broken zstandard stream") from None


_CODECS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda stream: io.BufferedReader(_Zstandard(stream), 2**20),
}
