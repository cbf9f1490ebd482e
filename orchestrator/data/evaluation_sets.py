"""A directory of evaluation sets -> the n-grams that no training document may hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import xxhash

from orchestrator import storage
from orchestrator.data import compression, contamination
from orchestrator.data.layout import CorpusDir
from orchestrator.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


def index_evaluation_sets(path: str | None, corpus: CorpusDir) -> str:
    """Write the index of the sets at `path` into the corpus. Returns a digest of it, empty where there is no path.

    Raises:
        UserError: nothing to read is there, or a file is not what its name says.
    """
    if path is None:
        return ""
    index = contamination.index(text for uri in list_evaluation_sets(path) for text in read_texts(uri))
    if not len(index):
        raise UserError(f"corpus.decontaminate: no text of 13 words or more at {path}")
    storage.write(corpus.contamination, index.astype("<u8").tobytes())
    return str(xxhash.xxh3_128_hexdigest(index.tobytes()))


def list_evaluation_sets(path: str | None) -> list[str]:
    """The files of a directory that hold evaluation items.

    Raises:
        UserError: there is none.
    """
    if path is None:
        return []
    entries = [e for e in storage.list_entries(path) if compression.inner_name(e.name).lower().endswith(SUFFIXES)]
    if not entries:
        raise UserError(f"corpus.decontaminate: no {', '.join(SUFFIXES)} file at {path}", "give a directory of them")
    return [storage.join(path, entry.name) for entry in entries]


def read_texts(uri: str) -> Iterator[str]:
    """Every text of an evaluation file: each string of its records, by itself.

    Raises:
        UserError: the file cannot be read.
    """
    name = compression.inner_name(uri).lower()
    try:
        with storage.reading(uri) as stream:
            data = compression.decompressed(uri, stream).read()
        for record in _records(name, data):
            yield from _strings(record)
    except Exception as error:  # nothing may be left out of the index in silence
        raise UserError(f"corpus.decontaminate: cannot read {uri}: {error}", "mend it, or take it away") from None


def _records(name: str, data: bytes) -> Iterator[Any]:
    if name.endswith(".parquet"):
        from pyarrow import parquet

        yield parquet.read_table(io.BytesIO(data)).to_pylist()
        return
    text = data.decode("utf-8-sig")
    if name.endswith(".jsonl"):
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    elif name.endswith(".json"):
        yield json.loads(text)
    elif name.endswith((".csv", ".tsv")):
        yield from csv.reader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ",")
    else:
        yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
