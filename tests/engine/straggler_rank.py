"""One rank under torchrun, where rank 1 is slow in its forward pass: tells what every rank measured.

torchrun --nproc-per-node 2 straggler_rank.py DELAY_S CASES
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.train.engine import Engine  # noqa: E402
from tests.engine.cases import CONFIG, STEPS, Case, ModelWeights, configuration, model, share_of  # noqa: E402
from tests.engine.rank import plan_of  # noqa: E402

SLOW_RANK = 1
DELAY_S = float(sys.argv[1])


def delay(module: Any, arguments: Any) -> None:
    """For every sequence."""
    time.sleep(DELAY_S * len(arguments[0]))


def measured(case: Case) -> dict[str, Any]:
    """Medians over the steps: seconds a sequence by rank, and seconds of the steps of this rank."""
    plan = plan_of(case)
    role = plan.role(dist.get_rank())
    engine = Engine(configuration(case.family), CONFIG, plan, accelerators.CPU)
    engine.start(ModelWeights(model(case.family)))
    if dist.get_rank() == SLOW_RANK:
        next(iter(engine.stage.blocks.values())).register_forward_pre_hook(delay)
    forward_s, step_s = [], []
    for step in range(2, STEPS + 1):
        share = share_of(step, role)
        if share.targets:
            before = time.perf_counter()
            forward_s.append(engine.step(share, CONFIG.lr).forward_s)
            step_s.append(time.perf_counter() - before)
    return {"forward_s": np.median(forward_s, 0).tolist(), "step_s": float(np.median(step_s))}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for case in json.loads(sys.argv[2]):
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, measured(Case(**case)))
        assert all(other["forward_s"] == told[0]["forward_s"] for other in told), "all ranks know of all"
        results.append({"forward_s": told[0]["forward_s"], "step_s": [other["step_s"] for other in told]})
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(results), flush=True)
    dist.barrier()  # as in rank.py
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
