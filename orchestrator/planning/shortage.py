"""Why there is no plan: too few devices, too little memory, or a number of workers that cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.accelerators import NodePool
from orchestrator.errors import CapacityError, PlanError
from orchestrator.train_config import TrainConfig


def check_workers(train: TrainConfig) -> None:
    """
    Raises:
        PlanError: no number of workers is one that the recipe allows.
    """
    replica, workers = train.layout.devices, train.workers
    fewest = math.ceil(workers.min / replica) * replica
    most = workers.max if workers.max is not None else fewest
    if most < replica:
        raise PlanError(
            f"train.workers.max={most} is less than the {replica} devices of one replica",
            f"set train.workers={replica} or more",
        )
    if most < fewest:
        asked = f"train.workers={workers.min}" if workers.min == workers.max else "train.workers"
        raise PlanError(
            f"{asked} leaves no number of workers that is a multiple of the {replica} devices of one replica",
            f"set train.workers={most // replica * replica} or {fewest}",
        )
    if train.global_batch_size * replica < fewest:
        raise PlanError(
            f"train.workers.min={workers.min} is more than train.global_batch_size={train.global_batch_size} "
            "has room for",
            "a replica needs at least one sequence a step",
        )


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Of devices, in a pool that could hold a plan but for their number."""

    there: int
    needed: int
    for_memory: bool
    """Whether fewer workers would do but for their memory."""


def capacity_error(train: TrainConfig, pools: Sequence[NodePool], lacking: list[Shortage]) -> CapacityError:
    if not pools:
        return CapacityError("no node is there to train on", "start one with `ray start`", "a node: none is there")
    least = min(lacking, key=lambda shortage: shortage.needed - shortage.there)
    more, replica = least.needed - least.there, train.layout.devices
    found = ", ".join(f"{pool}: {pool.devices(train.cpus_per_worker)}" for pool in pools)
    if least.for_memory:
        asks = "the model needs to fit into memory"
        message = f"the model fits into the memory of {least.needed} devices, and no pool has as many ({found})"
        hint = "add nodes, use a smaller model, or shorter sequences"
    elif replica > 1:
        asks = "train.layout takes" if train.workers.min <= replica else "train.workers.min asks for"
        message = (
            f"train.layout needs {least.needed} devices, {replica} a replica (tensor_parallel="
            f"{train.layout.tensor_parallel or 1}, pipeline_stages={train.layout.stages or 1}), and no pool has as "
            f"many ({found}); those that share tensors share a node"
        )
        hint = "lower them, lower train.workers, or add nodes"
    else:
        asks = "train.workers.min asks for"
        message = f"train.workers asks for {least.needed} workers and no pool has that many devices ({found})"
        hint = f"set train.workers={least.there}" if least.there else "lower train.cpus_per_worker, or add nodes"
    missing = f"{more} more device{'s' if more > 1 else ''}: {least.there} of the {least.needed} that {asks} are there"
    return CapacityError(message, hint, missing)
