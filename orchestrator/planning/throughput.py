"""Seconds that one optimizer step takes, by phase. Nominal speeds rank layouts and promise no times; a calibrated
platform does, and what preflight measured takes the place of nominal speeds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields, replace

from orchestrator.accelerators import ACCELERATORS, NodePool
from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import Load, block_activations, hidden_bytes, logits_bytes
from orchestrator.planning.platform import Platform, device, nominal
from orchestrator.planning.shape import ModelShape

PLATFORMS = {accelerator: nominal(accelerator) for accelerator in ACCELERATORS}

_STATES = 16
"""Bytes of a parameter that an update reads and writes. On the host, whose memory all devices of a node share, each
does so about as fast as over its link: an estimate."""

MEMORY_PASSES = 6
"""Over what a block keeps for its backward pass: written and read forward, read backward, its gradient written and read
twice, by kernels that are not fused."""


def platform_of(pool: NodePool, dtype: str) -> Platform:
    """What the slowest of the pool's measured nodes does; the nominal platform where none was measured.

    A plan must not change with the noise of a measurement, so speeds are rounded to the nominal one times half powers
    of two. Links count where training takes the same way as their measurement, TCP, and where they are slower than
    nominal: a faster wire does not make Gloo faster.
    """
    found = PLATFORMS[pool.accelerator]
    measured = [node.speeds for node in pool.nodes if node.speeds]
    flops = min((speeds.flops[dtype] for speeds in measured if dtype in speeds.flops), default=0.0)
    if flops:
        found = replace(found, flops=_steady(device(pool.accelerator).efficiency * flops, found.flops))
    if ACCELERATORS[pool.accelerator].backend != "gloo":
        return found
    bandwidth = [speeds.link_bytes_per_s for speeds in measured if speeds.link_bytes_per_s]
    latency = [speeds.link_latency_s for speeds in measured if speeds.link_latency_s]
    slowest = min([found.link_bytes_per_s, *bandwidth])
    latest = max([found.link_latency_s, *latency])
    return replace(
        found,
        link_bytes_per_s=_steady(slowest, found.link_bytes_per_s),
        link_latency_s=_steady(latest, found.link_latency_s),
    )


def _steady(speed: float, nominal: float) -> float:
    return float(nominal * 2 ** (round(2 * math.log2(speed / nominal)) / 2))


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step: what the slowest stage does in its micro-batches, one by one, and the rest."""

    compute: float
    tensor_parallel: float
    pipeline: float
    """Passing hidden states and their gradients to the neighbouring stages."""
    fetch: float
    """Of weights that ZeRO-3 splits, and of reducing their gradients."""
    overhead: float
    bubble: float
    """In which the slowest stage waits while the pipeline fills and drains."""
    data_parallel: float
    """Reducing gradients and gathering weights, once a step."""
    offload: float
    update: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


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
    """
    Args:
        width: bytes of a gradient or weight on the link.
    """
    load = Load(
        dtype="fp32" if width == 4 else "bf16",
        data_parallel=data_parallel,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        sequence_length=sequence_length,
    )
    return step_time(shape, layout, platform, load, global_batch_size).total


