"""Seconds that one optimizer step takes. The speeds are nominal: they rank layouts, they do not promise times."""

from __future__ import annotations

from dataclasses import dataclass

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
    *,
    data_parallel: int,
    accumulation: int,
    global_batch_size: int,
    sequence_length: int,
    width: int,
) -> float:
    """6 P operations a token, a ring reduce-scatter of gradients and an all-gather of weights.

    Args:
        width: bytes of a gradient or weight on the link.
    """
    tokens = global_batch_size * sequence_length
    attention = 12 * shape.layers * shape.hidden_size * sequence_length
    compute = tokens * (6 * shape.parameters + attention) / (data_parallel * platform.flops)
    ring = data_parallel - 1
    transfer = 2 * ring / data_parallel * width * shape.parameters / platform.link_bytes_per_s
    return compute + transfer + 2 * ring * platform.link_latency_s + accumulation * platform.micro_batch_overhead_s
