"""Which ranks computed something else than those that had the same to compute: a pure function of what was measured.

A majority names who is wrong. Where there is none, as between two replicas, all of them are suspects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
"""Of the norm of a tensor, by working precision: what two replicas may differ by. Four units in the last place of fp16
and bf16, and eighty of fp32, for kernels that add in no fixed order; the rest is equal to the bit on like devices."""
TIED_TOLERANCE = 1e-3
"""Of the norm of a tied embedding. Its gradient is summed over the replicas in another order on each of two stages, so
that its copies drift apart in their last bits."""


@dataclass(frozen=True)
class Measure:
    """A tensor in two numbers."""

    projection: float
    """On fixed random signs: one wrong element moves it by its error, where it hardly moves a norm."""
    norm: float

    def agrees(self, other: Measure, tolerance: float) -> bool:
        if not (math.isfinite(self.norm) and math.isfinite(other.norm)):
            return math.isfinite(self.norm) == math.isfinite(other.norm)
        slack = tolerance * max(self.norm, other.norm)
        return abs(self.norm - other.norm) <= slack and abs(self.projection - other.projection) <= slack


Trace = Sequence[Measure]
"""What a rank measured in the course of a probe, in the order of the computation."""


@dataclass(frozen=True)
class Place:
    """Of a rank in the layout."""

    stage: int
    replica: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    ranks: tuple[int, ...]
    """In order; empty where all agree."""
    sure: bool = True
    """Whether a majority stands against them."""

    def __or__(self, other: Verdict) -> Verdict:
        """Of two findings: one that is sure goes before one that is not."""
        if self.sure != other.sure and self.ranks and other.ranks:
            return self if self.sure else other
        ranks = tuple(sorted({*self.ranks, *other.ranks}))
        return Verdict(ranks=ranks, sure=self.sure and other.sure)


INNOCENT = Verdict(ranks=())


def of_probe(traces: Sequence[Trace], places: Sequence[Place], tolerance: float) -> Verdict:
    """Whose part of a probe came out differently from the same part on other replicas.

    Ranks that share layers hand errors on to each other: the first of a group to differ is the one that began.

    Args:
        traces: by rank, of one length among the ranks of a stage.
    """
    strays = [_first_strays(ranks, traces, tolerance) for ranks in _alike(places, lambda p: (p.stage, p.tensor))]
    first = {rank: at for found, _ in strays for rank, at in found.items()}
    unsure = {rank for found, sure in strays if not sure for rank in found}
    named: list[int] = []
    for ranks in _alike(places, lambda p: (p.stage, p.replica)):
        began = min((first[rank] for rank in ranks if rank in first), default=None)
        named += [rank for rank in ranks if rank in first and first[rank] == began]
    return _verdict(named, unsure)


def of_copies(groups: Iterable[Sequence[int]], same: Callable[[int, int], bool]) -> Verdict:
    """Who holds something else than the others of its group, which hold copies of the same parameters.

    Args:
        same: of two ranks.
    """
    verdict = INNOCENT
    for ranks in groups:
        majority = _majority(ranks, same)
        strays = tuple(rank for rank in ranks if rank not in majority)
        verdict |= Verdict(ranks=strays, sure=bool(majority) or not strays)
    return verdict


def reproduced(verdict: Verdict, before: Sequence[Trace], again: Sequence[Trace]) -> Verdict:
    """Without a majority: those that did not come to the same numbers when they computed them again, if there are."""
    if verdict.sure:
        return verdict
    astray = tuple(rank for rank in verdict.ranks if list(before[rank]) != list(again[rank]))
    return Verdict(ranks=astray) if 0 < len(astray) < len(verdict.ranks) else verdict


def judged(verdict: Verdict, errors: Sequence[float], tolerance: float) -> Verdict:
    """Without a majority: those whose layers are further from what the host's processor makes of them, if there are.

    Args:
        errors: by rank, relative.
    """
    astray = tuple(rank for rank in verdict.ranks if not errors[rank] <= tolerance)
    decided = not verdict.sure and 0 < len(astray) < len(verdict.ranks)
    return Verdict(ranks=astray) if decided else verdict


def origins(broken: Sequence[int | None], places: Sequence[Place]) -> list[int]:
    """Where gradients that are not finite began: later stages hand them to earlier ones, and ranks of a tensor-parallel
    group to each other.

    Args:
        broken: by rank, how far the backward pass was at the first one; None where there was none.
    """
    found: list[int] = []
    for ranks in _alike(places, lambda place: place.replica):
        hit = [(-places[rank].stage, at, rank) for rank in ranks if (at := broken[rank]) is not None]
        found += [rank for stage, at, rank in hit if (stage, at) == min(hit)[:2]]
    return sorted(found)


def replicas(places: Sequence[Place]) -> list[list[int]]:
    """Ranks that hold the same parameters."""
    return _alike(places, lambda place: (place.stage, place.tensor))


def stages(places: Sequence[Place]) -> list[list[int]]:
    """Ranks that hold the same of those parameters that tensor parallelism does not cut."""
    return _alike(places, lambda place: place.stage)


def ends(places: Sequence[Place]) -> list[list[int]]:
    """Ranks of the first and the last stage, where these are two, that hold the same of a tied embedding."""
    last = max(place.stage for place in places)
    held = [rank for rank, place in enumerate(places) if place.stage in (0, last)] if last else []
    return [[rank for rank in held if places[rank].tensor == tensor] for tensor in {places[r].tensor for r in held}]


def _alike(places: Sequence[Place], key: Callable[[Place], T]) -> list[list[int]]:
    groups: dict[T, list[int]] = {}
    for rank, place in enumerate(places):
        groups.setdefault(key(place), []).append(rank)
    return list(groups.values())


def _first_strays(ranks: list[int], traces: Sequence[Trace], tolerance: float) -> tuple[dict[int, int], bool]:
    """Where each rank that strays from its peers does so first; and whether majorities say so."""
    first: dict[int, int] = {}
    sure = True
    for at in range(len(traces[ranks[0]])):
        majority = _majority(ranks, lambda one, other: traces[one][at].agrees(traces[other][at], tolerance))  # noqa: B023
        strays = [rank for rank in ranks if rank not in majority]
        sure = sure and (bool(majority) or not strays)
        for rank in strays:
            first.setdefault(rank, at)
    return first, sure


def _majority(ranks: Sequence[int], same: Callable[[int, int], bool]) -> set[int]:
    """More than half of the ranks, that agree with one of them; empty where there is no such."""
    largest: set[int] = set()
    for one in ranks[: len(ranks) // 2 + 1]:  # a majority has one of them
        largest = max(largest, {other for other in ranks if same(one, other)}, key=len)
        if len(largest) * 2 > len(ranks):
            return largest
    return set()


def _verdict(named: Iterable[int], unsure: set[int]) -> Verdict:
    ranks = set(named)
    certain = ranks - unsure
    return Verdict(ranks=tuple(sorted(certain or ranks)), sure=bool(certain) or not ranks)
