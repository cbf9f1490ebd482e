"""One pipeline over pools of unlike devices that share a backend: each stage on one pool, with the layers that suit it.

The first stages hold the most micro-batches, so they stand on the devices with the most memory. For given stages the
layers are split so that all micro-batches take the least time: exact. What comes once a step, the reduction of
gradients and the update, is weighed on few devices alone.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.planning.devices import Devices
from orchestrator.planning.layout import Layout, even_layers
from orchestrator.planning.layout_search import micro_batches, platform_for
from orchestrator.planning.memory import Load, Memory, stage_memory
from orchestrator.planning.request import Work
from orchestrator.planning.throughput import Pace, stage_pace

EXACT_DEVICES, EXACT_SPLITS = 12, 20_000
"""Up to so many devices every grid of stages is tried; and every split of the layers, where there are no more."""
LARGEST_MICRO_BATCH = 16
"""Sequences: larger ones leave a pipeline too few to fill it."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    layout: Layout
    pools: tuple[Devices, ...]
    """Of each stage."""
    dtype: str
    data_parallel: int
    micro_batch_size: int
    accumulation: int
    stages: tuple[Memory, ...]
    step_time_s: float

    @property
    def fits(self) -> bool:
        return all(memory.total <= pool.memory_bytes for memory, pool in zip(self.stages, self.pools, strict=True))


@dataclass(frozen=True)
class Stage:
    """Seconds of a stage in a micro-batch, and the most layers that it has memory for."""

    layer_s: float
    fixed_s: float
    most: int


def mixed_pipeline(work: Work, pools: Sequence[Devices]) -> Mixed | None:
    """The fastest of those that have every replica on all pools, with ZeRO-1; None: none fits, or the pools do not go
    together. On few devices every number of stages on each pool is tried; on more those that leave no device idle which
    another replica could not take, with the most replicas that they go with."""
    pools = sorted(pools, key=lambda pool: -pool.memory_bytes)
    shared = [dtype for dtype in pools[0].platforms if all(dtype in pool.platforms for pool in pools)]
    if work.dtype != "auto":
        shared = [dtype for dtype in shared if dtype == work.dtype]
    if len(pools) < 2 or len({pool.accelerator for pool in pools}) > 1 or pools[0].host_memory or not shared:
        return None
    dtype = max(shared, key=lambda one: (min(pool.platforms[one].flops for pool in pools), one == "bf16"))
    bounded: list[tuple[float, int, _Grid]] = []
    for tensor_parallel, replicas, counts in _grids(work, pools):
        for recompute, (accumulation, size) in itertools.product(
            (False, True), micro_batches(math.ceil(work.global_batch_size / replicas))
        ):
            if size <= LARGEST_MICRO_BATCH:
                load = Load(
                    dtype=dtype,
                    data_parallel=replicas,
                    micro_batch_size=size,
                    accumulation=accumulation,
                    sequence_length=work.sequence_length,
                )
                grid = _Grid(work, pools, counts, tensor_parallel, recompute, load)
                bounded.append((grid.without_limits_s, len(bounded), grid))
    best: Mixed | None = None
    for bound, _, grid in sorted(bounded, key=lambda one: one[:2]):
        if best and bound >= best.step_time_s:
            break
        found = grid.laid()
        if found and (best is None or found.step_time_s < best.step_time_s):
            best = found
    return best


