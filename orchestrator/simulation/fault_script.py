"""The `faults` of a recipe as a simulation plays them: the same script as on a real cluster."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.fault_config import (
    CutLink,
    DrainNode,
    ErrorRank,
    Fault,
    FillDisk,
    HangRank,
    KillDriver,
    KillNode,
    KillRank,
    NodeFault,
    OomRank,
    RankFault,
    S3Errors,
    SlowRank,
)
from orchestrator.simulation.scenario import Island, Strike


def strikes_of(faults: Sequence[Fault], islands: Sequence[Island]) -> tuple[Strike, ...]:
    """What can be simulated of a fault script. What a shard costs that is damaged for a moment, or storage that answers
    late, depends on the moment: these are left out (`unplayed`)."""
    in_order = sorted(faults, key=lambda fault: fault.step)
    return tuple(strike for fault in in_order if (strike := _strike(fault, islands)))


def unplayed(faults: Sequence[Fault]) -> tuple[str, ...]:
    """Names of the faults that `strikes_of` leaves out."""
    return tuple(fault.name for fault in faults if _strike(fault, ()) is None)


def _strike(fault: Fault, islands: Sequence[Island]) -> Strike | None:
    step, island = float(fault.step), _island(fault, islands)
    match fault:
        case KillRank():
            return Strike(step=step, island=island, outcome="worker_lost")
        case HangRank():
            return Strike(step=step, island=island, outcome="hang")
        case OomRank():
            return Strike(step=step, island=island, outcome="out_of_memory")
        case ErrorRank():
            return Strike(step=step, island=island, outcome="error")
        case SlowRank(factor=factor, steps=steps):
            return Strike(step=step, island=island, outcome="slow", slow_factor=factor, slow_steps=steps)
        case KillNode(seconds=seconds):
            return Strike(step=step, island=island, outcome="node_lost", takes_node=True, seconds=seconds)
        case CutLink(seconds=seconds):
            return Strike(step=step, island=island, outcome="network", takes_node=True, seconds=seconds)
        case DrainNode(deadline_s=notice_s, seconds=seconds):
            return Strike(step=step, island=island, outcome="node_lost", notice_s=notice_s, seconds=seconds)
        case FillDisk(seconds=seconds) | S3Errors(answer="errors", seconds=seconds):
            return Strike(step=step, outcome="outage", seconds=seconds)
        case KillDriver():
            return Strike(step=step, outcome="driver_lost")
        case _:
            return None


def _island(fault: Fault, islands: Sequence[Island]) -> int:
    """Place of the island that a fault strikes. Ranks and nodes are counted through all islands, and on from the first
    again after the last."""
    if not islands:
        return 0
    if isinstance(fault, RankFault):
        return _at(fault.rank, [island.nodes * island.devices_per_node for island in islands])
    if isinstance(fault, NodeFault):
        return _at(fault.node - 1, [island.nodes for island in islands])
    return 0


def _at(number: int, sizes: Sequence[int]) -> int:
    number %= sum(sizes)
    for place, size in enumerate(sizes):
        if number < size:
            return place
        number -= size
    raise AssertionError("the number is less than the sum")
