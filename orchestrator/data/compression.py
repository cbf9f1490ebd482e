"""Compressed streams by the suffix of a file's name: .gz .tgz .bz2 .xz .zst."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any


def is_broken(error: BaseException) -> bool:
    """Whether a stream raised this because it is no such compression, or is cut short."""
    if isinstance(error, FileNotFoundError):
        return False
    # bz2 and Arrow raise a bare OSError; one from the system has a number.
    return isinstance(error, (EOFError, zlib.error, lzma.LZMAError)) or (
        isinstance(error, OSError) and error.errno is None
    )


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


def _zstandard(stream: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa  # the zstandard package takes a stream that is cut short for a whole one

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")  # type: ignore[no-any-return]


_CODECS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda stream: io.BufferedReader(_zstandard(stream), 2**20),
}
