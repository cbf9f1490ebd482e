"""One rank of the engine under torchrun, without Ray: trains one case after the other, prints losses and norms.

torchrun --nproc-per-node N rank.py CHECKPOINTS CASES
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.errors import UserError  # noqa: E402
from orchestrator.planning.search import Plan  # noqa: E402
from orchestrator.train import checkpoints  # noqa: E402
from orchestrator.train.checkpoints import Retention  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.saver import Saver  # noqa: E402
from tests.engine.cases import CONFIG, FILLER, SCHEDULE, STEPS, Case, ModelWeights, configuration, model, share_of  # noqa: E402


def trained(case: Case, directory: str) -> dict[str, Any]:
    """{step: (loss, norm)} of the steps that were not passed over, as the worker's loop goes through them."""
    rank = dist.get_rank()
    plan = plan_of(case)
    role = plan.role(rank)
    engine = Engine(configuration(case.family), CONFIG, plan, accelerators.CPU, FILLER if case.apart else None)
    updates = 0
    if not case.load:
        engine.start(ModelWeights(model(case.family)))
    if case.load:
        commit = checkpoints.read_commit(directory, case.load)
        engine.load(directory, commit)
        updates = commit.position.updates
    losses = {}
    saver = Saver(directory, case.attempt, Retention(last=STEPS), lambda commit, timing: None)
    for step in range(case.load + 1, case.last + 1):
        share = share_of(step, replace(role, tensor_rank=0))
        if share.targets:
            last = step == case.last
            result = engine.step(share, CONFIG.lr, flag=last and rank == case.ranks - 1)
            assert result.flag == last, "a flag of any rank reaches all"
            losses[step] = (result.loss, result.grad_norm)
            updates += 1
        if step in case.save:
            position = checkpoints.Position(step=step, updates=updates, past=SCHEDULE.past(step))
            engine.save(saver, position)
    try:
        saver.wait()
    except UserError as error:
        return {"losses": losses, "refused": error.message}
    return {"losses": losses}


def plan_of(case: Case) -> Plan:
    return Plan(
        accelerator="cpu",
        node_ids=(),
        whole_cluster=True,
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
    deepspeed.init_distributed("gloo", verbose=False)
    results = [trained(Case(**case), directory) for case in json.loads(cases)]
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(results), flush=True)
    # Together, and without the interpreter's teardown: gloo's threads may outlive their owners there and abort a rank.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
