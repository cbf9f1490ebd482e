"""How to lay a model over the devices alive now: enumerate layouts, prune by memory, rank by predicted step time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace

from orchestrator.accelerators import NodePool
from orchestrator.config import Recipe
from orchestrator.data.schedule import Role
from orchestrator.errors import PlanError
from orchestrator.planning.layout import Layout, layout_of, why_zero_stage
from orchestrator.planning.memory import Memory, worker_memory
from orchestrator.planning.past import MARGIN, NOTHING, Past
from orchestrator.planning.placement import Room, place, rooms
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.shortage import Shortage, capacity_error, check_workers, fewest_replicas, memory_hint
from orchestrator.planning.throughput import platform_of, step_time_s
from orchestrator.train_config import TrainConfig

MAX_LOSERS = 4
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    accelerator: str
    node_ids: tuple[str, ...]
    """Nodes that workers stand on, in the order of their ranks."""
    workers_by_node: tuple[int, ...]
    """Of each of `node_ids`."""
    data_parallel: int
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    layers_per_stage: tuple[int, ...] = ()
    """Decoder blocks; the embedding goes with the first and the head with the last. Empty: all in one stage."""
    zero_stage: int = 2
    offload: bool = False
    """Keep the optimizer's state in host memory."""
    recompute: bool = False
    """Keep the inputs of decoder blocks only, and compute the rest again in the backward pass."""
    micro_batch_size: int
    """Sequences."""
    accumulation: int
    """Micro-batches of the largest share of the largest global batch."""
    dtype: str
    parameters: int
    memory_bytes: int
    """Predicted, a worker."""
    available_bytes: int = 0
    """That a worker has."""
    step_time_s: float
    """Predicted."""
    reason: str = ""
    losers: tuple[str, ...] = ()
    """The best of the other layouts, each with why it lost."""

    @property
    def workers(self) -> int:
        return self.data_parallel * self.pipeline_stages * self.tensor_parallel

    @property
    def placement(self) -> tuple[tuple[str, int], ...]:
        """(node id, workers there), in the order of their ranks."""
        return tuple(zip(self.node_ids, self.workers_by_node, strict=True))

    @property
    def in_full(self) -> str:
        """What it runs as and where: two plans with the same words are the same."""
        return f"{self} on {', '.join(f'{node_id[:12]} ({count})' for node_id, count in self.placement)}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline stage, data-parallel rank, tensor-parallel rank) of a worker: those of a tensor-parallel group are
        neighbours."""
        replica, tensor_rank = divmod(rank, self.tensor_parallel)
        return *divmod(replica, self.data_parallel), tensor_rank

    def role(self, rank: int) -> Role:
        stage, data_rank, tensor_rank = self.coordinates(rank)
        return Role(data_rank, self.shares, stage, self.pipeline_stages, tensor_rank)

    def blocks(self, stage: int, layers: int) -> range:
        """The decoder blocks of a pipeline stage, of a model with so many."""
        counts = self.layers_per_stage or (layers,)
        first = sum(counts[:stage])
        return range(first, first + counts[stage])

    @property
    def layout(self) -> Layout:
        return Layout(**{field.name: getattr(self, field.name) for field in fields(Layout)})

    @property
    def shares(self) -> tuple[int, ...]:
        """Of the global batch by data-parallel rank, relative to each other: like devices take alike."""
        return (1,) * self.data_parallel

    def __str__(self) -> str:
        return (
            f"{self.workers} {self.accelerator} worker{'s' if self.workers > 1 else ''}, {self.layout}, "
            f"micro-batch {self.micro_batch_size} x accumulation {self.accumulation}, {self.dtype}"
        )


@dataclass(frozen=True)
class _Rejected:
    layout: str
    why: str
    memory_bytes: int


def plan(
    recipe: Recipe,
    shape: ModelShape,
    pools: Sequence[NodePool],
    prefer: Set[str] = frozenset(),
    past: Past = NOTHING,
) -> Plan:
    """The fastest layout that fits.

    Args:
        prefer: ids of nodes to place workers on before others.
        past: what earlier attempts of the run have taught.

    Raises:
        CapacityError: one would, on more devices of some pool.
        PlanError: none does; says what the nearest one lacks.
    """
    train = recipe.train
    check_workers(train)
    fitting: list[Plan] = []
    rejected: list[_Rejected] = []
    lacking: list[Shortage] = []
    impossible: list[PlanError] = []
    for pool in pools:
        try:
            search = _search(train, shape, pool, prefer, past)
        except PlanError as error:  # another pool may do what this one cannot
            impossible.append(error)
            continue
        found, refused = search.layouts()
        fitting += found
        rejected += refused
        if not found:
            short = search.short_of()
            lacking += [short] if isinstance(short, Shortage) else []
            rejected += [short] if isinstance(short, _Rejected) else []
    if fitting:
        return _best(train, shape, fitting, rejected, past)
    if lacking or not pools:
        raise capacity_error(train, pools, lacking)
    if not rejected:
        raise impossible[0]
    if past.ceilings and (least := _least(train, shape, pools, prefer, past)):
        return least
    nearest = min(rejected, key=lambda r: r.memory_bytes)
    raise PlanError(f"no layout fits; the nearest is {nearest.layout}: {nearest.why}", memory_hint(train))


def _least(
    train: TrainConfig, shape: ModelShape, pools: Sequence[NodePool], prefer: Set[str], past: Past
) -> Plan | None:
    """The plan that takes the least of what there is, where none takes as little as the past asks for: most of what a
    small model takes is the same in every layout, and what ran out may have been taken by a neighbour."""
    found: list[Plan] = []
    for pool in pools:
        with contextlib.suppress(PlanError):
            found += _search(train, shape, pool, prefer, replace(past, ceilings={})).all_that_fit()
    if not found:
        return None
    least = min(found, key=lambda p: (p.memory_bytes, p.step_time_s))
    return replace(least, reason="takes the least of all layouts, since more ran out of memory")


def _best(train: TrainConfig, shape: ModelShape, fitting: list[Plan], rejected: list[_Rejected], past: Past) -> Plan:
    ranked = sorted(fitting, key=lambda p: (p.step_time_s, -p.micro_batch_size))
    best = ranked[0]
    slower = [f"{_name(p)}: {p.step_time_s:.3g} s a step against {best.step_time_s:.3g}" for p in ranked[1:]]
    refused = [f"{r.layout}: {r.why}" for r in rejected]
    reason = f"fastest of {len(ranked)} layouts that fit, of {len(ranked) + len(rejected)}"
    reason += why_zero_stage(train, layout_of(train, shape, best.dtype))
    if best.recompute and train.layout.recompute is None:
        reason += "; recomputes, since nothing fits without"
    if best.accelerator in past.ceilings:
        most = past.ceilings[best.accelerator] * best.available_bytes / _GIB
        reason += f"; below {most:.3g} GiB a worker, since more ran out of memory"
    return replace(best, reason=reason, losers=(*slower[:MAX_LOSERS], *refused[:MAX_LOSERS]))


def predicted_anew(plan: Plan, recipe: Recipe, shape: ModelShape, pools: list[NodePool]) -> Plan:
    """A plan that was made before, with the step time that its nodes have by the speeds that are known now: what was
    measured since must not look like a gain of another plan."""
    pool = next((pool for pool in pools if {node.id for node in pool.nodes} & set(plan.node_ids)), None)
    return replace(plan, step_time_s=_step_time_s(plan, recipe.train, shape, pool)) if pool else plan


def _search(train: TrainConfig, shape: ModelShape, pool: NodePool, prefer: Set[str], past: Past) -> _Search:
    """
    Raises:
        PlanError: the devices of the pool cannot do what the recipe asks for.
    """
    dtype = choose_dtype(train.dtype, pool)
    layout = layout_of(train, shape, dtype)
    if train.attention == "flash_attention_2" and pool.accelerator == "cpu":
        raise PlanError(f"train.attention=flash_attention_2 is not for {pool}", "use train.attention=sdpa")
    among = rooms(pool, train.cpus_per_worker, layout.tensor_parallel, prefer)
    return _Search(train=train, shape=shape, pool=pool, dtype=dtype, layout=layout, rooms=among, past=past)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Among the layouts of one pool."""

    train: TrainConfig
    shape: ModelShape
    pool: NodePool
    dtype: str
    layout: Layout
    rooms: list[Room]
    past: Past

    @property
    def devices(self) -> int:
        """That workers can take."""
        return sum(room.groups for room in self.rooms) * self.layout.tensor_parallel

    def layouts(self) -> tuple[list[Plan], list[_Rejected]]:
        """Those that fit, and those that do not."""
        fitting: list[Plan] = []
        rejected: list[_Rejected] = []
        for layout in self._variants():
            for found in self._judged(layout):
                (fitting if isinstance(found, Plan) else rejected).append(found)  # type: ignore[arg-type]
            if fitting:
                break
        return fitting, rejected

    def all_that_fit(self) -> list[Plan]:
        return [found for layout in self._variants() for found in self._judged(layout) if isinstance(found, Plan)]

    def short_of(self) -> Shortage | _Rejected | None:
        """What the pool lacks for as many workers as there must be, or were once: devices, or memory even so."""
        there = self.devices // self.layout.devices
        fewest = fewest_replicas(self.train)
        had = min(self.past.workers, self.train.workers.max) // self.layout.devices
        most = min(max(fewest, had), self.train.global_batch_size)
        needs = {replicas: self._least_memory(replicas) for replicas in range(max(fewest, there + 1), most + 1)}
        enough = next((replicas for replicas, needed in needs.items() if needed <= self._limit), None)
        if enough:
            needed = enough * self.layout.devices
            return Shortage(there=self.devices, needed=needed, for_memory=enough > fewest)
        if there < fewest:
            name = f"{fewest * self.layout.devices} x {self.pool.accelerator}, {self._variants()[-1]}, micro-batch 1"
            return _Rejected(name, self._why_not(needs[fewest]), needs[fewest])
        return None

    def _least_memory(self, replicas: int) -> int:
        """Bytes a worker, by the layout that takes the least."""
        share = math.ceil(largest_batch(self.train) / replicas)
        return self._memory(self._variants()[-1], replicas, share, 1).total

    def _variants(self) -> tuple[Layout, ...]:
        """From the fastest to the one that takes the least memory."""
        thrifty = replace(self.layout, recompute=True)
        return (self.layout, thrifty) if self.train.layout.recompute is None else (self.layout,)

    def _judged(self, layout: Layout) -> Iterator[Plan | _Rejected]:
        train, fewest = self.train, fewest_replicas(self.train)
        most = min(min(train.workers.max, self.devices) // layout.devices, train.global_batch_size)
        for replicas in range(fewest, most + 1):
            share = math.ceil(largest_batch(train) / replicas)
            for micro_batch_size in sorted({math.ceil(share / parts) for parts in range(1, share + 1)}):
                found = self._plan(layout, replicas, share, micro_batch_size)
                fits = found.memory_bytes <= self._limit
                yield found if fits else _Rejected(_name(found), self._why_not(found.memory_bytes), found.memory_bytes)

    @property
    def _available(self) -> int:
        return self.pool.memory_per_device(self.train.cpus_per_worker)

    @property
    def _limit(self) -> float:
        """Bytes that a worker may be predicted to take."""
        return self._available * min(1.0, self.past.ceilings.get(self.pool.accelerator, 1.0))

    def _why_not(self, needed: int) -> str:
        needs = f"needs {needed / _GIB:.1f} GiB a worker"
        if needed > self._available:
            return f"{needs}, {self._available / _GIB:.1f} GiB are there"
        return f"{needs}, and an attempt that was to take {self._limit / MARGIN / _GIB:.1f} GiB ran out of memory"

    def _memory(self, layout: Layout, replicas: int, share: int, micro_batch_size: int) -> Memory:
        return worker_memory(
            self.shape,
            layout,
            accelerator=self.pool.accelerator,
            dtype=self.dtype,
            data_parallel=replicas,
            micro_batch_size=micro_batch_size,
            accumulation=math.ceil(share / micro_batch_size),
            sequence_length=self.train.sequence_length,
            attention_scores=self.train.attention == "eager",
        )

    def _plan(self, layout: Layout, replicas: int, share: int, micro_batch_size: int) -> Plan:
        accumulation = math.ceil(share / micro_batch_size)
        placement = place(replicas * layout.pipeline_stages, self.rooms)
        found = Plan(
            accelerator=self.pool.accelerator,
            node_ids=tuple(placement),
            workers_by_node=tuple(groups * layout.tensor_parallel for groups in placement.values()),
            data_parallel=replicas,
            **asdict(layout),
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            dtype=self.dtype,
            parameters=self.shape.parameters,
            memory_bytes=self._memory(layout, replicas, share, micro_batch_size).total,
            available_bytes=self._available,
            step_time_s=0.0,
        )
        return replace(found, step_time_s=_step_time_s(found, self.train, self.shape, self.pool))


def _step_time_s(plan: Plan, train: TrainConfig, shape: ModelShape, pool: NodePool) -> float:
    return step_time_s(
        shape,
        platform_of(pool, plan.dtype),
        plan.layout,
        data_parallel=plan.data_parallel,
        accumulation=plan.accumulation,
        micro_batch_size=plan.micro_batch_size,
        global_batch_size=math.ceil(largest_batch(train) / plan.data_parallel) * plan.data_parallel,
        sequence_length=train.sequence_length,
        width=4 if plan.dtype == "fp32" else 2,
    )


def largest_batch(train: TrainConfig) -> int:
    return max(train.global_batch_size, *(stretch.sequences for stretch in train.batch_ramp), 1)


DTYPES = {"cpu": ("fp32", "bf16"), "dcu": ("fp16", "fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}
"""What each kind of device computes in, the best first."""


def choose_dtype(asked: str, pool: NodePool) -> str:
    """Working precision: what the recipe asks for, or the best that the devices compute natively.

    Raises:
        PlanError: they do not compute in what is asked for.
    """
    native = [dtype for dtype in DTYPES[pool.accelerator] if dtype != "bf16" or pool.bf16]
    if asked == "auto":
        return native[0]
    if asked not in native:
        raise PlanError(f"train.dtype={asked} is not for {pool}", f"use {' or '.join(native)}, or auto")
    return asked


def _name(plan: Plan) -> str:
    layout = f"{plan.workers} x {plan.accelerator}, {plan.layout}"
    return f"{layout}, micro-batch {plan.micro_batch_size} x {plan.accumulation}"
