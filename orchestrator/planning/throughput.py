"""Seconds that one optimizer step takes. The speeds rank layouts, they do not promise times: nominal ones, until what
preflight measured takes their place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.accelerators import ACCELERATORS, NodePool
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

TRAINING_EFFICIENCY = 0.4
"""Of what a device does in matrix products alone: about what the nominal speeds are of what their devices measure."""


def platform_of(pool: NodePool, dtype: str) -> Platform:
    """What the slowest of the pool's measured nodes does; the nominal platform where none was measured.

    A plan must not change with the noise of a measurement, so speeds are rounded to the nominal one times half powers
    of two. Links count where training takes the same way as their measurement, TCP, and where they are slower than
    nominal: a faster wire does not make Gloo faster.
    """
    nominal = PLATFORMS[pool.accelerator]
    measured = [node.speeds for node in pool.nodes if node.speeds]
    flops = min((speeds.flops[dtype] for speeds in measured if dtype in speeds.flops), default=0.0)
    if flops:
        nominal = replace(nominal, flops=_steady(TRAINING_EFFICIENCY * flops, nominal.flops))
    if ACCELERATORS[pool.accelerator].backend != "gloo":
        return nominal
    bandwidth = [speeds.link_bytes_per_s for speeds in measured if speeds.link_bytes_per_s]
    latency = [speeds.link_latency_s for speeds in measured if speeds.link_latency_s]
    slowest = min([nominal.link_bytes_per_s, *bandwidth])
    latest = max([nominal.link_latency_s, *latency])
    return replace(
        nominal,
        link_bytes_per_s=_steady(slowest, nominal.link_bytes_per_s),
        link_latency_s=_steady(latest, nominal.link_latency_s),
    )


def _steady(speed: float, nominal: float) -> float:
    return float(nominal * 2 ** (round(2 * math.log2(speed / nominal)) / 2))


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