def _grids(work: Work, pools: Sequence[Devices]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(tensor parallelism, replicas, stages on each pool)."""
    cut = math.gcd(*(number for number in (work.shape.heads, work.shape.kv_heads, work.shape.ffn_size) if number))
    for size in range(1, min(pool.devices_per_node for pool in pools) + 1):
        if cut % size:
            continue
        seen = set()
        for replicas in range(min(*(pool.groups(size) for pool in pools), work.global_batch_size), 0, -1):
            most = tuple(pool.groups(size) // replicas for pool in pools)
            if sum(pool.count for pool in pools) <= EXACT_DEVICES:
                every = itertools.product(*(range(1, count + 1) for count in most))
                yield from ((size, replicas, counts) for counts in every if sum(counts) <= work.shape.layers)
            elif sum(most) > work.shape.layers:
                break
            elif most not in seen:
                seen.add(most)
                yield size, replicas, most


def laid(
    work: Work, pools: Sequence[Devices], counts: Sequence[int], tensor_parallel: int, recompute: bool, load: Load
) -> Mixed | None:
    """With the best split of layers; None: no split fits.

    Args:
        counts: stages on each pool, in their order.
    """
    return _Grid(work, pools, counts, tensor_parallel, recompute, load).laid()


class _Grid:
    """A pipeline whose layers are not split yet."""

    def __init__(
        self,
        work: Work,
        pools: Sequence[Devices],
        counts: Sequence[int],
        tensor_parallel: int,
        recompute: bool,
        load: Load,
    ) -> None:
        self.work = work
        self.load = load
        self.pools = [pool for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
        self.layout = Layout(
            tensor_parallel=tensor_parallel,
            pipeline_stages=len(self.pools),
            layers_per_stage=even_layers(work.shape.layers, len(self.pools)),
            zero_stage=1,
            offload=False,
            recompute=recompute,
        )
        platforms = {pool.name: platform_for(work, pool, load.dtype) for pool in pools}
        self.platforms = [platforms[pool.name] for pool in self.pools]
        self.few = sum(pool.count for pool in pools) <= EXACT_DEVICES
        self.known: dict[tuple[str, int, bool, bool], Pace] = {}
        self.filled = math.ceil(work.global_batch_size / load.data_parallel) / load.accumulation
        self.unlimited = self._unlimited()

    @property
    def without_limits_s(self) -> float:
        """Seconds of a step, if there were memory enough, and nothing to reduce."""
        blocks = split_layers(self.unlimited, self.work.shape.layers, self.load.accumulation)
        assert blocks, "there are no more stages than layers"
        times = [stage.layer_s * count + stage.fixed_s for stage, count in zip(self.unlimited, blocks, strict=True)]
        return sum(times) + (self.load.accumulation - 1) * max(times)

    def laid(self) -> Mixed | None:
        stages = [replace(stage, most=self._most_layers(number)) for number, stage in enumerate(self.unlimited)]
        blocks = split_layers(stages, self.work.shape.layers, self.load.accumulation)
        if blocks is None:
            return None
        if self.few and math.comb(self.work.shape.layers - 1, len(stages) - 1) <= EXACT_SPLITS:
            blocks = min(_splits(stages, self.work.shape.layers), key=self._step_s)
        layout = replace(self.layout, layers_per_stage=blocks)
        numbered = enumerate(self.platforms)
        return Mixed(
            layout=layout,
            pools=tuple(self.pools),
            dtype=self.load.dtype,
            data_parallel=self.load.data_parallel,
            micro_batch_size=self.load.micro_batch_size,
            accumulation=self.load.accumulation,
            stages=tuple(stage_memory(self.work.shape, layout, platform, self.load, n) for n, platform in numbered),
            step_time_s=self._step_s(blocks),
        )

    def _step_s(self, blocks: Sequence[int]) -> float:
        paces = [self._pace(number, count) for number, count in enumerate(blocks)]
        times = [self._seconds(one) for one in paces]
        once = max(one.reduce_s for one in paces) + max(one.update_s for one in paces)
        return sum(times) + (self.load.accumulation - 1) * max(times) + once

    def _unlimited(self) -> list[Stage]:
        """Stages on one pool are alike, but for the first and the last of all."""
        known: dict[tuple[str, bool, bool], Stage] = {}
        last, found = len(self.pools) - 1, []
        for number, pool in enumerate(self.pools):
            kind = (pool.name, number == 0, number == last)
            if kind not in known:
                one, two = (self._seconds(self._pace(number, blocks)) for blocks in (1, 2))
                known[kind] = Stage(two - one, 2 * one - two, self.work.shape.layers)
            found.append(known[kind])
        return found

    def _pace(self, stage: int, blocks: int) -> Pace:
        first, last = stage == 0, stage == len(self.pools) - 1
        kind = (self.pools[stage].name, blocks, first, last)
        if kind not in self.known:
            platform = self.platforms[stage]
            self.known[kind] = stage_pace(self.work.shape, self.layout, platform, self.load, blocks, first, last)
        return self.known[kind]

    def _seconds(self, pace: Pace) -> float:
        return pace.sequence_s * self.filled + pace.fixed_s

    def _most_layers(self, stage: int) -> int:
        """That there is memory for, by bisection."""
        few, many = 0, self.work.shape.layers + 1
        while many - few > 1:
            middle = (few + many) // 2
            blocks = tuple(middle if n == stage else 1 for n in range(len(self.pools)))
            layout = replace(self.layout, layers_per_stage=blocks)
            needed = stage_memory(self.work.shape, layout, self.platforms[stage], self.load, stage).total
            few, many = (middle, many) if needed <= self.pools[stage].memory_bytes else (few, middle)
        return few


def _splits(stages: Sequence[Stage], layers: int) -> Iterator[tuple[int, ...]]:
    """Every number of layers of each stage, one at least, that there is memory for."""
    for ends in itertools.combinations(range(1, layers), len(stages) - 1):
        counts = tuple(end - begin for begin, end in itertools.pairwise((0, *ends, layers)))
        if all(count <= stage.most for count, stage in zip(counts, stages, strict=True)):
            yield counts


def split_layers(stages: Sequence[Stage], layers: int, micro_batches: int) -> tuple[int, ...] | None:
    """Layers of each stage, one at least, so that all stages' times and (micro_batches - 1) times the slowest's are the
    least together; None: they do not fit.

    The slowest stage's time is one of those that some stage has with some number of layers. Below each such limit, the
    sum is the least where layers go to the stages that take the least time for one.
    """
    least, all_of_them = min(stage.most for stage in stages), sum(stage.most for stage in stages)
    if least < 1 or layers < len(stages) or all_of_them < layers:
        return None
    kinds = {(stage.layer_s, stage.fixed_s): stage for stage in stages}.values()
    most = max(stage.most for stage in stages)
    limits = sorted(
        {kind.layer_s * count + kind.fixed_s for kind in kinds for count in range(1, min(most, layers) + 1)}
    )

    def room(limit: float) -> list[int]:
        within = [int((limit - stage.fixed_s) / stage.layer_s * (1 + 1e-12) + 1e-9) for stage in stages]
        return [min(stage.most, count) for stage, count in zip(stages, within, strict=True)]

    def enough(limit: float) -> bool:
        counts = room(limit)
        return min(counts) >= 1 and sum(counts) >= layers

    quickest = sorted(range(len(stages)), key=lambda n: stages[n].layer_s)
    best: tuple[float, tuple[int, ...]] | None = None
    for limit in limits[bisect.bisect_left(limits, True, key=enough) :]:
        if best and (micro_batches - 1) * limit > best[0]:
            break
        most_of_each = room(limit)
        counts, left = [1] * len(stages), layers - len(stages)
        for n in quickest:
            more = min(most_of_each[n] - 1, left)
            counts[n], left = counts[n] + more, left - more
        times = [stage.layer_s * count + stage.fixed_s for stage, count in zip(stages, counts, strict=True)]
        step = sum(times) + (micro_batches - 1) * max(times)
        if best is None or step < best[0]:
            best = (step, tuple(counts))
    return best[1] if best else None
