"""Bytes that one worker needs, by part."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.shape import ModelShape

BASE_BYTES = {"cpu": 700 * 2**20, "cuda": 1200 * 2**20, "dcu": 1200 * 2**20}
"""Of a process before the model: imports, runtime context, communication buffers."""
FRAGMENTATION = 1.08


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a worker."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    base: int

    @property
    def total(self) -> int:
        live = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return int(live * FRAGMENTATION) + self.base


def worker_memory(
    shape: ModelShape,
    *,
    accelerator: str,
    dtype: str,
    data_parallel: int,
    micro_batch_size: int,
    sequence_length: int,
) -> Memory:
    """Under ZeRO-2, whose master weights, gradients and moments are split over the data-parallel ranks.

    States after Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020);
    DeepSpeed keeps fp32 masters apart from the working weights in fp32 runs too. Activations without recomputation
    after Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equation 1.
    """
    width = 4 if dtype == "fp32" else 2
    parameters, tokens = shape.parameters, micro_batch_size * sequence_length
    scores = 5 * shape.heads * sequence_length / shape.hidden_size
    per_layer = tokens * shape.hidden_size * (34 + scores) * width / 2
    return Memory(
        weights=width * parameters,
        gradients=4 * parameters // data_parallel,
        optimizer=12 * parameters // data_parallel,
        activations=int(per_layer * shape.layers),
        logits=3 * 4 * tokens * shape.vocab_size,
        base=BASE_BYTES[accelerator],
    )
