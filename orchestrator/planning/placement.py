"""Which nodes the workers of a plan stand on."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from orchestrator.accelerators import NodePool


@dataclass(frozen=True, kw_only=True)
class Room:
    """Of a node for workers."""

    node_id: str
    groups: int
    """Of workers that must share a node."""


def rooms(pool: NodePool, cpus_per_worker: float, group: int, prefer: Set[str] = frozenset()) -> list[Room]:
    """The nodes of a pool that have room, in the order in which workers take them: first those that are preferred, then
    the biggest, so that they are few.

    Args:
        group: workers that must share a node, as tensor-parallel ranks do.
        prefer: ids of nodes, as of those that hold the run's data already.
    """
    counts = zip(pool.nodes, pool.devices_by_node(cpus_per_worker), strict=True)
    found = [Room(node_id=node.id, groups=count // group) for node, count in counts if count >= group]
    return sorted(found, key=lambda room: (room.node_id not in prefer, -room.groups, room.node_id))


def place(groups: int, among: list[Room]) -> dict[str, int]:
    """How many of the groups each node takes that is used.

    Args:
        among: as `rooms` returns them, with room for all.
    """
    taken: dict[str, int] = {}
    for room in among:
        if groups <= 0:
            break
        taken[room.node_id] = min(room.groups, groups)
        groups -= taken[room.node_id]
    assert groups <= 0, "a plan is made for devices that are there"
    return taken
