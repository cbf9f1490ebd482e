"""The documents of a file, whatever its format and compression. What cannot be read costs itself, never the job."""

from __future__ import annotations

import importlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from orchestrator import storage
from orchestrator.corpus_config import Source
from orchestrator.data import compression, records
from orchestrator.data.readers import Unreadable, code, markup, plain

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Of a file that is one document, decompressed. A larger one is dropped as too large, before it is held in memory."""
MAX_PDF_BYTES = 256 * 2**20
"""Most of them are pictures."""
MAX_NESTING = 2
"""Archives within archives: arXiv's bulk files hold submissions."""

STORAGE_FAILED = "storage failed"
"""The one reason that may not hold the next time: such a file is read again by the next command."""


@dataclass(frozen=True)
class Document:
    id: str
    """`source/file`, or `source/file#place` in a file of many; stable while the source's files keep their names."""
    text: str


@dataclass(frozen=True)
class Dropped:
    """A document that is not part of the corpus, and why."""

    id: str
    reason: str
    text: str = ""


Found = Iterator[Document | Dropped]


def read_documents(uri: str, name: str, source: Source, start: int = 0, end: int | None = None) -> Found:
    """Every document of a file, or of the records that begin between two bytes of it.

    Args:
        name: of the file, relative to the source.
    """
    identity = f"{source.name}/{name}".encode("utf-8", "replace").decode()
    try:
        with storage.reading(uri) as stream:
            yield from _read(identity, name, stream, source, start, end)
    except Exception as error:  # whatever it is: the file is lost, the job goes on
        yield Dropped(identity, _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, Unreadable):
        return str(error)
    if compression.is_broken(error):
        return "broken compression"
    if isinstance(error, OSError):
        return STORAGE_FAILED
    return f"reader failed: {type(error).__name__}"


def is_known(name: str) -> bool:
    """Whether the name says a format that Terrane reads; a compressed file may hold one."""
    inner = compression.inner_name(name)
    return inner != name or _format(name) is not None


def _read(
    identity: str, name: str, raw: IO[bytes], source: Source, start: int = 0, end: int | None = None, depth: int = 0
) -> Found:
    stream, inner = compression.decompressed(name, raw), compression.inner_name(name)
    format_ = source.format if source.format != "auto" else _format(inner)
    if format_ == "jsonl":
        yield from _read_lines(identity, stream, source, start, end)
    elif format_ == "parquet":
        seekable = stream if inner == name else io.BytesIO(_bounded(stream, MAX_DOCUMENT_BYTES))
        yield from _read_rows(identity, seekable, source, start, end)
    elif format_ == "tar":
        yield from _read_tar(identity, stream, source, depth)
    else:
        data = _bounded(stream, MAX_PDF_BYTES if format_ == "pdf" else MAX_DOCUMENT_BYTES)
        if _is_tar(data):
            yield from _read_tar(identity, io.BytesIO(data), source, depth)
        else:
            read = _FORMATS[format_ if format_ in _FORMATS else _sniff(data, format_)]
            yield Document(identity, _selected(read(data, inner), source))


def _bounded(stream: IO[bytes], limit: int) -> bytes:
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise Unreadable("too large")
    return data


def _selected(text: str, source: Source) -> str:
    return markup.abstract_introduction_conclusion(text) if source.select != "all" else text


# --- files of many documents ------------------------------------------------------------------------------------------


def _read_lines(identity: str, stream: IO[bytes], source: Source, start: int, end: int | None) -> Found:
    for offset, line in records.json_lines(stream, start, end):
        place = f"{identity}#{offset}"
        try:
            if line is None:
                raise Unreadable("too large")
            record = records.parse(line)
        except Unreadable as reason:
            yield Dropped(place, str(reason))
        else:
            yield _record(place, record, source)


def _read_rows(identity: str, stream: IO[bytes], source: Source, start: int, end: int | None) -> Found:
    for row, record in records.parquet_rows(stream, source, start, end):
        yield _record(f"{identity}#{row}", record, source)


def _record(place: str, record: object, source: Source) -> Document | Dropped:
    try:
        return Document(place, _selected(records.text_of(record, source), source))
    except Unreadable as reason:
        return Dropped(place, str(reason))


