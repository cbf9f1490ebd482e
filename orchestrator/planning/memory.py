"""Bytes that one worker needs, by part."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.layout import Layout
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
    layout: Layout,
    *,
    accelerator: str,
    dtype: str,
    data_parallel: int,
    micro_batch_size: int,
    accumulation: int,
    sequence_length: int,
) -> Memory:
    """Of the worker that needs the most.

    States after Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020);
    DeepSpeed keeps fp32 masters apart from the working weights in fp32 runs too, except under ZeRO-0. Activations after
    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1 and 2; a
    pipeline's first stage holds those of as many micro-batches as there are stages.
    """
    width = 4 if dtype == "fp32" else 2
    blocks = max(layout.layers_per_stage)
    parameters = (blocks * shape.block_parameters + shape.outer_parameters) // layout.tensor_parallel
    split = [data_parallel if layout.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    in_host = layout.offload and accelerator != "cpu"
    in_flight = min(layout.pipeline_stages, accumulation)
    rows = micro_batch_size * sequence_length
    return Memory(
        weights=width * parameters // split[2],
        gradients=4 * parameters // split[1],
        optimizer=0 if in_host else (12 if layout.zero_stage else 8) * parameters // split[0],
        activations=int(_activations(shape, layout, rows, sequence_length, blocks) * in_flight * width / 2),
        logits=3 * 4 * rows * shape.vocab_size // layout.tensor_parallel,
        base=BASE_BYTES[accelerator],
    )


def _activations(shape: ModelShape, layout: Layout, rows: int, sequence_length: int, blocks: int) -> float:
    """Bytes of one micro-batch in 16 bits."""
    scores = 5 * shape.heads * sequence_length / shape.hidden_size
    block = rows * shape.hidden_size * (10 + (24 + scores) / layout.tensor_parallel)
    return blocks * 2 * rows * shape.hidden_size + block if layout.recompute else blocks * block
