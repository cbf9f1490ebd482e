"""How to lay a model over the devices alive now: the search on every pool, and nodes for what it finds."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace

from orchestrator.accelerators import NodePool
from orchestrator.config import Recipe
from orchestrator.errors import PlanError
from orchestrator.planning.devices import Devices, of_live
from orchestrator.planning.layout import layout_of, why_zero_stage
from orchestrator.planning.layout_search import Candidate, Found, search, sized, thriftiest
from orchestrator.planning.losers import losers
from orchestrator.planning.past import NOTHING, Past
from orchestrator.planning.placement import place, rooms
from orchestrator.planning.plan import Plan
from orchestrator.planning.request import Space, Work, space_of, work_of
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.shortage import Shortage, capacity_error, check_workers
from orchestrator.planning.sufficient import no_plan

ALIKE = 1.05
"""Times the fastest step: predictions do not tell apart what lies within."""
_GIB = 2**30


def plan(
    recipe: Recipe,
    shape: ModelShape,
    pools: Sequence[NodePool],
    prefer: Set[str] = frozenset(),
    past: Past = NOTHING,
) -> Plan:
    """The fastest layout that fits, of those that the recipe leaves open. Of layouts that are predicted to be as fast,
    the one that the run has already, or the one that cuts the model the least.

    Args:
        prefer: ids of nodes to place workers on before others.
        past: what earlier attempts of the run have taught.

    Raises:
        CapacityError: one would, on more devices of some pool.
        PlanError: none does; says what would be enough.
    """
    check_workers(recipe.train)
    looks: list[_Look] = []
    impossible: list[PlanError] = []
    for pool in pools:
        try:
            looks.append(_look(recipe, shape, pool, past))
        except PlanError as error:  # another pool may do what this one cannot
            impossible.append(error)
    fitting = sorted((look for look in looks if look.found.best), key=lambda look: look.found.best[0].rank)
    if fitting:
        return _best(fitting[0], fitting[1:], prefer)
    lacking = [short for look in looks if (short := look.short_of())]
    if lacking or not pools:
        raise capacity_error(recipe.train, pools, lacking)
    if not looks:
        raise impossible[0]
    if past.ceilings and (least := _least(looks, prefer)):
        return least
    raise no_plan(looks[0].work, [(look.found, look.space) for look in looks])


def predicted_anew(plan: Plan, recipe: Recipe, shape: ModelShape, pools: list[NodePool]) -> Plan:
    """A plan that was made before, with the step time that its nodes have by the speeds that are known now: what was
    measured since must not look like a gain of another plan."""
    pool = next((pool for pool in pools if {node.id for node in pool.nodes} & set(plan.node_ids)), None)
    if not pool:
        return plan
    work, devices = work_of(recipe, shape), of_live(pool, recipe.train.cpus_per_worker)
    again = sized(work, devices, plan.layout, plan.data_parallel, plan.micro_batch_size, plan.dtype)
    return replace(plan, step_time_s=again.step.total)


@dataclass(frozen=True, kw_only=True)
class _Look:
    """At one pool."""

    recipe: Recipe
    pool: NodePool
    past: Past
    work: Work
    space: Space
    whole: Devices
    """With all their memory."""
    found: Found
    """With as much of it as the past allows."""

    def chosen(self, prefer: Set[str]) -> tuple[Candidate, str, bool]:
        """(the layout, why, whether it is on trial)."""
        tried, count = self.past.tried, self.recipe.train.trials
        layouts = {str(self.laid(one, prefer)): one for one in self._to_try()} if count > 1 else {}
        untried = [name for name in layouts if name not in tried]
        if untried and len(tried) < count:
            return layouts[untried[0]], f"on trial, layout {len(tried) + 1} of {count}", True
        measured = {name: tried[name] for name in layouts if tried.get(name, math.inf) < math.inf}
        if len(measured) > 1:
            best = min(measured, key=lambda name: measured[name])
            return layouts[best], f"fastest of {len(measured)} that were tried, {measured[best]:.3g} s a step", False
        return *self._predicted(), False

    def _to_try(self) -> list[Candidate]:
        """The best cuts of the model, and where there are fewer, what differs from the best in one thing."""
        count, best = self.recipe.train.trials, list(self.found.best)
        near = [lost.candidate for lost in losers(self.work, self.found, self.space) if lost.change and lost.fits]
        return [*best, *sorted(near, key=lambda one: one.rank)][:count]

    def _predicted(self) -> tuple[Candidate, str]:
        fastest, layouts = self.found.best[0], f"of {self.found.layouts} layouts"
        alike = [one for one in self.found.best if one.step.total <= ALIKE * fastest.step.total]
        plainest = min(alike, key=lambda one: (one.layout.devices, one.rank))
        chosen = next((one for one in alike if one.cut == self.past.cut), plainest)
        if chosen is fastest:
            return chosen, f"fastest {layouts}"
        why = "the plainest" if chosen is plainest else "what the run has"
        return chosen, f"{why} {layouts}, as fast as any"

    def short_of(self) -> Shortage | None:
        """What the pool lacks for as many workers as there must be, or were once."""
        train, group = self.recipe.train, self.space.tensor_parallel or 1
        replica, there = train.layout.devices, self.whole.groups(group) * group
        fewest = math.ceil(train.workers.min / replica)
        had = min(self.past.workers, train.workers.max or self.past.workers) // replica
        counts = range(max(fewest, there // replica + 1), max(fewest, had) + 1)
        at = bisect.bisect_left(counts, True, key=lambda replicas: self._fits_on(replicas * replica))
        if at == len(counts):
            return None
        return Shortage(there=there, needed=counts[at] * replica, for_memory=counts[at] > fewest)

    def _fits_on(self, workers: int) -> bool:
        """Whether anything would on so many devices of the pool's kind."""
        each = max(self.whole.devices_per_node, self.space.tensor_parallel or 1)
        sizes = {each: workers // each} | ({workers % each: 1} if workers % each else {})
        among, limit = replace(self.whole, nodes_by_devices=sizes), self.found.devices.memory_bytes
        least = thriftiest(self.work, among, self.space, limit)
        return bool(least and least.memory.total <= limit)

    def laid(self, candidate: Candidate, prefer: Set[str], **told: object) -> Plan:
        """On nodes of the pool."""
        layout, replicas = candidate.layout, candidate.data_parallel
        among = rooms(self.pool, self.recipe.train.cpus_per_worker, layout.tensor_parallel, prefer)
        placement = place(replicas * layout.pipeline_stages, among)
        return Plan(
            accelerator=self.pool.accelerator,
            node_ids=tuple(placement),
            workers_by_node=tuple(groups * layout.tensor_parallel for groups in placement.values()),
            data_parallel=replicas,
            **asdict(layout),
            micro_batch_size=candidate.micro_batch_size,
            accumulation=candidate.accumulation,
            dtype=candidate.dtype,
            parameters=self.work.shape.parameters,
            memory_bytes=candidate.memory.total,
            available_bytes=self.whole.memory_bytes,
            step_time_s=candidate.step.total,
            **told,  # type: ignore[arg-type]
        )


def _look(recipe: Recipe, shape: ModelShape, pool: NodePool, past: Past) -> _Look:
    """
    Raises:
        PlanError: the devices of the pool cannot do what the recipe asks for.
    """
    train, devices = recipe.train, of_live(pool, recipe.train.cpus_per_worker)
    layout_of(train, shape, devices.dtype(train.dtype))
    if train.attention == "flash_attention_2" and pool.accelerator == "cpu":
        raise PlanError(f"train.attention=flash_attention_2 is not for {pool}", "use train.attention=sdpa")
    work, space = work_of(recipe, shape), space_of(train)
    ceiling = min(1.0, past.ceilings.get(pool.accelerator, 1.0))
    found = search(work, replace(devices, memory_bytes=int(devices.memory_bytes * ceiling)), space)
    return _Look(recipe=recipe, pool=pool, past=past, work=work, space=space, whole=devices, found=found)


def _best(look: _Look, others: Sequence[_Look], prefer: Set[str]) -> Plan:
    found, (best, reason, trial) = look.found, look.chosen(prefer)
    first = replace(found, best=(best, *(one for one in found.best if one is not best)))
    told = [f"{lost.change or lost.candidate}: {lost.why}" for lost in losers(look.work, first, look.space)]
    slower = [
        f"{one.found.best[0].workers} x {one.pool.accelerator}: {one.found.best[0].step.total:.3g} s a step against "
        f"{best.step.total:.3g}"
        for one in others
    ]
    reason += why_zero_stage(look.recipe.train, best.layout)
    if look.pool.accelerator in look.past.ceilings:
        reason += f"; below {found.devices.memory_bytes / _GIB:.3g} GiB a worker, since more ran out of memory"
    return look.laid(best, prefer, reason=reason, losers=(*slower, *told), trial=trial)


def _least(looks: Sequence[_Look], prefer: Set[str]) -> Plan | None:
    """The plan that takes the least of what there is, where none takes as little as the past asks for: most of what a
    small model takes is the same in every layout, and what ran out may have been taken by a neighbour."""
    found = [(least, look) for look in looks if (least := thriftiest(look.work, look.whole, look.space))]
    fitting = [(least, look) for least, look in found if least.memory.total <= look.whole.memory_bytes]
    if not fitting:
        return None
    least, look = min(fitting, key=lambda pair: (pair[0].memory.total, pair[0].step.total))
    return look.laid(least, prefer, reason="takes the least of all layouts, since more ran out of memory")
