"""What training itself says of a device: constants fitted to the steps of two models that one device trained. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import Load, Memory, memory_by_stage
from orchestrator.planning.platform import Device, Dtype, Platform
from orchestrator.planning.shape import ModelShape, shape_of
from orchestrator.planning.throughput import step_time


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that one device trained for some steps."""

    model: Mapping[str, Any]
    """Its config.json."""
    dtype: Dtype
    zero_stage: int
    micro_batch_size: int
    accumulation: int
    sequence_length: int
    step_s: float
    """Of one optimizer step, the median."""
    state_bytes: int
    """Of weights, gradients and optimizer states, when gradients are ready for an update."""

    @property
    def shape(self) -> ModelShape:
        return shape_of(dict(self.model))

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_parallel=1,
            pipeline_stages=1,
            layers_per_stage=(self.shape.layers,),
            zero_stage=self.zero_stage,
            offload=False,
            recompute=False,
        )

    @property
    def load(self) -> Load:
        return Load(
            dtype=self.dtype,
            data_parallel=1,
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation,
            sequence_length=self.sequence_length,
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    efficiency: float
    """Of the best matrix products, what those of a training step reach."""
    layer_overhead_s: float


def fitted(small: Trained, larger: Trained, device: Device) -> Fit:
    """The efficiency and the time a layer and micro-batch with which both models take the time that they took.

    Two times for two constants: nothing is left over to check them by. All others are as the device has them, measured
    or nominal, but for the time of a micro-batch, which cannot be told from that of its layers and counts as zero.
    Smaller matrices are slower, so that what the small model loses by them counts as time of its layers.
    Where noise makes a constant impossible, it is the possible one next to it, and the larger model decides.

    Args:
        device: with the speeds of products and of memory that were measured.
    """
    platform = replace(device.platform(larger.dtype), layer_overhead_s=0, micro_batch_overhead_s=0)
    (products, left, layers), (more_products, more_left, more_layers) = (
        _terms(trained, platform) for trained in (small, larger)
    )
    determinant = products * more_layers - more_products * layers
    slowness = (left * more_layers - more_left * layers) / determinant
    layer_s = (products * more_left - more_products * left) / determinant
    if layer_s < 0:
        slowness, layer_s = more_left / more_products, 0.0
    if slowness < 1:
        slowness, layer_s = 1.0, max(0.0, (more_left - more_products) / more_layers)
    return Fit(efficiency=1 / slowness, layer_overhead_s=layer_s)


def _terms(trained: Trained, platform: Platform) -> tuple[float, float, float]:
    """Of a step: (seconds of its matrix products at peak speed, seconds that are left for them and for its layers,
    layers that it passes)."""
    rest_s = predicted_step_s(trained, replace(platform, flops=math.inf))
    products_s = predicted_step_s(trained, replace(platform, flops=platform.peak_flops)) - rest_s
    layers = predicted_step_s(trained, replace(platform, flops=math.inf, layer_overhead_s=1.0)) - rest_s
    return products_s, trained.step_s - rest_s, layers


def predicted_step_s(trained: Trained, platform: Platform) -> float:
    batch = trained.micro_batch_size * trained.accumulation
    return step_time(trained.shape, trained.layout, platform, trained.load, batch).total


def bytes_per_parameter(small: Trained, larger: Trained) -> float:
    """Of weights, gradients and optimizer states, as the difference of two models has it: what does not grow with the
    model does not count."""
    return (larger.state_bytes - small.state_bytes) / (larger.shape.parameters - small.shape.parameters)


def predicted_bytes_per_parameter(trained: Trained, platform: Platform) -> float:
    (memory,) = memory_by_stage(trained.shape, trained.layout, platform, trained.load)
    return _states(memory) / trained.shape.parameters


def _states(memory: Memory) -> int:
    return memory.weights + memory.gradients + memory.optimizer
