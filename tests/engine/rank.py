"""One rank of the engine under torchrun, without Ray: train on made-up tokens, save or load on the way, print losses.

torchrun --nproc-per-node N rank.py CHECKPOINTS LAST_STEP [--zero Z] [--load] [--save STEP] [--attempt A]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.config import ModelConfig, TrainConfig  # noqa: E402
from orchestrator.data.order import slice_of  # noqa: E402
from orchestrator.data.schedule import Share  # noqa: E402
from orchestrator.errors import UserError  # noqa: E402
from orchestrator.planning.search import Plan  # noqa: E402
from orchestrator.train import checkpoints  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.models import build_model  # noqa: E402

BATCH, LENGTH, VOCAB = 8, 32, 300
CONFIG = TrainConfig(sequence_length=LENGTH, global_batch_size=BATCH, steps=100, lr=1e-2, clip_norm=0.5)
MODEL = ModelConfig(layers=2, hidden_size=32, heads=2)


def batch(step: int) -> np.ndarray:
    """A stream that a model can learn: runs of counting tokens."""
    starts = np.random.default_rng(step).integers(0, VOCAB - LENGTH, (BATCH, 1))
    return starts + np.arange(LENGTH)


def share_of(step: int, rank: int, ranks: int) -> Share:
    first, end = slice_of(BATCH, rank, (1,) * ranks)
    return Share(
        step=step,
        tokens=batch(step)[first:end],
        counted=None,
        targets=BATCH * (LENGTH - 1),
        largest=math.ceil(BATCH / ranks),
    )


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    built: torch.nn.Module = build_model(MODEL, vocab_size=VOCAB, sequence_length=LENGTH, seed=1, dtype=dtype)
    return built


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints")
    parser.add_argument("last_step", type=int)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--save", type=int, default=0)
    parser.add_argument("--attempt", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plan = Plan(
        accelerator="cpu",
        node_ids=(),
        whole_cluster=True,
        data_parallel=ranks,
        zero_stage=args.zero,
        micro_batch_size=1,
        accumulation=math.ceil(BATCH / ranks),
        dtype="fp32",
        parameters=0,
        memory_bytes=0,
        step_time_s=0,
    )
    engine = Engine(model(), CONFIG, plan, accelerators.CPU)
    first = 1
    if args.load:
        commit = checkpoints.newest(args.checkpoints)
        assert commit is not None
        engine.load(args.checkpoints, commit)
        first = commit.step + 1
    losses = {}
    for step in range(first, args.last_step + 1):
        result = engine.step(share_of(step, rank, ranks), CONFIG.lr, flag=rank == ranks - 1 and step == args.last_step)
        assert result.flag == (step == args.last_step), "a flag of any rank reaches all"
        losses[step] = (result.loss, result.grad_norm)
        if step == args.save:
            position = checkpoints.Position(step=step, updates=step, past={})
            try:
                engine.save(args.checkpoints, args.attempt, None, position)
            except UserError as error:
                losses[step] = ("refused", error.message)
                break
    if rank == 0:
        print("LOSSES", json.dumps(losses), flush=True)
    # Together, and without the interpreter's teardown: gloo's threads may outlive their owners there and abort a rank.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
