"""Seconds that one optimizer step takes. The speeds are nominal: they rank layouts, they do not promise times."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.layout import Layout
from orchestrator.planning.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What a kind of device does in training, end to end."""

    flops: float
    """Floating-point operations a second that a device sustains in training."""
    link_bytes_per_s: float
    link_latency_s: float
    micro_batch_overhead_s: float


PLATFORMS = {
    "cpu": Platform(flops=4e10, link_bytes_per_s=1e9, link_latency_s=2e-4, micro_batch_overhead_s=5e-3),
    "cuda": Platform(flops=1e14, link_bytes_per_s=2.5e10, link_latency_s=2e-5, micro_batch_overhead_s=1e-3),
    "dcu": Platform(flops=6e12, link_bytes_per_s=1e10, link_latency_s=3e-5, micro_batch_overhead_s=2e-3),
}


def step_time_s(
    shape: ModelShape,
    platform: Platform,
    layout: Layout,
    *,
    data_parallel: int,
    accumulation: int,
    micro_batch_size: int,
    global_batch_size: int,
    sequence_length: int,
    width: int,
) -> float:
    """6 P operations a token, 8 with recomputation; a ring reduce-scatter of gradients and an all-gather of weights;
    under tensor parallelism four all-reduces of the hidden states a layer (Megatron-LM, 2019); in a pipeline the
    slowest stage sets the pace, and fills and drains once (Narayanan et al., 2021).

    Args:
        width: bytes of a gradient or weight on the link.
    """
    tokens = global_batch_size * sequence_length
    attention = 12 * shape.layers * shape.hidden_size * sequence_length
    work = tokens * (6 * shape.parameters + attention) * (8 / 6 if layout.recompute else 1)
    stages, blocks = layout.pipeline_stages, max(layout.layers_per_stage)
    uneven = blocks * stages / shape.layers
    bubble = (accumulation + stages - 1) / accumulation
    compute = work * uneven * bubble / (data_parallel * layout.devices * platform.flops)
    hidden = micro_batch_size * sequence_length * shape.hidden_size * width
    reductions = 4 * accumulation * bubble * blocks * _ring_s(layout.tensor_parallel, hidden, platform)
    own = width * shape.parameters / layout.devices
    overhead = accumulation * bubble * platform.micro_batch_overhead_s
    return compute + reductions + _ring_s(data_parallel, own, platform) + overhead


def _ring_s(ranks: int, size: float, platform: Platform) -> float:
    """Of an all-reduce, in two rounds of a ring."""
    return 2 * (ranks - 1) * (size / ranks / platform.link_bytes_per_s + platform.link_latency_s)
