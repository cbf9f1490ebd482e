"""Why nothing fits a cluster, and the smallest changes each of which would do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import PlanError
from orchestrator.planning.devices import Devices
from orchestrator.planning.layout_search import Candidate, Found, search, thriftiest
from orchestrator.planning.losers import why_too_large
from orchestrator.planning.request import Space, Work

_GIB = 2**30
MOST_NODES = 2**17
SHORTEST = 128
"""Tokens of a sequence that are still worth a hint."""


def no_plan(work: Work, tried: Sequence[tuple[Found, Space]]) -> PlanError:
    """
    Args:
        tried: pools on which nothing fits, each with what was allowed there.
    """
    found, space = min(tried, key=lambda one: _lacks(*one))
    devices = found.devices
    changes = list(_changes(work, devices, space))
    if all(space.fewest_workers > one.devices.count for one, space in tried):
        most = max(one.devices.count for one, _ in tried)
        message = f"train.workers asks for {space.fewest_workers} workers, and no pool has more than {most} devices"
        return PlanError(message, f"any of these is enough: {'; '.join([f'train.workers={most}', *changes])}")
    hint = f"any of these is enough: {'; '.join(changes)}" if changes else "use a smaller model, or larger devices"
    if found.rejected:
        nearest = found.rejected[0]
        why = why_too_large(nearest.memory, devices.memory_bytes)
        return PlanError(f"no layout fits {devices}; the nearest is {nearest}: {why}", hint)
    return PlanError(f"no layout of {_asked(space)} can be laid over {devices}", hint)


def _lacks(found: Found, space: Space) -> float:
    return found.rejected[0].memory.total / found.devices.memory_bytes if found.rejected else math.inf


def _asked(space: Space) -> str:
    told = {"tensor_parallel": space.tensor_parallel, "pipeline_stages": space.pipeline_stages}
    told |= {"zero_stage": space.zero_stage, "workers.min": space.fewest_workers}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)


def _changes(work: Work, devices: Devices, space: Space) -> Iterator[str]:
    yield from _relaxed(work, devices, space)
    yield from _more_devices(work, devices, space)
    least = thriftiest(work, devices, space)
    if least and least.memory.total > devices.memory_bytes:
        yield f"devices of {math.ceil(10 * least.memory.total / _GIB) / 10:.1f} GiB ({least})"
    yield from _shorter(work, devices, space)


_OPEN: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": None},
    "zero_stage": {"zero_stage": None},
    "offload": {"offload": None},
    "layers_per_stage": {"layers_per_stage": ()},
    "pipeline_stages": {"pipeline_stages": None, "layers_per_stage": ()},
    "tensor_parallel": {"tensor_parallel": None},
}
"""What a space is like where a key of train.layout is left open, the least change first."""


def _relaxed(work: Work, devices: Devices, space: Space) -> Iterator[str]:
    """What the recipe fixes and could have otherwise, one by one; all together where one is not enough."""
    fixed = [key for key in _OPEN if getattr(space, key) not in (None, ())]
    single = [(key, _best(work, devices, replace(space, **_OPEN[key]))) for key in fixed]
    if any(best for _, best in single):
        yield from (_set([key], best) for key, best in single if best)
        return
    without = space
    for key in fixed:
        without = replace(without, **_OPEN[key])
    if best := _best(work, devices, without):
        changed = [key for key in fixed if getattr(best.layout, key) != getattr(space, key)]
        yield _set(changed, best)


def _set(keys: Sequence[str], best: Candidate) -> str:
    values = [f"train.layout.{key}={json.dumps(getattr(best.layout, key))}" for key in keys]
    return f"{' '.join(values)} ({best})"


def _best(work: Work, devices: Devices, space: Space) -> Candidate | None:
    found = search(work, devices, space, keep=1).best
    return found[0] if found else None


def _more_devices(work: Work, devices: Devices, space: Space) -> Iterator[str]:
    """The fewest nodes, by doubling and bisection: what fits on some fits on more."""
    free = replace(space, most_workers=None)

    def enough(nodes: int) -> Candidate | None:
        more = devices.with_nodes(nodes)
        least = thriftiest(work, more, free, devices.memory_bytes)
        return least if least and least.memory.total <= devices.memory_bytes else None

    few, many = devices.nodes, devices.nodes
    while not enough(many):
        few, many = many, 2 * many
        if many > MOST_NODES:
            return
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    if many > devices.nodes:
        each = devices.devices_per_node
        yield f"{many} nodes in place of {devices.nodes}, which are {many * each} devices ({enough(many)})"


def _shorter(work: Work, devices: Devices, space: Space) -> Iterator[str]:
    length = work.sequence_length // 2
    while length >= SHORTEST:
        least = thriftiest(replace(work, sequence_length=length), devices, space, devices.memory_bytes)
        if least and least.memory.total <= devices.memory_bytes:
            yield f"train.sequence_length={length} ({least})"
            return
        length //= 2
