"""How to lay a model over the devices alive now: enumerate layouts, prune by memory, rank by predicted step time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, fields, replace

from orchestrator.accelerators import NodePool
from orchestrator.config import Recipe
from orchestrator.data.schedule import Role
from orchestrator.errors import PlanError
from orchestrator.planning.layout import Layout, layout_of, why_zero_stage
from orchestrator.planning.memory import Memory, worker_memory
from orchestrator.planning.placement import Room, place, rooms
from orchestrator.planning.shape import ModelShape
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


def plan(recipe: Recipe, shape: ModelShape, pools: list[NodePool], prefer: Set[str] = frozenset()) -> Plan:
    """The fastest layout that fits.

    Args:
        prefer: ids of nodes to place workers on before others.

    Raises:
        PlanError: none does; says what the nearest one lacks.
    """
    fitting: list[Plan] = []
    rejected: list[_Rejected] = []
    impossible: list[PlanError] = []
    for pool in pools:
        try:
            for found in _search(recipe.train, shape, pool, prefer).layouts():
                (fitting if isinstance(found, Plan) else rejected).append(found)  # type: ignore[arg-type]
        except PlanError as error:  # another pool may do what this one cannot
            impossible.append(error)
    if not fitting:
        raise impossible[0] if impossible and not rejected else _no_plan(recipe.train, pools, rejected)
    ranked = sorted(fitting, key=lambda p: (p.step_time_s, -p.micro_batch_size))
    best = ranked[0]
    slower = [f"{_name(p)}: {p.step_time_s:.3g} s a step against {best.step_time_s:.3g}" for p in ranked[1:]]
    refused = [f"{r.layout}: {r.why}" for r in rejected]
    reason = f"fastest of {len(ranked)} layouts that fit, of {len(ranked) + len(rejected)}"
    reason += why_zero_stage(recipe.train, layout_of(recipe.train, shape, best.dtype))
    return replace(best, reason=reason, losers=(*slower[:MAX_LOSERS], *refused[:MAX_LOSERS]))


def predicted_anew(plan: Plan, recipe: Recipe, shape: ModelShape, pools: list[NodePool]) -> Plan:
    """A plan that was made before, with the step time that its nodes have by the speeds that are known now: what was
    measured since must not look like a gain of another plan."""
    pool = next((pool for pool in pools if {node.id for node in pool.nodes} & set(plan.node_ids)), None)
    return replace(plan, step_time_s=_step_time_s(plan, recipe.train, shape, pool)) if pool else plan


def _search(train: TrainConfig, shape: ModelShape, pool: NodePool, prefer: Set[str]) -> _Search:
    """
    Raises:
        PlanError: the devices of the pool cannot do what the recipe asks for.
    """
    dtype = choose_dtype(train.dtype, pool)
    layout = layout_of(train, shape, dtype)
    if train.attention == "flash_attention_2" and pool.accelerator == "cpu":
        raise PlanError(f"train.attention=flash_attention_2 is not for {pool}", "use train.attention=sdpa")
    among = rooms(pool, train.cpus_per_worker, layout.tensor_parallel, prefer)
    return _Search(train=train, shape=shape, pool=pool, dtype=dtype, layout=layout, rooms=among)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Among the layouts of one pool."""

    train: TrainConfig
    shape: ModelShape
    pool: NodePool
    dtype: str
    layout: Layout
    rooms: list[Room]

    def layouts(self) -> Iterator[Plan | _Rejected]:
        train, devices = self.train, _devices(self.rooms, self.layout.tensor_parallel)
        fewest = math.ceil(train.workers.min / self.layout.devices)
        most = min(min(train.workers.max, devices) // self.layout.devices, train.global_batch_size)
        for replicas in range(fewest, most + 1):
            share = math.ceil(largest_batch(train) / replicas)
            for micro_batch_size in sorted({math.ceil(share / parts) for parts in range(1, share + 1)}):
                yield self._judge(replicas, share, micro_batch_size)

    def _judge(self, replicas: int, share: int, micro_batch_size: int) -> Plan | _Rejected:
        found = self._plan(replicas, share, micro_batch_size)
        available = self.pool.memory_per_device(self.train.cpus_per_worker)
        if found.memory_bytes > available:
            why = f"needs {found.memory_bytes / _GIB:.1f} GiB a worker, {available / _GIB:.1f} GiB are there"
            return _Rejected(_name(found), why, found.memory_bytes)
        return found

    def _plan(self, replicas: int, share: int, micro_batch_size: int) -> Plan:
        accumulation = math.ceil(share / micro_batch_size)
        memory: Memory = worker_memory(
            self.shape,
            self.layout,
            accelerator=self.pool.accelerator,
            dtype=self.dtype,
            data_parallel=replicas,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            sequence_length=self.train.sequence_length,
        )
        placement = place(replicas * self.layout.pipeline_stages, self.rooms)
        found = Plan(
            accelerator=self.pool.accelerator,
            node_ids=tuple(placement),
            workers_by_node=tuple(groups * self.layout.tensor_parallel for groups in placement.values()),
            data_parallel=replicas,
            **asdict(self.layout),
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            dtype=self.dtype,
            parameters=self.shape.parameters,
            memory_bytes=memory.total,
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


def _devices(among: list[Room], tensor_parallel: int) -> int:
    return sum(room.groups for room in among) * tensor_parallel


def largest_batch(train: TrainConfig) -> int:
    return max(train.global_batch_size, *(stretch.sequences for stretch in train.batch_ramp), 1)


_DTYPES = {"cpu": ("fp32", "bf16"), "dcu": ("fp16", "fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}
"""What each kind of device computes in, the best first."""


def choose_dtype(asked: str, pool: NodePool) -> str:
    """Working precision: what the recipe asks for, or the best that the devices compute natively.

    Raises:
        PlanError: they do not compute in what is asked for.
    """
    native = [dtype for dtype in _DTYPES[pool.accelerator] if dtype != "bf16" or pool.bf16]
    if asked == "auto":
        return native[0]
    if asked not in native:
        raise PlanError(f"train.dtype={asked} is not for {pool}", f"use {' or '.join(native)}, or auto")
    return asked


def _name(plan: Plan) -> str:
    layout = f"{plan.workers} x {plan.accelerator}, {plan.layout}"
    return f"{layout}, micro-batch {plan.micro_batch_size} x {plan.accumulation}"


def _no_plan(train: TrainConfig, pools: list[NodePool], rejected: list[_Rejected]) -> PlanError:
    replica = train.layout.devices
    fewest = math.ceil(train.workers.min / replica) * replica
    size = train.layout.tensor_parallel
    most = max(_devices(rooms(pool, train.cpus_per_worker, size), size) for pool in pools) // replica * replica
    found = ", ".join(f"{pool}: {pool.devices(train.cpus_per_worker)}" for pool in pools)
    if most < fewest:
        if replica > 1:
            return PlanError(
                f"train.layout needs {fewest} devices, {replica} a replica (tensor_parallel="
                f"{train.layout.tensor_parallel}, pipeline_stages={train.layout.pipeline_stages}), and no pool has as "
                f"many ({found}); those that share tensors share a node",
                "lower them, lower train.workers, or add nodes",
            )
        return PlanError(
            f"train.workers asks for {train.workers.min} workers and no pool has that many devices ({found})",
            f"set train.workers={most}" if most else "lower train.cpus_per_worker, or add nodes",
        )
    if train.workers.max < replica:
        return PlanError(
            f"train.workers.max={train.workers.max} is less than the {replica} devices of one replica",
            f"set train.workers={replica} or more",
        )
    if train.workers.max < fewest:
        asked = f"train.workers={train.workers.min}" if train.workers.min == train.workers.max else "train.workers"
        below = train.workers.max // replica * replica
        return PlanError(
            f"{asked} leaves no number of workers that is a multiple of the {replica} devices of one replica",
            f"set train.workers={below} or {fewest}",
        )
    if not rejected:
        return PlanError(
            f"train.workers.min={train.workers.min} is more than train.global_batch_size={train.global_batch_size} "
            "has room for",
            "a replica needs at least one sequence a step",
        )
    nearest = min(rejected, key=lambda r: r.memory_bytes)
    return PlanError(f"no layout fits; the nearest is {nearest.layout}: {nearest.why}", _memory_hint(train))


def _memory_hint(train: TrainConfig) -> str:
    layout, untried = train.layout, []
    if not layout.recompute:
        untried.append("recompute: true")
    if layout.zero_stage != 3 and layout.pipeline_stages == 1:
        untried.append("zero_stage: 3")
    if layout.devices == 1:
        untried.append("pipeline_stages or tensor_parallel")
    tried = f"try train.layout with {', then '.join(untried)}; or " if untried else ""
    return f"{tried}use more devices, a smaller model or shorter sequences"
