"""Bytes that one worker needs, by part and by pipeline stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.planning.layout import Layout
from orchestrator.planning.platform import Platform, nominal
from orchestrator.planning.shape import ModelShape

_KEPT_FETCHED = 500_000_000
"""Elements of the last layers that ZeRO-3 fetches for the forward pass and keeps for the backward pass: DeepSpeed
releases what is not used again within 10^9 elements (stage3_max_reuse_distance), there and back."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a worker."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of the micro-batches in flight, and of the block that is computed again."""
    logits: int
    buffers: int
    """Of communication: outputs for the next stage, gradients on their way, fetched weights."""
    base: int
    fragmentation: float = 1.0
    """What the allocator holds for each byte in use."""

    @property
    def total(self) -> int:
        live = self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers
        return int(live * self.fragmentation) + self.base


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through a layout in one optimizer step."""

    dtype: str
    data_parallel: int
    micro_batch_size: int
    """Sequences."""
    accumulation: int
    """Micro-batches a step and replica."""
    sequence_length: int
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks cut norms and residuals along the sequence, which Terrane's engine does not."""

    @property
    def width(self) -> int:
        """Bytes of a value in the working precision."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length


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
    attention_scores: bool = False,
) -> Memory:
    """Of the worker that needs the most, on devices of which nothing but the kind is known.

    Args:
        attention_scores: whether attention keeps them whatever the devices could do.
    """
    known = nominal(accelerator)
    platform = replace(known, keeps_attention_scores=attention_scores or known.keeps_attention_scores)
    load = Load(
        dtype=dtype,
        data_parallel=data_parallel,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        sequence_length=sequence_length,
    )
    found = memory_by_stage(shape, layout, platform, load, host_memory=accelerator == "cpu")
    return max(found, key=lambda memory: memory.total)


def memory_by_stage(
    shape: ModelShape, layout: Layout, platform: Platform, load: Load, *, host_memory: bool = False
) -> tuple[Memory, ...]:
    """Of a worker of each pipeline stage.

    States after Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020);
    DeepSpeed keeps fp32 masters apart from the working weights in fp32 runs too, except under ZeRO-0. What an engine
    holds of them is counted in tests/engine/test_state_bytes.py. A pipeline in
    1F1B order holds min(stages - stage, accumulation) micro-batches in a stage (Narayanan et al., "Memory-Efficient
    Pipeline-Parallel DNN Training", 2021), with the output of each beside what its blocks keep.

    Args:
        host_memory: whether devices compute in the memory that states would be offloaded to.
    """
    block = block_activations(shape, layout, platform, load)
    stages = range(layout.pipeline_stages)
    return tuple(_stage_memory(shape, layout, platform, load, stage, block, host_memory) for stage in stages)


def fullest_stage_memory(
    shape: ModelShape, layout: Layout, platform: Platform, load: Load, *, host_memory: bool = False
) -> Memory:
    """Of the stage that takes the most, without a look at every one: of stages with as many blocks the earliest does,
    since the most micro-batches are in flight there."""
    block = block_activations(shape, layout, platform, load)
    last = layout.pipeline_stages - 1
    first_alike: dict[int, int] = {}
    for stage in range(1, last):
        first_alike.setdefault(layout.layers_per_stage[stage], stage)
    found = [
        _stage_memory(shape, layout, platform, load, stage, block, host_memory)
        for stage in {0, *first_alike.values(), last}
    ]
    return max(found, key=lambda memory: memory.total)


def stage_memory(shape: ModelShape, layout: Layout, platform: Platform, load: Load, stage: int) -> Memory:
    """Of a worker of one stage, on devices with memory of their own."""
    block = block_activations(shape, layout, platform, load)
    return _stage_memory(shape, layout, platform, load, stage, block, host_memory=False)


def _stage_memory(
    shape: ModelShape, layout: Layout, platform: Platform, load: Load, stage: int, block: float, host_memory: bool
) -> Memory:
    size, blocks = layout.tensor_parallel, layout.layers_per_stage[stage]
    last = stage == layout.pipeline_stages - 1
    parameters = shape.rank_parameters(blocks, first=stage == 0, last=last, tensor_parallel=size)
    split = {level: load.data_parallel if layout.zero_stage >= level else 1 for level in (1, 3)}
    gradient, optimizer = _state_bytes(platform, layout, load)
    in_flight = min(layout.pipeline_stages - stage, load.accumulation)
    kept = _kept_of_a_block(shape, layout, load) if layout.recompute else block
    held = in_flight * blocks * kept + (block if layout.recompute else 0)
    return Memory(
        weights=load.width * parameters // split[3],
        gradients=int(gradient * _reduced_elements(shape, layout, load, parameters)),
        optimizer=0 if layout.offload and not host_memory else int(optimizer * parameters) // split[1],
        activations=int(held),
        logits=logits_bytes(shape, layout, load) if last else 0,
        buffers=_buffers(shape, layout, platform, load, parameters, in_flight, host_memory),
        base=platform.base_bytes,
        fragmentation=platform.fragmentation,
    )


def _state_bytes(platform: Platform, layout: Layout, load: Load) -> tuple[float, float]:
    """Of a parameter: (gradient, optimizer). Gradients add up in fp32."""
    gradient = platform.gradient_bytes or (6 if _of_bf16_alone(layout, load) else 4)
    if platform.bytes_per_parameter:
        return gradient, max(platform.bytes_per_parameter - load.width - gradient, 0)
    return gradient, 8 if load.dtype == "fp32" and not layout.zero_stage else 12


def _of_bf16_alone(layout: Layout, load: Load) -> bool:
    """Whether DeepSpeed takes an optimizer of its own, which keeps gradients of the last micro-batch in bf16 beside the
    sum, and has no buckets to reduce those of a single replica in."""
    return load.dtype == "bf16" and layout.zero_stage == 1 and not layout.offload


def _reduced_elements(shape: ModelShape, layout: Layout, load: Load, parameters: int) -> int:
    """Of gradients that the rank with the most keeps. In fp32 ZeRO-2 keeps tensors whole that a rank has a part of. Of
    these the embedding counts, which many replicas share: the rank that has its end has all of it and what follows."""
    if layout.zero_stage < 2:
        return parameters
    split = parameters // load.data_parallel
    if layout.zero_stage == 3 or load.dtype != "fp32":
        return split
    return min(parameters, split * math.ceil(shape.vocabulary_parameters(layout.tensor_parallel) / split))


def block_activations(shape: ModelShape, layout: Layout, platform: Platform, load: Load) -> float:
    """Bytes that the backward pass of one block and micro-batch needs.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1 to 4, which
    are for 16 bits; queries, keys, values and inner features counted by their own sizes, so that it holds for grouped
    queries and for gated networks, too. The latter come without dropout.
    """
    query = shape.query_size or shape.hidden_size
    keys = query * (shape.kv_heads or shape.heads) // shape.heads
    inner = (6 if shape.gated else 4) * (shape.ffn_size or 4 * shape.hidden_size)
    shared = (8 if shape.gated else 10) * shape.hidden_size
    cut = 4 * query + 4 * keys + inner
    if platform.keeps_attention_scores:
        cut += 5 * shape.heads * load.sequence_length
    if load.sequence_parallel:
        shared, cut = 0, cut + shared
    return load.rows * (shared + cut / layout.tensor_parallel) * load.width / 2


def _kept_of_a_block(shape: ModelShape, layout: Layout, load: Load) -> float:
    """Bytes of a block's input, all that recomputation keeps."""
    return hidden_bytes(shape, load) / (layout.tensor_parallel if load.sequence_parallel else 1)


def hidden_bytes(shape: ModelShape, load: Load) -> int:
    """Of the hidden states of a micro-batch."""
    return load.rows * shape.hidden_size * load.width


def logits_bytes(shape: ModelShape, layout: Layout, load: Load) -> int:
    """Of a micro-batch: the logits, their probabilities and their gradient in fp32; in 16 bits the head's output and
    its gradient beside them."""
    each = 12 if load.dtype == "fp32" else 16
    return each * load.rows * shape.vocab_size // layout.tensor_parallel


def _buffers(
    shape: ModelShape,
    layout: Layout,
    platform: Platform,
    load: Load,
    parameters: int,
    in_flight: int,
    host_memory: bool,
) -> int:
    outputs = in_flight * _kept_of_a_block(shape, layout, load) if layout.pipeline_stages > 1 else 0
    reduces = layout.zero_stage > 0 and (load.data_parallel > 1 or not _of_bf16_alone(layout, load))
    # DeepSpeed fills one bucket while the other is on its way, where both can go on at once: not on a CPU.
    buckets = (1 if host_memory else 2) * min(parameters, platform.bucket_elements) if reduces else 0
    fetched = 0
    if layout.zero_stage == 3 and load.data_parallel > 1:
        least = 2 * math.ceil(shape.block_parameters / layout.tensor_parallel)
        fetched = min(parameters, max(least, _KEPT_FETCHED))
    return int(outputs) + load.width * (buckets + fetched)
