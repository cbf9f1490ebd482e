"""One rank of a model replica under torchrun: takes its shares through replicated(), tells what it got.

torchrun --nproc-per-node 6 replica_rank.py

Three pipeline stages of two tensor ranks each. Step 2 is passed over; step 3 has no sequence for this replica. They go
through the steps three times: nothing fails, then the reader of the first stage fails at step 2, and then at step 4.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from orchestrator.data.schedule import Role, Share
from orchestrator.errors import PeerFailed
from orchestrator.train.replicas import replicated

STAGES, TENSOR, LENGTH = 3, 2, 7
SEQUENCES = {1: 2, 2: 2, 3: 0, 4: 3}
DTYPE = {1: np.uint16, 3: np.uint16, 4: np.uint32}
MASKED = {3, 4}


def shares(role: Role, fail_at: int) -> Iterator[Share]:
    """What orchestrator.data.stream gives to a role, but made up."""
    for step, sequences in SEQUENCES.items():
        passed_over = step == 2
        if step == fail_at and role.reads and role.pipeline_stage == 0:
            raise ValueError("no such shard")
        tokens = counted = None
        if role.reads and not passed_over:
            random = np.random.default_rng(step)
            kind = DTYPE[step]
            tokens = random.integers(0, np.iinfo(kind).max, (sequences, LENGTH), kind, endpoint=True)
            counted = random.random((sequences, LENGTH)) < 0.5 if step in MASKED else None
        yield Share(step=step, tokens=tokens, counted=counted, targets=0 if passed_over else 99, largest=3)


def told(values: np.ndarray | None) -> Any:
    return None if values is None else [str(values.dtype), values.shape, values.tobytes().hex()]


def gone_through(role: Role, group: Any, source: int, fail_at: int) -> dict[str, Any]:
    """What the rank got in each step, its collectives, and the error that it ended with."""
    steps: list[Any] = []
    calls, error = 0, None
    broadcast = dist.broadcast

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return broadcast(*arguments)

    dist.broadcast = counting
    try:
        for share in replicated(shares(role, fail_at), role, group, source):
            steps.append([share.step, share.targets, share.largest, told(share.tokens), told(share.counted)])
    except (ValueError, PeerFailed) as caught:
        error = f"{type(caught).__name__}: {caught}"
    dist.broadcast = broadcast
    return {"steps": steps, "calls": calls, "error": error}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    stage, tensor_rank = divmod(dist.get_rank(), TENSOR)
    groups = [dist.new_group([first, first + 1]) for first in range(0, STAGES * TENSOR, TENSOR)]
    role = Role(0, (1,), stage, STAGES, tensor_rank)
    found: dict[Any, Any] = {
        fail_at: gone_through(role, groups[stage], stage * TENSOR, fail_at) for fail_at in (0, 2, 4)
    }
    found["alone"] = gone_through(Role(0, (1,)), None, dist.get_rank(), 0)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(gathered), flush=True)
    dist.barrier()  # as in rank.py
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
