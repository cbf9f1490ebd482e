"""Training steps of two small models on one device: what they take in time and memory. Imports no Ray."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.accelerators import Accelerator
from orchestrator.data.schedule import Share
from orchestrator.model_config import ModelConfig
from orchestrator.planning.families import config_values
from orchestrator.planning.fitting import Trained
from orchestrator.planning.memory import worker_memory
from orchestrator.planning.plan import Plan
from orchestrator.planning.platform import Dtype
from orchestrator.train.engine import Engine
from orchestrator.train.models import FOR_TRAINING, config_object
from orchestrator.train.weights import RandomWeights
from orchestrator.train_config import TrainConfig

LAYERS, HEAD_SIZE = 4, 64
ZERO_STAGE, MICRO_BATCH_SIZE, ACCUMULATION = 2, 2, 2
WARM_UP, STEPS = 2, 5
"""Steps that do not count, and steps that do."""
VOCAB_SIZE = {"cpu": 2048, "cuda": 32_000}
SEQUENCE_LENGTH = {"cpu": 256, "cuda": 2048}
LARGEST, SMALLEST = {"cpu": 512, "cuda": 4096}, {"cpu": 128, "cuda": 512}
"""Hidden sizes of the larger model: a CPU takes seconds for a step of it, a GPU a tenth of one."""
MEMORY_SHARE = 0.7
"""Of the free memory, what the larger model is predicted to take at most."""


def train_two(accelerator: Accelerator, dtype: Dtype, free_bytes: int) -> tuple[Trained, Trained]:
    """A small model, and one with twice its hidden size.

    Args:
        free_bytes: of the device.
    """
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # which DeepSpeed asks for
    store = dist.HashStore()  # type: ignore[attr-defined]  # it takes no port
    dist.init_process_group(accelerator.backend, store=store, rank=0, world_size=1)
    try:
        hidden = hidden_size(accelerator, dtype, free_bytes)
        return _trained(accelerator, dtype, hidden // 2), _trained(accelerator, dtype, hidden)
    finally:
        dist.destroy_process_group()


def hidden_size(accelerator: Accelerator, dtype: Dtype, free_bytes: int) -> int:
    """Of the largest model that is to be trained; the smallest where none fits."""
    kind = accelerator.torch_device
    size = LARGEST[kind]
    while size > SMALLEST[kind] and _needed_bytes(accelerator, dtype, size) > MEMORY_SHARE * free_bytes:
        size //= 2
    return size


def _needed_bytes(accelerator: Accelerator, dtype: Dtype, hidden: int) -> int:
    trained = _to_train(accelerator, dtype, hidden)
    return worker_memory(
        trained.shape,
        trained.layout,
        accelerator=accelerator.name,
        dtype=dtype,
        data_parallel=1,
        micro_batch_size=trained.micro_batch_size,
        accumulation=trained.accumulation,
        sequence_length=trained.sequence_length,
    ).total


def _to_train(
    accelerator: Accelerator, dtype: Dtype, hidden: int, step_s: float = 0.0, state_bytes: int = 0
) -> Trained:
    kind = accelerator.torch_device
    model = ModelConfig(layers=LAYERS, hidden_size=hidden, heads=hidden // HEAD_SIZE)
    return Trained(
        model=config_values(model, VOCAB_SIZE[kind], SEQUENCE_LENGTH[kind]),
        dtype=dtype,
        zero_stage=ZERO_STAGE,
        micro_batch_size=MICRO_BATCH_SIZE,
        accumulation=ACCUMULATION,
        sequence_length=SEQUENCE_LENGTH[kind],
        step_s=step_s,
        state_bytes=state_bytes,
    )


def _trained(accelerator: Accelerator, dtype: Dtype, hidden: int) -> Trained:
    step_s, state_bytes = measured(accelerator, _to_train(accelerator, dtype, hidden))
    return _to_train(accelerator, dtype, hidden, step_s, state_bytes)


def measured(accelerator: Accelerator, asked: Trained) -> tuple[float, int]:
    """Train a model of random weights on random tokens: (median seconds of a step, bytes of its states).

    Raises:
        RuntimeError: no update was made.
    """
    device = torch.device(accelerator.torch_device)
    before = _allocated(device)
    config = config_object({**asked.model, **FOR_TRAINING})
    engine = Engine(config, _train_config(asked), _plan(accelerator, asked), accelerator)
    engine.start(RandomWeights(config, seed=0))
    times: list[float] = []
    held: list[int] = []
    for number, share in enumerate(_shares(asked)):
        look = functools.partial(_look, engine, before, held) if number < WARM_UP else None
        began = time.perf_counter()
        result = engine.step(share, lr=1e-4, accept=look)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARM_UP and result.applied:
            times.append(time.perf_counter() - began)
    del engine, look
    gc.collect()
    if not times or not held:
        raise RuntimeError("no update was made: every gradient overflowed")
    return statistics.median(times), held[-1]


def _look(engine: Engine, before: int, held: list[int], *_: float) -> bool:
    """Before an update, when gradients are there and activations are not."""
    on_device = engine.device.type == "cuda"
    held.append(_allocated(engine.device) - before if on_device else engine.state_bytes().total)
    return True


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _train_config(asked: Trained) -> TrainConfig:
    batch = asked.micro_batch_size * asked.accumulation
    return TrainConfig(sequence_length=asked.sequence_length, global_batch_size=batch, steps=WARM_UP + STEPS, lr=1e-4)


def _plan(accelerator: Accelerator, asked: Trained) -> Plan:
    return Plan(
        **asdict(asked.layout),
        accelerator=accelerator.name,
        node_ids=(),
        workers_by_node=(),
        data_parallel=1,
        micro_batch_size=asked.micro_batch_size,
        accumulation=asked.accumulation,
        dtype=asked.dtype,
        parameters=asked.shape.parameters,
        memory_bytes=0,
        step_time_s=0.0,
    )


def _shares(asked: Trained) -> Iterator[Share]:
    random: Any = np.random.default_rng(0)
    sequences, length = asked.micro_batch_size * asked.accumulation, asked.sequence_length
    for step in range(1, WARM_UP + STEPS + 1):
        tokens = random.integers(0, asked.shape.vocab_size, (sequences, length)).astype(np.uint16)
        yield Share(step=step, tokens=tokens, counted=None, targets=sequences * (length - 1), largest=sequences)
