"""Whether a running attempt should make room for another plan: pure functions of plans and measured times."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.plan import Plan

LEAST_GAIN = 0.05
"""Of the step time. Predictions are not better than that."""
PAYS_TIMES = 2.0
"""How many times over the time of a change must be won back before the run's end."""
SETTLE_S = 30.0
"""How long an attempt runs before another plan may take its place, unless a node of it will go."""
LEAVE_S = 10.0
"""Before a draining node goes, its state must be on its way to storage."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A plan that is to take over from the present one, at a checkpoint of its own."""

    plan: Plan
    kind: Literal["resize", "drain", "eviction", "trial"]
    reason: str


def wanted_change(
    live: Plan,
    candidate: Plan,
    *,
    leaving: Collection[str],
    slow: dict[str, float],
    step_s: float,
    steps_left: int,
    change_s: float,
) -> Change | None:
    """The change to a candidate, where there is a reason for it and it pays.

    Args:
        candidate: the best plan for the nodes that will stay.
        leaving: ids of nodes that are about to go.
        slow: by how many times the nodes are slower than their like, where they are.
        step_s: seconds that a step of the live plan takes, measured.
        change_s: seconds without a step that a change costs.
    """
    nodes = {node for node, _ in live.placement}
    if going := sorted(nodes & set(leaving)):
        reason = f"{_names(going)} will go: {live.workers} -> {candidate.workers} workers"
        return Change(plan=candidate, kind="drain", reason=reason)
    if (candidate.accelerator, candidate.placement) == (live.accelerator, live.placement):
        return None
    drag = max((slow.get(node, 1.0) for node in nodes), default=1.0)
    share = candidate.step_time_s / (live.step_time_s * drag)
    if not pays(share, step_s * steps_left, change_s):
        return None
    what = f"{live.workers} -> {candidate.workers} workers, {share:.2f} of the step time (predicted)"
    evicted = sorted(node for node in nodes & slow.keys() if node not in dict(candidate.placement))
    if evicted and drag > 1:
        return Change(
            plan=candidate, kind="eviction", reason=f"without {_names(evicted)}, slower by {drag:.2f}: {what}"
        )
    return Change(plan=candidate, kind="resize", reason=what)


def pays(share: float, left_s: float, change_s: float) -> bool:
    """Whether a change is worth its time.

    Args:
        share: of the present step time that a step takes after it.
        left_s: until the last step, as things are.
        change_s: without a step that it costs.
    """
    return 1 - share >= LEAST_GAIN and (1 - share) * left_s >= PAYS_TIMES * change_s


def _names(nodes: Collection[str]) -> str:
    return f"node {', '.join(node[:12] for node in nodes)}"
