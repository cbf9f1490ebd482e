"""The transport: Ray Data carries the sequences of the coming steps from the shards to a worker, ahead of time.

A unit of work is K steps of one rank. Which samples those are comes from the order alone, so the consumer knows what
must arrive and refuses anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.manifest import Manifest
from orchestrator.data.order import Order
from orchestrator.data.shards import ShardReader
from orchestrator.data.tasks import quiet_ray_data
from orchestrator.errors import RunFailed, StorageError

UNIT_BYTES = 16 * 2**20
PACE_S = 0.02
_MAX_STEPS = 32


@dataclass(frozen=True)
class RankSlice:
    """Which part of every step a worker consumes."""

    rank: int
    world_size: int
    """Data-parallel ranks."""


def rank_batches(
    corpus: str, manifest: Manifest, order: Order, part: RankSlice, first_step: int, last_step: int
) -> Iterator[np.ndarray]:
    """The sequences of a rank for first_step..last_step, one array [global_batch / world_size, sequence_length] a step.

    Raises:
        RunFailed: other samples arrived than the order says.
        StorageError: a shard is missing or damaged.
    """
    import ray

    each = order.global_batch_size // part.world_size
    steps_per_unit = max(1, min(_MAX_STEPS, UNIT_BYTES // (each * manifest.sequence_length * 4)))
    starts = list(range(first_step, last_step + 1, steps_per_unit))
    shards = manifest.shards("train")

    def read_unit(unit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = starts[int(unit["id"][0])]
        steps = range(start, min(start + steps_per_unit, last_step + 1))
        ids = np.concatenate([order.of_rank(step, part.rank, part.world_size) for step in steps])
        try:
            tokens, problem = ShardReader(corpus, shards).take(ids), ""
        except StorageError as error:  # as a value: Ray Data would bury an exception under its own
            tokens, problem = np.zeros((len(ids), manifest.sequence_length), np.uint16), error.message
        return {"sample": ids, "tokens": tokens, "problem": np.full(len(ids), problem)}

    quiet_ray_data()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_pacing()]
    # No CPU is asked for: a recipe may give every CPU to its workers, and these tasks read a memory map.
    dataset = ray.data.range(len(starts), override_num_blocks=len(starts)).map_batches(
        read_unit, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=2)
    )
    batches = dataset.iter_batches(batch_size=each, batch_format="numpy", prefetch_batches=2)
    for step, batch in zip(range(first_step, last_step + 1), batches, strict=True):
        if any(batch["problem"]):
            raise StorageError(max(batch["problem"]), "delete the corpus directory and run again to make it anew")
        expected = order.of_rank(step, part.rank, part.world_size)
        if not np.array_equal(batch["sample"], expected):
            raise RunFailed(
                f"data order broken at step {step}, rank {part.rank}: got samples {batch['sample'][:4]}..., "
                f"expected {expected[:4]}..."
            )
        yield batch["tokens"]


def _pacing() -> type[Any]:
    """A callback that lets the scheduling loop of Ray Data rest between two turns.

    Ray 2.60's loop does not wait while the consumer has enough to do, which is nearly always here: its thread then
    takes a whole core of the training process. At this pace it takes a few per cent, still far ahead of any step.
    """
    import time

    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pacing(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(PACE_S)

    return Pacing
