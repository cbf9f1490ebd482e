"""How a model is cut: what a recipe says of it, checked against the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import PlanError
from orchestrator.planning.shape import ModelShape
from orchestrator.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    tensor_parallel: int
    pipeline_stages: int
    layers_per_stage: tuple[int, ...]
    """Decoder blocks of each pipeline stage; the embedding goes with the first and the head with the last."""
    zero_stage: int
    offload: bool
    recompute: bool

    @property
    def devices(self) -> int:
        """Of one replica of the model."""
        return self.tensor_parallel * self.pipeline_stages

    def __str__(self) -> str:
        parts = [f"ZeRO-{self.zero_stage}"]
        if self.tensor_parallel > 1:
            parts.append(f"tensor parallel {self.tensor_parallel}")
        if self.pipeline_stages > 1:
            parts.append(f"{self.pipeline_stages} stages of {'+'.join(map(str, self.layers_per_stage))} layers")
        parts += ["offload"] * self.offload + ["recompute"] * self.recompute
        return ", ".join(parts)


def layout_of(train: TrainConfig, shape: ModelShape, dtype: str) -> Layout:
    """The plainest that the recipe allows: what it leaves open is not cut, and neither offloaded nor computed again.

    Raises:
        PlanError: the model cannot be cut like that, or DeepSpeed cannot train it so.
    """
    asked = train.layout
    size, stages = asked.tensor_parallel or 1, asked.stages or 1
    _check_tensor_parallel(size, shape)
    _check_precision(train, dtype)
    return Layout(
        tensor_parallel=size,
        pipeline_stages=stages,
        layers_per_stage=_layers_per_stage(asked.layers_per_stage, stages, shape.layers),
        zero_stage=_zero_stage(asked.zero_stage, bool(asked.offload), stages, size, dtype),
        offload=bool(asked.offload),
        recompute=bool(asked.recompute),
    )


def _zero_stage(asked: int | None, offload: bool, stages: int, tensor_parallel: int, dtype: str) -> int:
    together = stages > 1 or tensor_parallel > 1
    if asked is None:
        return 1 if together else 2
    if asked >= 2 and stages > 1:
        raise PlanError(
            f"train.layout.zero_stage={asked} does not go with pipeline_stages={stages}: a pipeline "
            "holds its gradients and parameters over many micro-batches",
            "use zero_stage 0 or 1, or pipeline_stages=1",
        )
    if offload and not asked:
        raise PlanError("train.layout.offload needs ZeRO", "use train.layout.zero_stage 1, 2 or 3")
    # In 16 bits DeepSpeed needs ZeRO to add gradients up in fp32; with a pipeline and ZeRO-0 it clips wrongly.
    return max(asked, 1) if together or dtype != "fp32" else asked


def why_zero_stage(train: TrainConfig, layout: Layout) -> str:
    """Where the plan's ZeRO stage is not the recipe's."""
    asked = train.layout.zero_stage
    if asked in (None, layout.zero_stage):
        return ""
    return f"; ZeRO-{layout.zero_stage} in place of ZeRO-{asked}, which would add up or clip gradients wrongly"


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Of each pipeline stage; what is left over goes to the last ones, where fewer micro-batches are in flight."""
    return tuple(layers // stages + (stage >= stages - layers % stages) for stage in range(stages))


def _layers_per_stage(given: tuple[int, ...], stages: int, layers: int) -> tuple[int, ...]:
    if not given:
        if stages > layers:
            raise PlanError(
                f"train.layout.pipeline_stages={stages} is more than the model's {layers} layers",
                f"use {layers} or less",
            )
        return even_layers(layers, stages)
    if len(given) != stages or sum(given) != layers:
        raise PlanError(
            f"train.layout.layers_per_stage={list(given)} must have one entry for each of the {stages} pipeline stages "
            f"and add up to the model's {layers} layers",
            "leave it out to split them evenly",
        )
    return given


def _check_tensor_parallel(size: int, shape: ModelShape) -> None:
    """Its ranks take heads, and inner features of the feed-forward networks, in equal numbers."""
    cut = {"heads": shape.heads, "heads of keys and values": shape.kv_heads, "feed-forward features": shape.ffn_size}
    given = {what: number for what, number in cut.items() if number}
    for what, number in given.items():
        if number % size:
            common = math.gcd(*given.values())
            fitting = [n for n in range(1, shape.heads + 1) if common % n == 0]
            raise PlanError(
                f"train.layout.tensor_parallel={size} does not divide the model's {number} {what}",
                f"use {', '.join(map(str, fitting))}",
            )


def _check_precision(train: TrainConfig, dtype: str) -> None:
    if train.keep_documents_apart and train.attention == "flash_attention_2":
        raise PlanError(
            "train.keep_documents_apart needs a mask, which attention=flash_attention_2 does not take",
            "use train.attention=sdpa",
        )
    if train.attention == "flash_attention_2" and dtype == "fp32":
        raise PlanError("train.attention=flash_attention_2 computes in 16 bits only", "use sdpa, or dtype bf16 or fp16")
