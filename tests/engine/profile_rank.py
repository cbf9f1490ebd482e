"""One rank of a short training that is traced, under torchrun.

torchrun --nproc-per-node N profile_rank.py FOLDER CASES
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.profiling import Profiler  # noqa: E402
from tests.engine.cases import CONFIG, Case, ModelWeights, configuration, model, share_of  # noqa: E402
from tests.engine.rank import plan_of  # noqa: E402


def main() -> None:
    folder, cases = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    for number, case in enumerate(Case(**values) for values in json.loads(cases)):
        plan = plan_of(case)
        engine = Engine(configuration(), CONFIG, plan, accelerators.CPU)
        engine.start(ModelWeights(model()))
        role = replace(plan.role(rank), tensor_rank=0)
        profiler = Profiler(f"{folder}/{number}/rank-{rank}.json.gz", (6, 7))
        for share in profiler.over((share_of(step, role) for step in range(2, 10)), first=2):
            if share.targets:
                engine.step(share, CONFIG.lr)
        profiler.close()
    if rank == 0:
        print("RESULTS []", flush=True)
    dist.barrier()  # as in rank.py
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
