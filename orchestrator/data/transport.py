"""What Ray Data is given: units of work as its data source, and rest for its scheduling loop.

Imported where Ray Data is used, since it imports that at once.
"""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Datasource
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from orchestrator.data.manifest import load_manifest
from orchestrator.data.schedule import Role, Schedule
from orchestrator.data.shards import ShardReader
from orchestrator.errors import LastingStorageError, StorageError

REST_S = 0.25
BUSY_REST_S = 0.005

_waiting = threading.Event()


class Units(Datasource):
    """One task a unit, which gives one block: the samples of some steps and their tokens."""

    def __init__(self, corpus: str, schedule: Schedule, role: Role, steps: list[range]) -> None:
        super().__init__()
        self._corpus = corpus
        self._schedule = schedule
        self._role = role
        self._steps = steps

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._task(steps), unknown) for steps in self._steps]

    def _task(self, steps: range) -> Callable[[], list[pa.Table]]:
        corpus, schedule, role = self._corpus, self._schedule, self._role
        return lambda: [read_unit(corpus, schedule, role, steps)]


def read_unit(corpus: str, schedule: Schedule, role: Role, steps: range) -> pa.Table:
    """Columns `sample` and `tokens`; or `problem`, an error as a value: Ray Data would bury it under its own."""
    ids = schedule.ids(steps, role)
    try:
        reader = _reader(corpus, schedule.corpus_hash)
        tokens = reader.take(ids, schedule.exclusions.lost_samples(ids))
    except (StorageError, OSError) as error:
        return pa.table({"problem": pa.array([pickle.dumps(error)], pa.binary())})
    rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), schedule.sequence_length)
    return pa.table({"sample": ids, "tokens": rows})


def unpacked(block: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(sample ids, tokens [samples, sequence_length]) of what read_unit gave, views of shared memory.

    Raises:
        StorageError: what the task met.
    """
    if "problem" in block.column_names:
        raise pickle.loads(block.column("problem")[0].as_py())
    ids = block.column("sample").to_numpy()
    tokens = block.column("tokens").combine_chunks().flatten().to_numpy()
    return ids, tokens.reshape(len(ids), -1)


@functools.lru_cache(maxsize=4)
def _reader(corpus: str, hash_: str) -> ShardReader:
    manifest = load_manifest(corpus)
    if manifest is None or manifest.hash != hash_:
        raise LastingStorageError(f"the corpus {corpus} has changed under the run", "put it back, or use --start-over")
    reader: ShardReader = manifest.reader(corpus, "train")
    return reader


@contextmanager
def consumer_waits() -> Iterator[None]:
    """While a consumer of this process waits for data."""
    _waiting.set()
    try:
        yield
    finally:
        _waiting.clear()


class Pacing(ExecutionCallback):
    """Lets Ray Data's scheduling loop, a thread of the consuming process, turn at leisure, and at once when needed.

    Ray 2.60's loop does not wait while its consumer has enough to do, which is nearly always so in training: it then
    takes a whole core of the training process.
    """

    def on_execution_step(self, executor: Any) -> None:
        if _waiting.wait(REST_S):
            time.sleep(BUSY_REST_S)