def step_time(shape: ModelShape, layout: Layout, platform: Platform, load: Load, global_batch_size: int) -> StepTime:
    """A pipeline in 1F1B order takes what every stage does in one micro-batch, and for each further one what its
    slowest stage does (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", 2021).

    Args:
        global_batch_size: sequences; micro-batches are smaller where they do not divide it.
    """
    filled = global_batch_size / (load.data_parallel * load.accumulation * load.micro_batch_size)
    blocks, last = layout.layers_per_stage, layout.pipeline_stages - 1
    alike = Counter((of_stage, stage == 0, stage == last) for stage, of_stage in enumerate(blocks))
    stages = {kind: _stage_time(shape, layout, platform, load, filled, *kind) for kind in alike}
    slowest = max(stages.values(), key=lambda stage: stage.total)
    count = load.accumulation
    return StepTime(
        compute=count * slowest.compute,
        tensor_parallel=count * slowest.tensor_parallel,
        pipeline=count * slowest.pipeline,
        fetch=count * slowest.fetch,
        overhead=count * slowest.overhead,
        bubble=sum(number * stages[kind].total for kind, number in alike.items()) - slowest.total,
        data_parallel=max(stage.data_parallel for stage in stages.values()),
        offload=max(stage.offload for stage in stages.values()),
        update=max(stage.update for stage in stages.values()),
    )


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Of stages that are alike: a micro-batch takes fixed_s and sequence_s for each sequence in it."""

    stages: int
    sequence_s: float
    fixed_s: float
    reduce_s: float
    """Of gradients, once a step."""
    update_s: float
    """With what offloading costs."""


def paces(shape: ModelShape, layout: Layout, platform: Platform, load: Load) -> tuple[Pace, ...]:
    """Step times of a layout with any micro-batch, since they are affine in its size.

    Args:
        load: whose micro-batch and accumulation do not matter.
    """
    blocks, last = layout.layers_per_stage, layout.pipeline_stages - 1
    alike = Counter((of_stage, stage == 0, stage == last) for stage, of_stage in enumerate(blocks))
    return tuple(
        stage_pace(shape, layout, platform, load, held, first, last, number)
        for (held, first, last), number in alike.items()
    )


def stage_pace(
    shape: ModelShape,
    layout: Layout,
    platform: Platform,
    load: Load,
    blocks: int,
    first: bool,
    last: bool,
    stages: int = 1,
) -> Pace:
    """Of a stage of so many blocks, whatever the layout says of them."""
    one = replace(load, micro_batch_size=1)
    single, double = (_stage_time(shape, layout, platform, one, filled, blocks, first, last) for filled in (1.0, 2.0))
    sequence_s = double.total - single.total
    return Pace(
        stages=stages,
        sequence_s=sequence_s,
        fixed_s=single.total - sequence_s,
        reduce_s=single.data_parallel,
        update_s=single.offload + single.update,
    )


@dataclass(frozen=True, kw_only=True)
class _StageTime:
    """Seconds of a worker of one stage in one micro-batch, the last three in one step."""

    compute: float
    tensor_parallel: float
    pipeline: float
    fetch: float
    overhead: float
    data_parallel: float
    offload: float
    update: float

    @property
    def total(self) -> float:
        """Of a micro-batch."""
        return self.compute + self.tensor_parallel + self.pipeline + self.fetch + self.overhead


def _stage_time(
    shape: ModelShape,
    layout: Layout,
    platform: Platform,
    load: Load,
    filled: float,
    blocks: int,
    first: bool,
    last: bool,
) -> _StageTime:
    """
    Args:
        filled: share of a micro-batch that there are sequences for.
    """
    size = layout.tensor_parallel
    parameters = shape.rank_parameters(blocks, first=first, last=last, tensor_parallel=size)
    replicas, hidden = load.data_parallel, filled * hidden_bytes(shape, load)
    tensor, data = _Link.of(platform, size), _Link.of(platform, size * replicas)
    neighbours = _Link.of(platform, size * replicas * layout.pipeline_stages)
    reductions = blocks * (6 if layout.recompute else 4) + first + last
    weights = load.width * parameters
    split = layout.zero_stage == 3
    offloaded = parameters // replicas if layout.offload else 0
    states = parameters // (replicas if layout.zero_stage else 1)
    return _StageTime(
        compute=_compute_s(shape, layout, platform, load, blocks, last) * filled,
        tensor_parallel=reductions * 2 * tensor.pass_s(size, hidden),
        pipeline=2 * ((not first) + (not last)) * (hidden / neighbours.bytes_per_s + neighbours.latency_s),
        fetch=3 * data.pass_s(replicas, weights) if split else 0.0,
        overhead=platform.micro_batch_overhead_s + (blocks + first + last) * platform.layer_overhead_s,
        data_parallel=0.0 if split else 2 * data.pass_s(replicas, weights),
        offload=(4 + load.width + 2 * _STATES) * offloaded / platform.host_link_bytes_per_s,
        update=2 * _STATES * (0 if layout.offload else states) / platform.memory_bytes_per_s,
    )


def _compute_s(shape: ModelShape, layout: Layout, platform: Platform, load: Load, blocks: int, last: bool) -> float:
    """Of a micro-batch: its matrix products, and its passes over the memory of activations."""
    size, again = layout.tensor_parallel, 4 / 3 if layout.recompute else 1.0
    flops = blocks * block_flops(shape, load) * again + (head_flops(shape, load) if last else 0)
    moved = blocks * block_activations(shape, layout, platform, load) * again
    moved += logits_bytes(shape, layout, load) if last else 0
    return flops / size / platform.flops + MEMORY_PASSES * moved / platform.memory_bytes_per_s


def block_flops(shape: ModelShape, load: Load) -> float:
    """Of a block and micro-batch, forward and backward: 6 a token and parameter, and the products of queries with keys
    and of scores with values, over whole sequences."""
    query = shape.query_size or shape.hidden_size
    return float(load.rows * (6 * shape.block_parameters + 12 * query * load.sequence_length))


def head_flops(shape: ModelShape, load: Load) -> float:
    width = shape.outer.embedding_size if shape.outer else shape.hidden_size
    return float(6 * load.rows * shape.vocab_size * width)


def mfu(shape: ModelShape, layout: Layout, platform: Platform, load: Load, tokens_per_second: float) -> float:
    """Share of the devices' peak that the model's own operations take; what is computed again does not count
    (Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022)."""
    of_a_token = (shape.layers * block_flops(shape, load) + head_flops(shape, load)) / load.rows
    return of_a_token * tokens_per_second / (platform.peak_flops * layout.devices * load.data_parallel)


@dataclass(frozen=True)
class _Link:
    bytes_per_s: float
    latency_s: float

    @classmethod
    def of(cls, platform: Platform, ranks: int) -> _Link:
        """That a group of neighbouring ranks is bound by."""
        if ranks <= platform.devices_per_node:
            return cls(platform.device_link_bytes_per_s, platform.device_link_latency_s)
        return cls(platform.link_bytes_per_s, platform.link_latency_s)

    def pass_s(self, ranks: int, size: float) -> float:
        """Of one round of a ring, as of a reduce-scatter or an all-gather: an all-reduce has two."""
        return (ranks - 1) * (size / ranks / self.bytes_per_s + self.latency_s)
