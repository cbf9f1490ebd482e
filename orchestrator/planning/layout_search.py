"""The best layouts of a model on like devices, of all that the engine can train: branch and bound, exact.

Every combination of tensor and pipeline parallelism, ZeRO stage, recomputation, offload, number of replicas and
micro-batch is in the search. Times are bounded from below (bounds.py) for a layout on a range of numbers of replicas: a
range is cut into halves until its bound is no better than what was found, or one number is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from orchestrator.planning.bounds import Bounds
from orchestrator.planning.devices import Devices
from orchestrator.planning.layout import Layout, even_layers
from orchestrator.planning.memory import Load, Memory, fullest_stage_memory
from orchestrator.planning.platform import Platform
from orchestrator.planning.prediction import Prediction, predict
from orchestrator.planning.request import Space, Work
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.throughput import StepTime, step_time

BEST = 6
"""Of the combinations of tensor and pipeline parallelism, so many are found exactly."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its sizes, and what it takes."""

    accelerator: str
    layout: Layout
    dtype: str
    data_parallel: int
    micro_batch_size: int
    accumulation: int
    """Micro-batches of the largest share."""
    step: StepTime
    memory: Memory
    """Of the fullest stage."""

    @property
    def workers(self) -> int:
        return self.data_parallel * self.layout.devices

    @property
    def zero_stage(self) -> int:
        return self.layout.zero_stage

    @property
    def offload(self) -> bool:
        return self.layout.offload

    @property
    def cut(self) -> tuple[int, int]:
        """Tensor and pipeline parallelism."""
        return self.layout.tensor_parallel, self.layout.pipeline_stages

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """The least is the best: of those that are as fast, the one on fewer devices, then that which takes less
        memory."""
        return (round(self.step.total, 9), self.workers, self.memory.total, self.layout.zero_stage)

    def __str__(self) -> str:
        return (
            f"TP{self.layout.tensor_parallel} PP{self.layout.pipeline_stages} DP{self.data_parallel} "
            f"ZeRO-{self.layout.zero_stage} micro-batch {self.micro_batch_size} x {self.accumulation}"
            + " recompute" * self.layout.recompute
            + " offload" * self.layout.offload
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    devices: Devices
    best: tuple[Candidate, ...]
    """Of the best combinations of tensor and pipeline parallelism, the best first; empty where nothing fits."""
    rejected: tuple[Candidate, ...]
    """Of combinations that might have been faster, what takes the least memory, but does not fit. Where nothing fits,
    those of all, the nearest first."""
    layouts: int
    """Before sizes of micro-batches and numbers of replicas."""
    tried: int
    """Layouts with sizes that were not ruled out by a bound."""


def search(work: Work, devices: Devices, space: Space, keep: int = BEST) -> Found:
    """
    Raises:
        PlanError: the devices do not compute in the dtype that is asked for.
    """
    return _Search(work, devices, space, devices.dtype(work.dtype), keep).run()


def predicted(work: Work, devices: Devices, candidate: Candidate) -> Prediction:
    """Of every stage."""
    return predict(
        work.shape,
        candidate.layout,
        platform_for(work, devices, candidate.dtype),
        available_bytes=devices.memory_bytes,
        dtype=candidate.dtype,
        data_parallel=candidate.data_parallel,
        micro_batch_size=candidate.micro_batch_size,
        global_batch_size=work.global_batch_size,
        sequence_length=work.sequence_length,
        host_memory=devices.host_memory,
    )


def thriftiest(work: Work, devices: Devices, space: Space, enough_bytes: int = 0) -> Candidate | None:
    """The layout that takes the least memory, or the first that takes no more than enough; None: none can be laid."""
    return _Search(work, devices, space, devices.dtype(work.dtype), 1).thriftiest(enough_bytes)


def sized(work: Work, devices: Devices, layout: Layout, replicas: int, micro_batch_size: int, dtype: str) -> Candidate:
    """A layout with sizes that somebody chose."""
    search = _Search(work, devices, Space(), dtype, 1)
    return search.candidate(layout, search.load(replicas, micro_batch_size))


def platform_for(work: Work, devices: Devices, dtype: str) -> Platform:
    platform = devices.platforms[dtype]
    return replace(platform, keeps_attention_scores=work.attention_scores or platform.keeps_attention_scores)


def families(work: Work, devices: Devices, space: Space, dtype: str) -> Iterator[Layout]:
    """Every layout that the engine can train."""
    for size in _tensor_sizes(work.shape, devices, space):
        for stages in _stage_counts(work.shape, devices, space, size):
            blocks = space.layers_per_stage or even_layers(work.shape.layers, stages)
            for zero in _zero_stages(space, devices, size * stages > 1, stages > 1, dtype):
                for offload in _offloads(space, devices, zero):
                    for recompute in _either(space.recompute):
                        yield Layout(
                            tensor_parallel=size,
                            pipeline_stages=stages,
                            layers_per_stage=blocks,
                            zero_stage=zero,
                            offload=offload,
                            recompute=recompute,
                        )


def _tensor_sizes(shape: ModelShape, devices: Devices, space: Space) -> list[int]:
    cut = math.gcd(*(number for number in (shape.heads, shape.kv_heads, shape.ffn_size) if number))
    fitting = [size for size in range(1, devices.devices_per_node + 1) if cut % size == 0]
    return [size for size in fitting if space.tensor_parallel in (None, size)]


def _stage_counts(shape: ModelShape, devices: Devices, space: Space, size: int) -> list[int]:
    most = min(shape.layers, devices.groups(size), (space.most_workers or devices.count) // size)
    return [stages for stages in range(1, most + 1) if space.pipeline_stages in (None, stages)]


def _zero_stages(space: Space, devices: Devices, together: bool, pipelined: bool, dtype: str) -> list[int]:
    """DeepSpeed needs ZeRO to add gradients up in fp32, and a pipeline holds its gradients and parameters. On several
    devices ZeRO-0 must be asked for: ZeRO-1 has the same traffic, and each replica updates its part alone."""
    least, most = 1 if together or dtype != "fp32" else 0, 1 if pipelined else 3
    if space.zero_stage is None:
        alone = 1 in (devices.count, space.most_workers)
        return list(range(least if alone else 1, most + 1))
    return [max(space.zero_stage, least)] if space.zero_stage <= most else []


def _offloads(space: Space, devices: Devices, zero_stage: int) -> tuple[bool, ...]:
    """Not without ZeRO; to where devices compute already only if somebody asks for it."""
    only = False if not zero_stage or (devices.host_memory and not space.offload) else None
    return _either(space.offload, only)


def _either(given: bool | None, only: bool | None = None) -> tuple[bool, ...]:
    if only is not None:
        return (only,) if given in (None, only) else ()
    return (False, True) if given is None else (given,)


@dataclass
class _Search:
    work: Work
    devices: Devices
    space: Space
    dtype: str
    keep: int
    best: dict[tuple[int, int], Candidate] = field(default_factory=dict)
    """By tensor and pipeline parallelism."""
    rejected: list[Candidate] = field(default_factory=list)
    tried: int = 0

    @cached_property
    def platform(self) -> Platform:
        return platform_for(self.work, self.devices, self.dtype)

    @cached_property
    def bounds(self) -> Bounds:
        work = self.work
        return Bounds(work.shape, self.platform, work.global_batch_size, work.sequence_length, self.dtype)

    def run(self) -> Found:
        """A layout takes the least memory with micro-batches of one, and with its states split over the most replicas,
        or with one replica, which has nothing to reduce."""
        ordered: list[tuple[float, int, Layout, range]] = []
        for layout in families(self.work, self.devices, self.space, self.dtype):
            replicas = self._replicas(layout)
            if replicas:
                bound = self.bounds.of_range(layout, replicas[0], replicas[-1])
                ordered.append((bound, len(ordered), layout, replicas))
        ordered.sort(key=lambda family: family[:2])
        for bound, _, layout, replicas in ordered:
            if bound > self._threshold:
                break
            if bound > self._to_beat(layout):
                continue
            thrifty = self._thrifty(layout, replicas)
            if min(candidate.memory.total for candidate in thrifty) > self.devices.memory_bytes:
                self.rejected.append(thrifty[-1])
            else:
                self._try(layout, replicas[0], replicas[-1])
        return self._found(len(ordered))

    def _thrifty(self, layout: Layout, replicas: range) -> list[Candidate]:
        return [self.candidate(layout, self.load(count, 1)) for count in (replicas[0], replicas[-1])]

    def thriftiest(self, enough_bytes: int) -> Candidate | None:
        best: Candidate | None = None
        for layout in families(self.work, self.devices, self.space, self.dtype):
            replicas = self._replicas(layout)
            for found in self._thrifty(layout, replicas) if replicas else ():
                if best is None or found.memory.total < best.memory.total:
                    best = found
            if best and best.memory.total <= enough_bytes:
                return best
        return best

    def _found(self, layouts: int) -> Found:
        best = tuple(sorted(self.best.values(), key=lambda candidate: candidate.rank)[: self.keep])
        thriftiest: dict[tuple[int, int], Candidate] = {}
        for one in self.rejected:
            known = thriftiest.get(one.cut)
            if one.cut not in self.best and (known is None or one.memory.total < known.memory.total):
                thriftiest[one.cut] = one
        rejected = tuple(thriftiest.values())
        if not best:
            rejected = tuple(sorted(rejected, key=lambda one: one.memory.total))
        return Found(devices=self.devices, best=best, rejected=rejected, layouts=layouts, tried=self.tried)

    @property
    def _threshold(self) -> float:
        """Seconds of a step that a further layout must not exceed."""
        if len(self.best) < self.keep:
            return math.inf
        return sorted(candidate.step.total for candidate in self.best.values())[self.keep - 1]

    def _to_beat(self, layout: Layout) -> float:
        known = self.best.get((layout.tensor_parallel, layout.pipeline_stages))
        return min(self._threshold, known.step.total if known else math.inf)

    def _replicas(self, layout: Layout) -> range:
        """Numbers of them that there may be."""
        groups = self.devices.groups(layout.tensor_parallel) // layout.pipeline_stages
        workers = self.space.most_workers or self.devices.count
        most = min(groups, workers // layout.devices, self.space.most_replicas or self.work.global_batch_size)
        return range(math.ceil(self.space.fewest_workers / layout.devices), most + 1)

    def load(self, replicas: int, micro_batch_size: int) -> Load:
        return Load(
            dtype=self.dtype,
            data_parallel=replicas,
            micro_batch_size=micro_batch_size,
            accumulation=math.ceil(self.bounds.share(replicas) / micro_batch_size),
            sequence_length=self.work.sequence_length,
        )

    def candidate(self, layout: Layout, load: Load, step: StepTime | None = None) -> Candidate:
        return Candidate(
            accelerator=self.devices.accelerator,
            layout=layout,
            dtype=self.dtype,
            data_parallel=load.data_parallel,
            micro_batch_size=load.micro_batch_size,
            accumulation=load.accumulation,
            step=step or self._time(layout, load),
            memory=fullest_stage_memory(
                self.work.shape, layout, self.platform, load, host_memory=self.devices.host_memory
            ),
        )

    def _time(self, layout: Layout, load: Load) -> StepTime:
        sequences = self.bounds.share(load.data_parallel) * load.data_parallel
        return step_time(self.work.shape, layout, self.platform, load, sequences)

    def _try(self, layout: Layout, fewest: int, most: int) -> None:
        """Every size that may be better than what is known, the most replicas first."""
        if self.bounds.of_range(layout, fewest, most) > self._to_beat(layout):
            return
        if fewest == most:
            self._try_micro_batches(layout, most)
            return
        middle = (fewest + most) // 2
        self._try(layout, middle + 1, most)
        self._try(layout, fewest, middle)

    def _try_micro_batches(self, layout: Layout, replicas: int) -> None:
        share, bound = self.bounds.share(replicas), self.bounds.of(layout, replicas)
        for accumulation, size in micro_batches(share):
            if bound.with_accumulation(share, accumulation) > self._to_beat(layout):
                continue
            found = self.candidate(layout, self.load(replicas, size))
            self.tried += 1
            known = self.best.get(found.cut)
            if found.memory.total <= self.devices.memory_bytes and (known is None or found.rank < known.rank):
                self.best[found.cut] = found


def micro_batches(share: int) -> Iterator[tuple[int, int]]:
    """(how many, sequences of each but the last) that a share can be cut into, each number once."""
    parts = 1
    while parts <= share:
        size = math.ceil(share / parts)
        yield parts, size
        parts = math.ceil(share / (size - 1)) if size > 1 else share + 1
