"""What the ranks of the engine tests train on: a schedule with steps of every kind, made-up tokens, a small model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.config import ModelConfig, TrainConfig
from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.data.schedule import Role, Schedule, Share

LENGTH, VOCAB, SAMPLES, FILLER = 32, 300, 64, 2
STEPS = 9
UNTRAINED, SAVED = 1, 5
"""Steps after which there are checkpoints: nothing was learned before the first; both were passed over themselves."""

SCHEDULE = Schedule(
    order=Order(
        pools=(Pool(0, SAMPLES),),
        stages=(Stage((1.0,)),),
        batches=(Batches(2, 3), Batches(8, 3), Batches(5)),
        seed=7,
        block=8,
    ),
    sequence_length=LENGTH,
    corpus_hash="",
    skip_steps=((UNTRAINED, UNTRAINED), (SAVED, SAVED)),
    exclusions=Exclusions(
        lost=(LostShard(name="lost", first=8, samples=10, reason="missing"),),
        quarantined={
            "a middle": tuple(Run(sample, 5, 12) for sample in range(20, SAMPLES, 4)),
            "a beginning": tuple(Run(sample, 0, 3) for sample in range(21, SAMPLES, 8)),
        },
        filler=FILLER,
    ),
)
CONFIG = TrainConfig(sequence_length=LENGTH, global_batch_size=8, steps=100, lr=3e-3, clip_norm=0.8)
MODEL = ModelConfig(layers=2, hidden_size=32, heads=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine's way through the schedule."""

    shares: tuple[int, ...]
    zero: int = 2
    micro_batch: int = 2
    load: int = 0
    """The step to go on after; 0: from the beginning."""
    last: int = STEPS
    save: tuple[int, ...] = ()
    """Commit after these steps."""
    attempt: int = 1


def share_of(step: int, role: Role) -> Share:
    """What orchestrator.data.stream gives, without Ray."""
    tokens = None if SCHEDULE.skips(step) else samples(SCHEDULE.ids([step], role))
    return SCHEDULE.share(step, role, tokens)


def samples(ids: np.ndarray) -> np.ndarray:
    """Something that a model can learn: runs of counting tokens."""
    starts = np.random.default_rng(1).integers(0, VOCAB - LENGTH, SAMPLES)[ids]
    return (starts[:, None] + np.arange(LENGTH)).astype(np.uint16)


def model() -> Any:
    import torch

    from orchestrator.train.models import build_model

    return build_model(MODEL, vocab_size=VOCAB, sequence_length=LENGTH, seed=1, dtype=torch.float32)
