"""Files of many records: JSON Lines and Parquet, also from a byte in the middle, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from orchestrator.corpus_config import Source
from orchestrator.data.readers import Unreadable, markup, s2orc

MAX_LINE_BYTES = 32 * 2**20
_ROWS = 256
_BATCH_BYTES = 2**24
DEFAULT_FIELD = Source.model_fields["text_field"].default


def json_lines(stream: IO[bytes], start: int, end: int | None) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the non-empty lines that begin in [start, end); the line is None where it is too long.

    So that every line is read once when a file is cut anywhere, a line that begins exactly at `start` belongs here.
    """
    position = 0
    if start:
        stream.seek(start - 1)
        position = start - 1 + _skip_line(stream)
    while end is None or position < end:
        line = stream.readline(MAX_LINE_BYTES)
        if not line:
            return
        offset, position = position, position + len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield offset, None
        elif line.strip():
            yield offset, line


def parquet_rows(stream: IO[bytes], source: Source, start: int, end: int | None) -> Iterator[tuple[int, Any]]:
    """(row number, record) of the row groups that begin in [start, end); a record is a dict of the columns of use.

    Raises:
        Unreadable: not a Parquet file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        yield from _parquet_rows(parquet.ParquetFile(stream), source, start, end)
    except OSError as error:
        if error.errno is not None:  # the storage's, not Arrow's
            raise
        raise Unreadable("broken parquet") from None
    except pa.ArrowInvalid:
        raise Unreadable("broken parquet") from None


def _parquet_rows(file: Any, source: Source, start: int, end: int | None) -> Iterator[tuple[int, Any]]:
    columns = [name for name in (source.text_field, "title", "abstract") if name in file.schema_arrow.names]
    first_row = 0
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        offset = group.column(0).data_page_offset
        if start <= offset and (end is None or offset < end) and columns:
            row = first_row
            rows = max(1, min(_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
            for batch in file.iter_batches(rows, row_groups=[index], columns=columns):
                # One row at a time: a dictionary may say the same long text many times over.
                for place in range(batch.num_rows):
                    yield row + place, {name: batch.column(name)[place].as_py() for name in columns}
                row += batch.num_rows
        elif start <= offset and (end is None or offset < end):
            yield from ((first_row + n, {}) for n in range(group.num_rows))
        first_row += group.num_rows


def text_of(record: Any, source: Source) -> str:
    """The text of a record: its text field, an S2ORC paper, or a title with its abstract.

    Raises:
        Unreadable: it has none.
    """
    if not isinstance(record, dict):
        raise Unreadable("no text")
    text = record.get(source.text_field)
    if isinstance(text, str):
        return text
    if source.text_field != DEFAULT_FIELD:  # the user has named it: nothing else will do
        raise Unreadable("no text")
    if s2orc.is_record(record):
        return s2orc.from_record(record)
    title, abstract = record.get("title"), record.get("abstract")
    if isinstance(title, str) and isinstance(abstract, str):
        return f"{markup.heading(1, title)}\n\n{markup.heading(2, 'Abstract')}\n\n{markup.one_line(abstract)}"
    raise Unreadable("no text")


def parse(line: bytes) -> Any:
    """
    Raises:
        Unreadable: not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Unreadable("broken json") from None


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; how many bytes that was."""
    skipped = 0
    while chunk := stream.readline(2**20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped
