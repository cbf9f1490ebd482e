"""The transport: Ray Data carries the samples of the coming steps from the shards to a worker, ahead of time.

A unit of work is the worker's part of some steps in a row. Which samples those are comes from the schedule alone, so
the consumer knows what must arrive and refuses anything else. Units are read by tasks on the consumer's node: what they
read from S3 is cached there, and what they give goes through its shared memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.schedule import Role, Schedule, Share
from orchestrator.data.tasks import RETRIES, quiet_ray_data
from orchestrator.errors import DataOrderError

UNIT_TOKENS = 2**23
AHEAD_BYTES = 2**26
"""Of shared memory, for units of one worker that wait there or are on their way."""
EXECUTION_UNITS = 256
"""Of one Ray Data execution, which takes a millisecond a unit to start; the next one follows it."""


@dataclass(frozen=True)
class _Unit:
    steps: range
    size: int
    """Sequences of the worker in each."""


def stream(
    corpus: str,
    schedule: Schedule,
    role: Role,
    first_step: int,
    last_step: int,
    unit_tokens: int = UNIT_TOKENS,
) -> Iterator[Share]:
    """A worker's part of first_step..last_step, one after the other.

    Raises:
        DataOrderError: other samples arrived than the schedule says, as when Ray Data loses a block.
        ShardLost: a shard is missing or damaged; names it.
    """
    with closing(_arriving(corpus, schedule, role, first_step, last_step, unit_tokens)) as arriving:
        for step in range(first_step, last_step + 1):
            wanted = role.reads and not schedule.skips(step)
            yield schedule.share(step, role, next(arriving) if wanted else None)


def _arriving(
    corpus: str,
    schedule: Schedule,
    role: Role,
    first_step: int,
    last_step: int,
    unit_tokens: int,
) -> Generator[np.ndarray, None, None]:
    """The tokens of every step that is not passed over, [sequences, sequence_length]."""
    units = list(_units(schedule, role, first_step, last_step, unit_tokens))
    with closing(_blocks(corpus, schedule, role, [unit for unit in units if unit.size])) as blocks:
        for unit in units:
            if unit.size:
                tokens = _verified(next(blocks), schedule.ids(unit.steps, role), unit, role)
            else:  # more replicas than sequences
                tokens = np.empty((0, schedule.sequence_length), np.uint16)
            for place in range(len(unit.steps)):
                yield tokens[place * unit.size : (place + 1) * unit.size]


def _units(schedule: Schedule, role: Role, first_step: int, last_step: int, unit_tokens: int) -> Iterator[_Unit]:
    for steps in schedule.stretches(first_step, last_step):
        size = schedule.size(steps[0], role)
        each = max(1, unit_tokens // max(1, size * schedule.sequence_length))
        for begin in range(steps.start, steps.stop, each):
            yield _Unit(range(begin, min(begin + each, steps.stop)), size)


def _verified(block: Any, ids: np.ndarray, unit: _Unit, role: Role) -> np.ndarray:
    """The tokens of a unit, [samples, sequence_length]."""
    from orchestrator.data.transport import unpacked

    arrived, tokens = unpacked(block)
    if not np.array_equal(arrived, ids):
        raise DataOrderError(
            f"data order broken in steps {unit.steps[0]} to {unit.steps[-1]}, rank {role.rank}: "
            f"got samples {arrived[:4]}..., expected {ids[:4]}..."
        )
    return tokens


def _blocks(corpus: str, schedule: Schedule, role: Role, units: Sequence[_Unit]) -> Generator[Any, None, None]:
    """One a unit, in order. The first is read here: Ray Data, which brings all others, takes seconds to start."""
    from orchestrator.data.transport import read_unit

    if not units:
        return
    with closing(_transported(corpus, schedule, role, units[1:])) as others, ThreadPoolExecutor(1) as thread:
        second = thread.submit(next, others, None)
        yield read_unit(corpus, schedule, role, units[0].steps)
        if (block := second.result()) is not None:
            yield block
        yield from others


def _transported(corpus: str, schedule: Schedule, role: Role, units: Sequence[_Unit]) -> Generator[Any, None, None]:
    """What Ray Data brings for every unit, in order."""
    import ray
    from ray.data import DataContext, ExecutionResources

    from orchestrator.data.transport import Pacing, Units, consumer_waits

    quiet_ray_data()
    context = DataContext.get_current().copy()  # others of this process have their own
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=AHEAD_BYTES)
    context.execution_options.label_selector = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    context.target_max_block_size = None  # a unit is one block
    context.custom_execution_callback_classes = [Pacing]
    for first in range(0, len(units), EXECUTION_UNITS):
        steps = [unit.steps for unit in units[first : first + EXECUTION_UNITS]]
        # No CPU is asked for: a recipe may give every CPU to its workers, and these tasks read a memory map.
        with DataContext.current(context):
            dataset = ray.data.read_datasource(
                Units(corpus, schedule, role, steps),
                override_num_blocks=len(steps),
                num_cpus=0,
                concurrency=min(2, len(steps)),
                ray_remote_args={"max_retries": RETRIES},  # without it, one that ends its worker is started for ever
            )
        with closing(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))) as blocks:
            for _ in steps:
                with consumer_waits():
                    block = next(blocks)
                yield block
