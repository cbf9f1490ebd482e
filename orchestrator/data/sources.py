"""Sources -> files -> units of work. A unit keeps its number for life, so that new files cost only themselves."""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import storage
from orchestrator.config import expand_path
from orchestrator.corpus_config import CorpusConfig, Source
from orchestrator.data.documents import SPLITTABLE, is_known
from orchestrator.errors import UserError

log = logging.getLogger(__name__)

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 8 * 2**20, 64 * 2**20
UNITS = 32
"""Aimed at, between the two sizes."""


@dataclass(frozen=True)
class SourceFile:
    source: str
    uri: str
    name: str
    """Relative to the source's path."""
    bytes: int
    version: str
    """Changes when the content does."""


@dataclass(frozen=True)
class Piece:
    """A file, or the records of it that begin in a range of bytes."""

    file: SourceFile
    start: int = 0
    end: int | None = None
    """None: to the end of the file."""


@dataclass(frozen=True)
class Unit:
    """Pieces of one source that one task reads. Its number orders its documents among those of others (numbers.py)."""

    number: int
    source: str
    pieces: tuple[Piece, ...]


def list_sources(corpus: CorpusConfig) -> list[SourceFile]:
    """
    Raises:
        UserError: a source does not exist or holds no file to read.
    """
    return [file for source in corpus.sources for file in list_source(source)]


def list_source(source: Source) -> list[SourceFile]:
    """The files of a source that Terrane reads, sorted by name.

    Raises:
        UserError: the path does not exist or holds no such file.
    """
    path = expand_path(source.path)
    has_glob = any(sign in path for sign in "*?[") and (storage.is_s3(path) or not Path(path).exists())
    root = _before_glob(path) if has_glob else path
    if not storage.is_s3(path) and not Path(root).exists():
        raise UserError(f"source {source.name}: nothing at {root}", "check corpus.sources[].path")
    entries = storage.list_entries(root)
    if has_glob:
        chosen = _matching(source, root, path, entries)
    elif len(entries) == 1 and (storage.is_s3(path) or Path(path).is_file()) and _is_itself(path, entries[0]):
        root, chosen = path.rpartition("/")[0], entries
    else:
        chosen = [entry for entry in entries if _is_wanted(entry.name, source)]
        if chosen and not source.include and len(chosen) < len(entries):
            log.info("source %s: %d files of no known format passed over", source.name, len(entries) - len(chosen))
    if not chosen:
        patterns = ", ".join(source.include) or "a format that Terrane reads"
        if has_glob:
            raise UserError(f"source {source.name}: no file matches {path}", "check corpus.sources[].path")
        hint = (
            "drop `include`, or give patterns that match" if source.include else "name the format, and `include` files"
        )
        raise UserError(f"source {source.name}: no file under {path} matches {patterns}", hint)
    if not any(entry.bytes for entry in chosen):
        raise UserError(f"source {source.name}: all {len(chosen)} files under {path} are empty")
    return [
        SourceFile(source.name, storage.join(root, entry.name), entry.name, entry.bytes, entry.version)
        for entry in chosen
    ]


def make_units(files: Iterable[SourceFile], first: int = 0, unit_bytes: int | None = None) -> list[Unit]:
    """Consecutive pieces of one source, up to unit_bytes each, numbered from `first`.

    A file that can be read from any byte on is cut, every other is whole.
    """
    files = list(files)
    limit = unit_bytes or min(max(sum(f.bytes for f in files) // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    group: list[Piece] = []
    size = 0

    def close() -> None:
        nonlocal size
        if group:
            units.append(Unit(first + len(units), group[0].file.source, tuple(group)))
        group.clear()
        size = 0

    for piece, bytes_ in (cut for file in files for cut in _pieces(file, limit)):
        if group and (size + bytes_ > limit or group[0].file.source != piece.file.source):
            close()
        group.append(piece)
        size += bytes_
    close()
    return units


def extend_units(units: list[Unit], files: list[SourceFile]) -> list[Unit]:
    """The units of a listing, given those of an earlier one.

    A unit whose files are all as they were stays, and keeps its number; every other file goes into a new unit.
    """
    gone = {file for unit in units for file in _files(unit)} - set(files)
    while True:  # a file cut over several units goes as a whole
        leaving = {f for unit in units if _has(unit, gone) for f in _files(unit)}
        if leaving <= gone:
            break
        gone |= leaving
    staying = [unit for unit in units if not _has(unit, gone)]
    covered = {file for unit in staying for file in _files(unit)}
    first = max((unit.number for unit in units), default=-1) + 1
    return staying + make_units((file for file in files if file not in covered), first)


def _files(unit: Unit) -> set[SourceFile]:
    return {piece.file for piece in unit.pieces}


def _has(unit: Unit, files: set[SourceFile]) -> bool:
    return not files.isdisjoint(_files(unit))


def units_as_json(units: list[Unit]) -> list[Any]:
    """Plain values, for the corpus directory."""
    return [
        [
            u.number,
            u.source,
            [[p.start, p.end, p.file.uri, p.file.name, p.file.bytes, p.file.version] for p in u.pieces],
        ]
        for u in units
    ]


def units_from_json(values: list[Any]) -> list[Unit]:
    return [
        Unit(number, source, tuple(Piece(SourceFile(source, *file), start, end) for start, end, *file in pieces))
        for number, source, pieces in values
    ]


def _pieces(file: SourceFile, limit: int) -> list[tuple[Piece, int]]:
    if file.bytes <= limit or not file.name.lower().endswith(SPLITTABLE):
        return [(Piece(file), file.bytes)]
    count = -(-file.bytes // limit)
    edges = [file.bytes * index // count for index in range(count + 1)]
    return [(Piece(file, a, b), b - a) for a, b in itertools.pairwise(edges)]


def _before_glob(path: str) -> str:
    first = min(path.index(sign) for sign in "*?[" if sign in path)
    return path[:first].rpartition("/")[0] or "/"


def _matching(source: Source, root: str, path: str, entries: list[storage.Entry]) -> list[storage.Entry]:
    pattern = path[len(root) :].lstrip("/")
    if storage.is_s3(path):
        return [entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern)]
    try:
        names = {str(found.relative_to(root)) for found in Path(root).glob(pattern)}
    except (ValueError, OSError) as error:
        raise UserError(f"source {source.name}: {source.path}: {error}", "** stands alone between slashes") from None
    return [entry for entry in entries if entry.name in names]


def _is_itself(path: str, entry: storage.Entry) -> bool:
    return entry.name == path.rpartition("/")[2]


def _is_wanted(name: str, source: Source) -> bool:
    if source.include:
        return any(fnmatch.fnmatch(name, pattern) for pattern in source.include)
    return is_known(name)
