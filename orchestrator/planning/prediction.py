"""What a layout takes on devices that are known: memory by stage, whether it fits, and the time of a step by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import Load, Memory, memory_by_stage
from orchestrator.planning.platform import Platform
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.throughput import StepTime, mfu, step_time

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    stages: tuple[Memory, ...]
    """Of a worker of each pipeline stage."""
    step: StepTime
    tokens_per_second: float
    """Of all devices together."""
    mfu: float
    available_bytes: int
    """Of a device."""

    @property
    def peak_memory_bytes(self) -> int:
        return max(stage.total for stage in self.stages)

    @property
    def fullest_stage(self) -> int:
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.available_bytes

    @property
    def reason(self) -> str:
        """What the fullest stage needs, and of what the most."""
        memory = self.stages[self.fullest_stage]
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "base")
        most = sorted(parts, key=lambda part: -getattr(memory, part))[:2]
        named = " and ".join(f"{getattr(memory, part) / _GIB:.1f} GiB of {part}" for part in most)
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"{verdict}: stage {self.fullest_stage} of {len(self.stages)} needs {memory.total / _GIB:.1f} of "
            f"{self.available_bytes / _GIB:.1f} GiB, most of it {named}"
        )


def predict(
    shape: ModelShape,
    layout: Layout,
    platform: Platform,
    *,
    available_bytes: int,
    dtype: str,
    data_parallel: int,
    micro_batch_size: int,
    global_batch_size: int,
    sequence_length: int,
    sequence_parallel: bool = False,
    host_memory: bool = False,
) -> Prediction:
    """
    Args:
        available_bytes: of memory on a device.
        global_batch_size: sequences; the largest share counts where replicas do not divide it.
        sequence_parallel: whether tensor-parallel ranks cut norms and residuals along the sequence.
        host_memory: whether the devices are CPUs, which gain nothing by offloading.
    """
    load = Load(
        dtype=dtype,
        data_parallel=data_parallel,
        micro_batch_size=micro_batch_size,
        accumulation=math.ceil(math.ceil(global_batch_size / data_parallel) / micro_batch_size),
        sequence_length=sequence_length,
        sequence_parallel=sequence_parallel,
    )
    step = step_time(shape, layout, platform, load, math.ceil(global_batch_size / data_parallel) * data_parallel)
    tokens_per_second = global_batch_size * sequence_length / step.total
    return Prediction(
        stages=memory_by_stage(shape, layout, platform, load, host_memory=host_memory),
        step=step,
        tokens_per_second=tokens_per_second,
        mfu=mfu(shape, layout, platform, load, tokens_per_second),
        available_bytes=available_bytes,
    )
