"""The transport: Ray Data carries the samples of the coming steps from the shards to a worker, ahead of time.

A unit of work is the worker's part of some steps in a row. Which samples those are comes from the schedule alone, so
the consumer knows what must arrive and refuses anything else. Units are read by tasks on the consumer's node: what they
read from S3 is cached there, and what they give goes through its shared memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.schedule import Role, Schedule, Share
from orchestrator.errors import DataOrderError

UNIT_TOKENS = 2**23
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
    from orchestrator.data.transport import Execution, read_unit

    if not units:
        return
    steps = [unit.steps for unit in units]
    with closing(Execution(corpus, schedule, role, steps[1 : 1 + EXECUTION_UNITS])) as execution:
        yield read_unit(corpus, schedule, role, steps[0])
        yield from execution
    for first in range(1 + EXECUTION_UNITS, len(steps), EXECUTION_UNITS):
        with closing(Execution(corpus, schedule, role, steps[first : first + EXECUTION_UNITS])) as execution:
            yield from execution
