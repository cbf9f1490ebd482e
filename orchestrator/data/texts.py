"""Files of texts: Arrow IPC with zstd, written and read a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from orchestrator import storage

BATCH_CHARACTERS = 2**21


class TextWriter:
    """Rows of strings and bytes, in batches. The file appears when the block ends without an error.

    Args:
        columns: "string" or "binary" by name; the column `text` may grow beyond 2 GiB.
    """

    def __init__(self, uri: str, columns: dict[str, str]) -> None:
        self._uri = uri
        self._columns = columns
        self._rows: list[tuple[Any, ...]] = []
        self._characters = 0
        self._stack = ExitStack()

    def __enter__(self) -> TextWriter:
        import pyarrow as pa

        types = {"string": pa.large_string(), "binary": pa.binary()}
        self._schema = pa.schema({name: types[kind] for name, kind in self._columns.items()})
        path = self._stack.enter_context(storage.writing(self._uri))
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._file = self._stack.enter_context(pa.ipc.new_file(str(path), self._schema, options=options))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self._flush()
        self._stack.__exit__(kind, *rest)

    def add(self, *row: Any) -> None:
        """One value a column, in order. Lone surrogates become question marks."""
        self._rows.append(row)
        self._characters += sum(len(value) for value in row)
        if self._characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns: list[Any] = [list(column) for column in zip(*self._rows, strict=True)]
        for index, kind in enumerate(self._columns.values()):
            if kind == "string" and columns:
                columns[index] = [value.encode("utf-8", "replace") for value in columns[index]]
        if columns:
            arrays = [pa.array(c, pa.large_binary()) for c in columns]
            arrays = [array.cast(field.type) for array, field in zip(arrays, self._schema, strict=True)]
            self._file.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows, self._characters = [], 0


def read_texts(uri: str, *columns: str) -> Iterator[list[list[Any]]]:
    """The batches of a file, each as a list of Python values a column, in the order asked for.

    Raises:
        FileNotFoundError: nothing is stored there.
    """
    import pyarrow as pa

    with storage.reading(uri) as stream:
        schema = pa.ipc.open_file(stream).schema
        options = pa.ipc.IpcReadOptions(included_fields=sorted(schema.get_field_index(name) for name in columns))
        file = pa.ipc.open_file(stream, options=options)
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            yield [batch.column(name).to_pylist() for name in columns]
