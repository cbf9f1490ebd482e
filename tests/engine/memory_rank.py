"""One rank of the engine under torchrun: what it holds of weights, gradients and optimizer states, case by case.

torchrun --nproc-per-node N memory_rank.py CASES
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.models import FOR_TRAINING, config_object  # noqa: E402
from orchestrator.train.state_bytes import StateBytes  # noqa: E402
from orchestrator.train.weights import RandomWeights  # noqa: E402
from tests.engine.cases import CONFIG, Case, share_of  # noqa: E402
from tests.engine.rank import plan_of  # noqa: E402


def held(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """The most bytes of each part when the activations of a micro-batch are at their height, and when gradients are
    ready for an update; of buckets also in the backward pass; and the stage of this rank."""
    plan = plan_of(case)
    rank = dist.get_rank()
    config = config_object(values | FOR_TRAINING)
    engine = Engine(config, CONFIG, plan, accelerators.CPU)
    engine.start(RandomWeights(config, seed=1))
    seen: list[StateBytes] = []
    hook = engine.stage.register_forward_hook(lambda *_: seen.append(engine.state_bytes()))
    backward: list[int] = []
    for parameter in engine.stage.parameters():
        parameter.register_hook(lambda _: backward.append(engine.state_bytes().buckets))
    for step in (4, 6):
        engine.step(
            share_of(step, plan.role(rank)),
            CONFIG.lr,
            accept=lambda *_: bool(seen.append(engine.state_bytes()) or True),
        )
    hook.remove()
    return {part: max(asdict(state)[part] for state in seen) for part in asdict(seen[0])} | {
        "stage": plan.coordinates(rank)[0],
        "accumulation": plan.accumulation,
        "buckets_in_backward": max(backward, default=0),
        "moments": [asdict(state) for state in seen],
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for_all = []
    for case, values in json.loads(sys.argv[1]):
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, held(Case(**case), values))
        for_all.append(every)
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(for_all), flush=True)
    dist.barrier()  # as in rank.py
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