def _read_tar(identity: str, stream: IO[bytes], source: Source, depth: int) -> Found:
    """An archive with LaTeX in it is one submission; of any other, or a large one, each member is a file of its own."""
    if depth == MAX_NESTING:
        raise Unreadable("nested archives")
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) <= MAX_DOCUMENT_BYTES and _is_submission(data, source):
        yield Document(identity, _selected(_reader("latex", "read_archive")(data, identity), source))
        return
    rest: Any = _Joined(io.BytesIO(data), stream)
    del data
    try:
        with tarfile.open(fileobj=rest, mode="r|") as archive:
            for member in archive:
                if member.isfile() and (is_known(member.name) or source.format != "auto"):
                    yield from _read_member(f"{identity}#{member.name}", member, archive, source, depth)
    except tarfile.TarError:
        yield Dropped(identity, "broken tar")


def _read_member(identity: str, member: tarfile.TarInfo, archive: tarfile.TarFile, source: Source, depth: int) -> Found:
    stream = archive.extractfile(member)
    assert stream is not None, "only files are asked for"
    try:
        yield from _read(identity, member.name, stream, source, depth=depth + 1)
    except tarfile.TarError:
        raise
    except Exception as error:  # it costs itself, not those after it
        yield Dropped(identity, _reason(error))


def _is_submission(data: bytes, source: Source) -> bool:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return source.format == "latex" or any(member.name.lower().endswith(".tex") for member in archive)
    except (tarfile.TarError, EOFError):
        return False


class _Joined:
    """One stream after another, as tarfile reads them."""

    def __init__(self, *streams: IO[bytes]) -> None:
        self._streams = list(streams)

    def read(self, size: int) -> bytes:
        while self._streams:
            if data := self._streams[0].read(size):
                return data
            self._streams.pop(0)
        return b""


def _is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar"


# --- formats ----------------------------------------------------------------------------------------------------------


def _reader(module: str, function: str = "read") -> Callable[[bytes, str], str]:
    """A reader that is imported when it is first used: most need a library that takes its time."""

    def read(data: bytes, name: str) -> str:
        return str(getattr(importlib.import_module(f"orchestrator.data.readers.{module}"), function)(data))

    return read


def _record_file(data: bytes, name: str) -> str:
    return records.text_of(records.parse(data), Source(name="json", path="/"))


_FORMATS: dict[str, Callable[[bytes, str], str]] = {
    "text": plain.text,
    "markdown": plain.text,
    "metadata": plain.metadata,
    "docstrings": plain.docstrings,
    "code": code.read,
    "html": _reader("html"),
    "latex": _reader("latex"),
    "jats": _reader("jats"),
    "tei": _reader("tei"),
    "s2orc": _record_file,
    "pdf": _reader("pdf"),
}

_SUFFIXES = dict.fromkeys(code.SUFFIXES, "code") | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".tex": "latex",
    ".nxml": "jats",
    ".xml": "xml",
    ".json": "s2orc",
    ".pdf": "pdf",
    "metadata": "metadata",
}

SPLITTABLE = (".jsonl", ".ndjson", ".parquet")
"""Uncompressed files of many records, which can be read from any byte on."""


def _format(name: str) -> str | None:
    """The format that a name says, by its longest suffix that is known."""
    lower = name.lower()
    return _SUFFIXES[max(found, key=len)] if (found := [s for s in _SUFFIXES if lower.endswith(s)]) else None


def _sniff(data: bytes, named: str | None) -> str:
    """The format that the content shows, where the name says none or only that it is XML.

    Raises:
        Unreadable: XML of an unknown kind.
    """
    head = data[: 2**16].lstrip()
    if head.startswith(b"%PDF-"):
        return "pdf"
    if b"<TEI" in head:
        return "tei"
    if b"<article" in head and not head.lower().startswith(b"<!doctype html"):
        return "jats"
    if head[:200].lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    if b"\\documentclass" in head or b"\\begin{document}" in head or b"\\section" in head:
        return "latex"
    if named == "xml" or head.startswith(b"<?xml"):
        raise Unreadable("unknown xml")
    return "text"
