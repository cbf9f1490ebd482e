"""One rank of the engine under torchrun, without Ray: trains one case after the other, prints losses and norms.

torchrun --nproc-per-node N rank.py CHECKPOINTS CASES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.errors import UserError  # noqa: E402
from orchestrator.planning.plan import Plan  # noqa: E402
from orchestrator.train import checkpoints  # noqa: E402
from orchestrator.train.checkpoints import Retention  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.saver import Saver  # noqa: E402
from tests.engine.cases import (  # noqa: E402
    CONFIG,
    FILLER,
    HELD_OUT,
    SCHEDULE,
    STEPS,
    Case,
    ModelWeights,
    configuration,
    model,
    poison,
    share_of,
)


def trained(case: Case, root: str) -> dict[str, Any]:
    """The way of a case through the schedule, as the worker's loop goes. By step, where there is something to learn:

    losses: (loss, gradient norm). sequences: mean losses of those of the global batch, in order. applied: whether the
    update was made. broken: the ranks whose loss is not finite. Then `held_out`, the (sum, targets) of an evaluation
    at the end, and `refused`, why a commit was.
    """
    rank, directory = dist.get_rank(), str(Path(root, case.folder))
    plan = plan_of(case)
    role = plan.role(rank)
    engine = Engine(configuration(case.family), CONFIG, plan, accelerators.CPU, FILLER if case.apart else None)
    updates = _begin(engine, case, directory)
    saver = Saver(directory, case.attempt, Retention(last=STEPS), lambda commit, timing: None)
    told: dict[str, Any] = {"losses": {}, "sequences": {}, "applied": {}, "broken": {}}
    for step in range(case.load + 1, case.last + 1):
        share = share_of(step, role)
        if step in case.poisoned and share.tokens is not None and role.rank == len(case.shares) - 1:
            share = poison(share)
        if share.targets:
            result = engine.step(share, CONFIG.lr, _flag(case, step), lambda *_, step=step: step not in case.dropped)  # type: ignore[misc]
            assert result.flag == (2 if step == case.last else 0), "the greatest flag of any rank reaches all"
            told["losses"][step] = (result.loss, result.grad_norm)
            told["sequences"][step] = _in_order(result.sample_losses, plan)
            told["applied"][step], told["broken"][step] = result.applied, result.broken_ranks
            updates += result.applied
        if step in case.save:
            position = checkpoints.Position(step=step, updates=updates, past=SCHEDULE.past(step))
            engine.save(saver, position)
    share = share_of(HELD_OUT, role)
    told["held_out"] = engine.evaluate(share.tokens, share.counted, share.largest)
    try:
        saver.wait()
    except UserError as error:
        told["refused"] = error.message
    return told


def _begin(engine: Engine, case: Case, directory: str) -> int:
    """Returns the updates that were made."""
    if case.load:
        commit = checkpoints.read_commit(directory, case.load)
        engine.load(directory, commit)
        return commit.position.updates
    weights = ModelWeights(model(case.family))
    if case.poisoned:
        weights.poison()
    engine.start(weights)
    return 0


def _flag(case: Case, step: int) -> int:
    return 0 if step < case.last else 2 if dist.get_rank() == case.ranks - 1 else 1


def _in_order(own: np.ndarray | None, plan: Plan) -> list[float]:
    """Losses of the sequences of the global batch, from those of every rank."""
    stage, _, tensor_rank = plan.coordinates(dist.get_rank())
    assert (own is not None) == (stage == plan.pipeline_stages - 1 and tensor_rank == 0), "one rank a replica has them"
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if own is None else own.tolist())
    return [loss for losses in told if losses is not None for loss in losses]


def plan_of(case: Case) -> Plan:
    return Plan(
        accelerator="cpu",
        node_ids=(),
        workers_by_node=(),
        data_parallel=len(case.shares),
        pipeline_stages=max(len(case.stages), 1),
        tensor_parallel=case.tensor,
        layers_per_stage=tuple(case.stages),
        zero_stage=case.zero,
        offload=case.offload,
        recompute=case.recompute,
        micro_batch_size=case.micro_batch,
        accumulation=max(
            -(-SCHEDULE.largest(step, tuple(case.shares)) // case.micro_batch) for step in range(1, case.last + 1)
        ),
        dtype=case.dtype,
        parameters=0,
        memory_bytes=0,
        step_time_s=0,
    )


def main() -> None:
    directory, cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # as Ray Train does, without DeepSpeed
    results = [trained(Case(**case), directory) for case in json.loads(cases)]
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(results), flush=True)
    # Together, and without the interpreter's teardown: gloo's threads may outlive their owners there and abort a rank.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
