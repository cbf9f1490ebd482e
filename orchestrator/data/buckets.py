"""The shuffle: a task writes its records cut into buckets, in one file; a later task reads its buckets of every file.

A file is `count + 1` little-endian int64 positions, then the records, sorted by bucket. It costs no memory beyond what
a task asks for, and a finished file need not be made again after a failure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data.numbers import unit_of

KEY_BUCKETS = 1024


def by_key(keys: np.ndarray) -> np.ndarray:
    """Bucket of uint64 keys that are hashes."""
    return (keys >> np.uint64(54)).astype(np.int64)


def by_unit(documents: np.ndarray) -> np.ndarray:
    """Bucket of uint64 document numbers: their unit."""
    return unit_of(documents).astype(np.int64)


def write(uri: str, records: np.ndarray, buckets: np.ndarray, count: int) -> None:
    """
    Args:
        records: structured array [n].
        buckets: int64 [n], below count.
    """
    order = np.argsort(buckets, kind="stable")
    positions = np.searchsorted(buckets[order], np.arange(count + 1)).astype("<i8")
    with storage.writing(uri) as path, path.open("wb") as file:
        file.write(positions.tobytes())
        file.write(records[order].tobytes())


def read(uri: str, dtype: Any, first: int, last: int, count: int) -> np.ndarray:
    """Records of the buckets first..last - 1; of buckets that the file does not have, none."""
    dtype = np.dtype(dtype)
    head = np.frombuffer(storage.read_range(uri, 0, 8 * (count + 1)), "<i8")
    start, end = head[min(first, count)], head[min(last, count)]
    base = 8 * (count + 1)
    return np.frombuffer(storage.read_range(uri, base + start * dtype.itemsize, (end - start) * dtype.itemsize), dtype)


def size(uri: str, dtype: Any, count: int) -> int:
    """Number of records in a file."""
    return int(storage.size(uri) - 8 * (count + 1)) // int(np.dtype(dtype).itemsize)
