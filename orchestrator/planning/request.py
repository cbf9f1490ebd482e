"""What is asked of a plan: the work, and the layouts that are open."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config import Recipe
from orchestrator.planning.shape import ModelShape
from orchestrator.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be trained."""

    shape: ModelShape
    sequence_length: int
    global_batch_size: int
    """Sequences."""
    steps: int
    dtype: str = "auto"
    attention_scores: bool = False
    """Whether attention keeps them whatever the devices could do."""

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def step_tokens(self) -> int:
        return self.global_batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be tried; None: whatever the model and the devices allow."""

    tensor_parallel: int | None = None
    pipeline_stages: int | None = None
    layers_per_stage: tuple[int, ...] = ()
    zero_stage: int | None = None
    recompute: bool | None = None
    offload: bool | None = None
    fewest_workers: int = 1
    most_workers: int | None = None
    most_replicas: int | None = None


def work_of(recipe: Recipe, shape: ModelShape) -> Work:
    train = recipe.train
    return Work(
        shape=shape,
        sequence_length=train.sequence_length,
        global_batch_size=largest_batch(train),
        steps=train.steps,
        dtype=train.dtype,
        attention_scores=train.attention == "eager",
    )


def space_of(train: TrainConfig) -> Space:
    """What a recipe leaves open: keys that stand in it are kept to."""
    asked, most = train.layout, train.global_batch_size
    return Space(
        tensor_parallel=asked.tensor_parallel,
        pipeline_stages=asked.stages,
        layers_per_stage=asked.layers_per_stage,
        zero_stage=asked.zero_stage,
        recompute=asked.recompute,
        offload=asked.offload,
        fewest_workers=train.workers.min,
        most_workers=train.workers.max,
        most_replicas=most if largest_batch(train) > most else None,
    )


def largest_batch(train: TrainConfig) -> int:
    """Sequences."""
    return max(train.global_batch_size, *(stretch.sequences for stretch in train.batch_ramp), 1)
