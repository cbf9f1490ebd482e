"""Shards: packed sequences as memory-mappable Arrow IPC, with a sidecar that traces every token to its document.

A shard has one column `tokens`, fixed_size_list<uint16 or uint32>[sequence_length], in one record batch. Its sidecar
`<shard>.documents.arrow` lists (start, length, document): runs of tokens, in order, covering the shard.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data.shard_cache import LOST_HINT, node_cache
from orchestrator.errors import ShardLost, StorageError

SIDECAR = ".documents.arrow"
ATTEMPTS = 3
"""To read a shard before it counts as lost."""
PAUSE_S = 0.5
"""Before the second attempt; twice that before the third."""
DOWNLOADS = 4
"""Shards that a task fetches at a time."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    """Relative to the corpus directory."""
    sequences: int
    bytes: int
    xxh3: str
    """Of the shard file, 128 bits in hex."""
    source: str = ""
    """Of all of its documents, in a corpus with a mixture."""


@dataclass(frozen=True)
class Packed:
    """A stream of tokens and the documents they came from."""

    tokens: np.ndarray
    """uint32 [n]."""
    documents: list[tuple[int, str]]
    """(number of tokens, document id), in order; the numbers add up to n."""

    def split_at(self, position: int) -> tuple[Packed, Packed]:
        """The first `position` tokens, and the rest; a document may stand in both."""
        before, after, seen = [], [], 0
        for length, document in self.documents:
            left = min(max(position - seen, 0), length)
            if left:
                before.append((left, document))
            if length - left:
                after.append((length - left, document))
            seen += length
        return Packed(self.tokens[:position], before), Packed(self.tokens[position:], after)


def join(parts: list[Packed]) -> Packed:
    tokens = [part.tokens for part in parts]
    return Packed(
        np.concatenate(tokens) if tokens else np.empty(0, np.uint32), [d for part in parts for d in part.documents]
    )


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(corpus: str, name: str, packed: Packed, sequence_length: int, vocab_size: int) -> Shard:
    """Write a shard and its sidecar. The tokens must fill whole sequences."""
    import pyarrow as pa

    flat = pa.array(packed.tokens.astype(token_type(vocab_size)))
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, sequence_length)})
    data = _to_ipc(table)
    lengths = np.array([length for length, _ in packed.documents], dtype=np.int64)
    sidecar = pa.table(
        {
            "start": np.cumsum(lengths) - lengths,
            "length": lengths,
            "document": pa.array([document for _, document in packed.documents], pa.string()),
        }
    )
    storage.write(storage.join(corpus, name + SIDECAR), _to_ipc(sidecar))
    storage.write(storage.join(corpus, name), data)
    return Shard(name=name, sequences=table.num_rows, bytes=len(data), xxh3=_hash(data))


@dataclass(frozen=True)
class Sidecar:
    """Runs of a shard's tokens by document."""

    starts: np.ndarray
    """int64 [runs], of the shard's tokens."""
    lengths: np.ndarray
    documents: Any
    """Arrow array of strings."""

    def passages(self, sequence: int, sequence_length: int) -> list[tuple[int, int, str]]:
        """(first token, last token, document) of a sequence's runs, the tokens counted within the sequence."""
        begin = sequence * sequence_length
        ends = self.starts + self.lengths
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(self.starts, begin + sequence_length, side="left"))
        return [
            (
                max(int(self.starts[run]) - begin, 0),
                min(int(ends[run]) - begin, sequence_length) - 1,
                self.documents[run].as_py(),
            )
            for run in range(first, last)
        ]


def read_sidecar(corpus: str, name: str) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        StorageError: it is missing or damaged.
    """
    import pyarrow as pa

    uri = storage.join(corpus, name + SIDECAR)
    try:
        source = pa.BufferReader(storage.read(uri)) if storage.is_s3(uri) else pa.memory_map(uri)
        columns = pa.ipc.open_file(source).read_all().combine_chunks()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise StorageError(f"{uri} is {what}: it says which documents the shard holds", "restore it") from None
    return Sidecar(columns["start"].to_numpy(), columns["length"].to_numpy(), columns["document"])


class ShardReader:
    """Random access to the sequences of one split, by sample id: the position in the shards, in manifest order."""

    def __init__(self, corpus: str, shards: list[Shard], sequence_length: int, vocab_size: int) -> None:
        self._corpus = corpus
        self._shards = shards
        self._ends = np.cumsum([shard.sequences for shard in shards])
        self._sequence_length = sequence_length
        self._type = token_type(vocab_size)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, ids: np.ndarray, absent: np.ndarray | None = None) -> np.ndarray:
        """Sequences [len(ids), sequence_length], uint16 or uint32.

        Args:
            absent: which of them are not to be read, bool like ids; zeros stand for those.

        Raises:
            ShardLost: a shard is not what the manifest says.
        """
        found = np.zeros((len(ids), self._sequence_length), self._type)
        where = np.searchsorted(self._ends, ids, side="right")
        if absent is not None:
            where[absent] = -1
        needed = np.unique(where[where >= 0])
        for index, tokens in zip(needed, self._open(needed), strict=True):
            here = where == index
            found[here] = tokens[ids[here] - (self._ends[index] - self._shards[index].sequences)]
        return found

    def _open(self, needed: np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of these shards, which are fetched several at a time where they must be."""
        shards = [self._shards[index] for index in needed]
        uris = [storage.join(self._corpus, shard.name) for shard in shards]
        if not storage.is_s3(self._corpus):
            return map(_open_shard, uris, shards)
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            return pool.map(_open_shard, uris, shards)


def _open_shard(uri: str, shard: Shard) -> np.ndarray:
    """A shard's tokens [sequences, sequence_length], memory-mapped."""
    problem = ""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S * attempt)
        try:
            path = node_cache().fetch(uri, shard.bytes, shard.xxh3) if storage.is_s3(uri) else Path(uri)
            stat = path.stat()
            return _mapped(path, (stat.st_size, stat.st_ino, stat.st_mtime_ns), shard.xxh3)
        except FileNotFoundError:  # also from the cache, when others needed its room at once
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        except ShardLost as error:
            raise ShardLost(error.message, error.hint, shard.name) from None
        except _Damaged as error:
            problem = f"is damaged: {error}"
            if storage.is_s3(uri):
                node_cache().discard(shard.xxh3)
    raise ShardLost(f"shard {uri} {problem}", LOST_HINT, shard.name)


class _Damaged(Exception):
    pass


@functools.lru_cache(maxsize=128)
def _mapped(path: Path, version: tuple[int, int, int], xxh3: str) -> np.ndarray:
    """Verified once a process, and again when the file has changed."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        mapped = source.read_buffer()
    if _hash(mapped) != xxh3:
        raise _Damaged(f"its hash is not the manifest's {xxh3}")
    column = pa.ipc.open_file(pa.BufferReader(mapped)).get_batch(0).column(0)
    return np.asarray(column.flatten().to_numpy(zero_copy_only=True)).reshape(len(column), -1)


def _to_ipc(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def _hash(data: Any) -> str:
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(memoryview(data)))
