"""Executions of Ray Data: units of work as its data source, rest for its scheduling loop, and an end at any moment.

Imported where Ray Data is used, since it imports that at once.
"""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from orchestrator.data.manifest import load_manifest
from orchestrator.data.schedule import Role, Schedule
from orchestrator.data.shards import ShardReader
from orchestrator.data.tasks import RETRIES, quiet_ray_data
from orchestrator.errors import DataOrderError, LastingStorageError, StorageError

AHEAD_BYTES = 2**26
"""Of shared memory, for units of one worker that wait there or are on their way."""
REST_S = 0.25
BUSY_REST_S = 0.005


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


class Execution:
    """Units on their way, one block each, in order. It starts at once, in a thread: Ray Data takes seconds to."""

    def __init__(self, corpus: str, schedule: Schedule, role: Role, steps: list[range]) -> None:
        self._units = len(steps)
        self._over = threading.Event()
        self._loops: list[Any] = []
        """Ray Data's scheduling loop, a thread, once it has begun."""
        self._starter = ThreadPoolExecutor(1)
        self._bundles: Future[Iterator[Any]] | None = None
        if steps:
            self._bundles = self._starter.submit(self._start, Units(corpus, schedule, role, steps))

    def __iter__(self) -> Iterator[Any]:
        """The blocks.

        Raises:
            DataOrderError: there are fewer than units, or more for one.
            Exception: what Ray Data met.
        """
        for unit in range(self._units):
            assert self._bundles is not None
            with _consumer_waits():
                bundle = next(self._bundles.result(), None)
                if bundle is None or len(bundle.blocks) != 1:
                    raise DataOrderError(f"Ray Data brought no single block for unit {unit + 1} of {self._units}")
                block = ray.get(bundle.blocks[0].ref)
            yield block

    def close(self) -> None:
        """End it, and wait until nothing of it runs: a thread that meets Ray after its shutdown ends the process."""
        self._over.set()
        with _consumer_waits():
            self._starter.shutdown()
            for loop in self._loops:
                loop.join()
                loop.shutdown(force=True)

    def check(self) -> None:
        if self._over.is_set():
            raise _ClosedError

    def begins(self, loop: Any) -> None:
        self.check()
        self._loops.append(loop)

    def _start(self, units: Units) -> Iterator[Any]:
        quiet_ray_data()
        _starting.set(self)
        context = DataContext.get_current().copy()  # others of this process have their own
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=AHEAD_BYTES)
        context.execution_options.label_selector = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        context.target_max_block_size = None  # a unit is one block
        context.custom_execution_callback_classes = [Pacing]
        # No CPU is asked for: a recipe may give every CPU to its workers, and these tasks read a memory map.
        with DataContext.current(context):
            dataset = ray.data.read_datasource(
                units,
                override_num_blocks=self._units,
                num_cpus=0,
                concurrency=min(2, self._units),
                ray_remote_args={"max_retries": RETRIES},  # without it, one that ends its worker is started for ever
            )
        bundles: Iterator[Any] = dataset.iter_internal_ref_bundles()
        return bundles


class _ClosedError(Exception):
    """Ends Ray Data's scheduling loop."""


_starting: ContextVar[Execution] = ContextVar("starting")
_waiting = threading.Event()


@contextmanager
def _consumer_waits() -> Iterator[None]:
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

    def before_execution_starts(self, executor: Any) -> None:
        self._execution = _starting.get()
        self._execution.begins(executor)

    def on_execution_step(self, executor: Any) -> None:
        if _waiting.wait(REST_S):
            time.sleep(BUSY_REST_S)
        self._execution.check()
