"""Unlike pools that train one model together, each as an island with its own layout and a share of every batch.

A step takes as long as the slowest island, so shares follow speed; then islands exchange gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.planning.devices import Devices
from orchestrator.planning.layout_search import Candidate, search, sized
from orchestrator.planning.request import Space, Work

EXACT_DEVICES = 12
EXACT_BATCH = 64
"""Up to so many devices and sequences all shares are tried."""
ROUNDS = 2
"""Of shares by speed and layouts by shares, on more."""

Sharing = tuple[Devices, Space]


@dataclass(frozen=True, kw_only=True)
class Island:
    devices: Devices
    sequences: int
    """Of a global batch."""
    candidate: Candidate


@dataclass(frozen=True, kw_only=True)
class Islands:
    islands: tuple[Island, ...]
    exchange_s: float

    @property
    def step_time_s(self) -> float:
        return max(island.candidate.step.total for island in self.islands) + self.exchange_s


def islands(work: Work, pools: Sequence[Sharing], alone: Sequence[Candidate | None] = ()) -> Islands | None:
    """All pools together, those left out on which nothing fits; None: fewer than two are left.

    Args:
        alone: what was found for each pool and the whole batch, where that is known.

    Raises:
        PlanError: devices do not compute in the dtype that is asked for.
    """
    alone = alone or [_best(work, pool, work.global_batch_size) for pool in pools]
    fitting = [(pool, found) for pool, found in zip(pools, alone, strict=True) if found]
    if len(fitting) < 2 or work.global_batch_size < len(fitting):
        return None
    among = [pool for pool, _ in fitting]
    small = sum(devices.count for devices, _ in among) <= EXACT_DEVICES and work.global_batch_size <= EXACT_BATCH
    shared = _all_shares(work, among) if small else _by_speed(work, among, [1 / c.step.total for _, c in fitting])
    if shared is None:
        return None
    return Islands(islands=shared, exchange_s=_exchange_s(work, shared))


def _best(work: Work, pool: Sharing, sequences: int) -> Candidate | None:
    devices, space = pool
    space = replace(space, fewest_workers=1)
    found = search(replace(work, global_batch_size=sequences), devices, space, keep=1).best
    return found[0] if found else None


def _all_shares(work: Work, pools: Sequence[Sharing]) -> tuple[Island, ...] | None:
    """The least of the slowest islands' times, over every way to share a batch: island by island, the best for each
    number of sequences that those so far take."""
    batch = work.global_batch_size
    best: dict[int, tuple[float, tuple[Island, ...]]] = {0: (0.0, ())}
    for pool in pools:
        alone = {count: _best(work, pool, count) for count in range(1, batch + 1)}
        further: dict[int, tuple[float, tuple[Island, ...]]] = {}
        for taken, (slowest, before) in best.items():
            for count in range(1, batch - taken + 1):
                found = alone[count]
                if found is None:
                    continue
                slower = max(slowest, found.step.total)
                if taken + count not in further or slower < further[taken + count][0]:
                    island = Island(devices=pool[0], sequences=count, candidate=found)
                    further[taken + count] = (slower, (*before, island))
        best = further
    return best[batch][1] if batch in best else None


def _by_speed(work: Work, pools: Sequence[Sharing], speeds: Sequence[float]) -> tuple[Island, ...] | None:
    """Layouts for shares that follow speeds, shares for these layouts, and again while steps get faster."""
    shares, best = _proportional(work.global_batch_size, speeds), None
    for _ in range(ROUNDS):
        found = [_best(work, pool, share) for pool, share in zip(pools, shares, strict=True)]
        layouts = [candidate for candidate in found if candidate]
        if len(layouts) < len(pools):
            return best
        balanced = _balanced(work, pools, layouts)
        if not _fit(balanced) or (best is not None and _slowest(balanced) >= _slowest(best)):
            return best
        best, shares = balanced, [island.sequences for island in balanced]
    return best


def _fit(of: Sequence[Island]) -> bool:
    return all(island.candidate.memory.total <= island.devices.memory_bytes for island in of)


def _slowest(of: Sequence[Island]) -> float:
    return max(island.candidate.step.total for island in of)


def _proportional(batch: int, speeds: Sequence[float]) -> list[int]:
    """At least one sequence each."""
    ends = [round(batch * sum(speeds[: n + 1]) / sum(speeds)) for n in range(len(speeds))]
    shares = [max(end - start, 1) for start, end in itertools.pairwise([0, *ends])]
    shares[shares.index(max(shares))] -= sum(shares) - batch
    return shares


def _balanced(work: Work, pools: Sequence[Sharing], layouts: Sequence[Candidate]) -> tuple[Island, ...]:
    """Shares for given layouts: the shortest time in which they do a whole batch, by bisection."""
    laid = list(zip(pools, layouts, strict=True))
    known: list[dict[int, float]] = [{} for _ in laid]

    def most(n: int, within_s: float) -> int:
        """Sequences that an island does in that time; one at least. Its time grows with the largest share alone."""
        few, many, replicas = 1, work.global_batch_size + 1, layouts[n].data_parallel
        while many - few > 1:
            middle = (few + many) // 2
            share = math.ceil(middle / replicas) if middle > replicas else -middle
            if share not in known[n]:
                known[n][share] = _sized(work, *laid[n], middle).step.total
            few, many = (middle, many) if known[n][share] <= within_s else (few, middle)
        return few

    numbers = range(len(laid))
    quick, slow = 0.0, max(_sized(work, *one, work.global_batch_size).step.total for one in laid)
    while slow - quick > 1e-6 * slow:
        middle = (quick + slow) / 2
        done = sum(most(n, middle) for n in numbers)
        quick, slow = (quick, middle) if done >= work.global_batch_size else (middle, slow)
    shares = [most(n, slow) for n in numbers]
    for n in sorted(range(len(shares)), key=lambda n: -shares[n]):
        shares[n] -= min(sum(shares) - work.global_batch_size, shares[n] - 1)
    return tuple(
        Island(devices=pool[0], sequences=share, candidate=_sized(work, pool, candidate, share))
        for (pool, candidate), share in zip(laid, shares, strict=True)
    )


def _sized(work: Work, pool: Sharing, candidate: Candidate, sequences: int) -> Candidate:
    replicas = min(candidate.data_parallel, sequences)
    share = math.ceil(sequences / replicas)
    size = min(candidate.micro_batch_size, share)
    return sized(replace(work, global_batch_size=sequences), pool[0], candidate.layout, replicas, size, candidate.dtype)


def _exchange_s(work: Work, of: Sequence[Island]) -> float:
    """Of gradients in fp32 with every other island, each rank its fragments, both ways at once: bound by the island
    whose devices' links to other nodes carry the least together."""
    slowest = min(
        island.candidate.workers * island.devices.platforms[island.candidate.dtype].link_bytes_per_s for island in of
    )
    return 4.0 * work.shape.parameters * (len(of) - 1) / slowest
