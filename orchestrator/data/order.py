"""The data order: which samples step s consumes, as a pure function of (samples, mixture, batch sizes, seed, step).

The world size never enters, so a run continues with exactly the next sample after any failure or resize, and its
data position is one integer. Needs neither the samples nor memory in proportion to them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.splitmix import mix

_ROUNDS = 4
_PATTERN = 10_000
"""Samples in which every weight of a mixture is met exactly, to this fraction."""
_END = int(np.iinfo(np.int64).max)
BLOCK_TOKENS = 2**23
"""Of a block: samples that stand together in the shards and are read in the same stretch of training."""
WINDOW_BLOCKS = 32


@dataclass(frozen=True)
class Pool:
    """Samples that are drawn as one: a source of a mixture, or the whole corpus."""

    first: int
    """Id of the first; the others follow."""
    samples: int


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture."""

    weights: tuple[float, ...]
    """Share of every batch by pool, to be scaled to add up to 1."""
    samples: int | None = None
    """How many the stage draws; None: to the end."""


@dataclass(frozen=True)
class Batches:
    """A stretch of training with one global batch size."""

    sequences: int
    """A step."""
    steps: int | None = None
    """None: to the end."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Positions in the order go to pools by the weights of their stage, evenly spread.

    Every pool is drawn in epochs, each a permutation of its own, joined across stages: within a pool no sample is
    dropped or repeated at a seam. An epoch is shuffled with locality: blocks of neighbouring samples are drawn from all
    parts of the pool in turn, and the samples of each `window` blocks in a row are permuted among themselves. So a
    stretch of training reads few shards, each in one go, and still holds all parts of the pool alike.
    """

    pools: tuple[Pool, ...]
    stages: tuple[Stage, ...]
    batches: tuple[Batches, ...]
    seed: int
    block: int
    """Samples."""
    window: int = WINDOW_BLOCKS
    """Blocks."""

    def batch_size(self, step: int) -> int:
        """Sequences of a step, counted from 1."""
        return next(batches.sequences for batches, _, end in self._batches() if step < end)

    def changes(self) -> list[int]:
        """The steps at which the batch size changes."""
        return [first for _, first, _ in self._batches()[1:]]

    def stage(self, step: int) -> int:
        """Which stage of the mixture the first sample of a step is of, counted from 0."""
        ends = itertools.accumulate(stage.samples or 0 for stage in self.stages[:-1])
        return sum(end <= self.position(step) for end in ends)

    def position(self, step: int) -> int:
        """Samples that the steps before this one consume."""
        return sum((min(step, end) - first) * batches.sequences for batches, first, end in self._batches_before(step))

    def step(self, step: int) -> np.ndarray:
        """Sample ids of a step, int64 [batch_size]."""
        return self.of_rank([step], 0, (1,))

    def of_rank(self, steps: Iterable[int], rank: int, shares: Sequence[int]) -> np.ndarray:
        """Sample ids of one data-parallel rank for some steps, one after the other.

        The ranks take contiguous slices of every step in proportion to their shares, so that their union is the step.
        """
        parts = []
        for step in steps:
            first = self.position(step)
            begin, end = slice_of(self.batch_size(step), rank, shares)
            parts.append(np.arange(first + begin, first + end, dtype=np.int64))
        return self.samples(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at positions of the whole order, int64 like them."""
        ids = np.empty(len(positions), dtype=np.int64)
        chosen, drawn = self._draws(positions)
        for index in np.unique(chosen):
            pool, here = self.pools[index], chosen == index
            ids[here] = pool.first + self._draw(drawn[here], pool.samples, int(index))
        return ids

    def past(self, step: int) -> dict[str, Any]:
        """All that decided what the steps up to this one consumed, as JSON values. Equal pasts consumed the same."""
        drawn = self.position(step + 1)
        mixture, begin = [], 0
        for stage in self.stages:
            end = min(drawn, _END if stage.samples is None else begin + stage.samples)
            if end > begin:
                mixture.append([end - begin, _pattern(stage.weights)[2].tolist()])
            begin = max(begin, end)
        batches: list[list[int]] = []
        for stretch, first, end in self._batches_before(step + 1):
            steps = min(step + 1, end) - first
            if batches and batches[-1][1] == stretch.sequences:
                batches[-1][0] += steps
            else:
                batches.append([steps, stretch.sequences])
        pools = [[pool.first, pool.samples] for pool in self.pools]
        return {
            "seed": self.seed,
            "shuffle": [self.block, self.window],
            "pools": pools,
            "mixture": mixture,
            "batches": batches,
        }

    def _batches(self) -> list[tuple[Batches, int, int]]:
        """(stretch, its first step, the first step after it) each."""
        found, first = [], 1
        for batches in self.batches:
            end = _END if batches.steps is None else first + batches.steps
            found.append((batches, first, end))
            first = end
        return found

    def _batches_before(self, step: int) -> list[tuple[Batches, int, int]]:
        return [stretch for stretch in self._batches() if stretch[1] < step]

    def _draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pool, how many samples of that pool come before) of each position."""
        pools, drawn = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        begin, before = 0, np.zeros(len(self.pools), np.int64)
        for stage in self.stages:
            pattern, ranks, counts = _pattern(stage.weights)
            end = _END if stage.samples is None else begin + stage.samples
            here = (positions >= begin) & (positions < end)
            blocks, places = np.divmod(positions[here] - begin, _PATTERN)
            pools[here] = pattern[places]
            drawn[here] = before[pattern[places]] + blocks * counts[pattern[places]] + ranks[places]
            if stage.samples is not None:
                blocks_done, rest = divmod(stage.samples, _PATTERN)
                before = before + blocks_done * counts + np.bincount(pattern[:rest], minlength=len(counts))
                begin = end
        return pools, drawn

    def _draw(self, drawn: np.ndarray, samples: int, pool: int) -> np.ndarray:
        epochs, offsets = np.divmod(drawn, samples)
        ids = np.empty(len(drawn), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = shuffled(offsets[here], samples, self.block, self.window, (self.seed, pool, int(epoch)))
        return ids


def uniform(*, samples: int, seed: int, global_batch_size: int, block: int = 4096) -> Order:
    """Every sample once an epoch, whatever its source."""
    return Order(
        pools=(Pool(0, samples),),
        stages=(Stage((1.0,)),),
        batches=(Batches(global_batch_size),),
        seed=seed,
        block=block,
    )


def slice_of(batch_size: int, rank: int, shares: Sequence[int]) -> tuple[int, int]:
    """(first, end) of a rank's sequences in a batch: in proportion to its share, to within one."""
    total, before = sum(shares), sum(shares[:rank])
    return batch_size * before // total, batch_size * (before + shares[rank]) // total


@functools.lru_cache(maxsize=64)
def _pattern(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each place in a pattern: its pool, and its rank among the pool's places; and the number of places by pool.

    Each pool's places are spread evenly, so that any stretch holds its share to within one sample a pool.
    """
    shares = np.array(weights) / sum(weights) * _PATTERN
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")
    counts[largest[: _PATTERN - counts.sum()]] += 1
    pools = np.repeat(np.arange(len(weights)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / counts[pools], kind="stable")
    return pools[order], ranks[order], counts


def shuffled(offsets: np.ndarray, size: int, block: int, window: int, seed: tuple[int, ...]) -> np.ndarray:
    """Where an epoch's shuffle with locality puts each offset, int64 below size.

    The last block may be short. It stands among the others where its turn comes, and the window that it falls into is
    short by as much.
    """
    blocks = -(-size // block)
    short = blocks * block - size
    place = _place_of_block(blocks - 1, blocks, window, seed)
    span = window * block

    def begins(index: np.ndarray | int) -> np.ndarray:
        """The first offset of a window: those after the short one begin that much earlier."""
        found: np.ndarray = np.minimum(index * np.int64(span) - short * (np.asarray(index) > place // window), size)
        return found

    windows = np.where(offsets < begins(place // window + 1), offsets, offsets + short) // span
    mixed = np.empty_like(offsets)
    for index in np.unique(windows):
        here, first = windows == index, begins(index)
        mixed[here] = first + permute(offsets[here] - first, int(begins(index + 1) - first), (*seed, 1, int(index)))
    after = mixed >= place * block + block - short
    places, within = np.divmod(mixed + short * after, block)
    found: np.ndarray = _block_at(places, blocks, window, seed) * block + within
    return found


def _block_at(places: np.ndarray, blocks: int, window: int, seed: tuple[int, ...]) -> np.ndarray:
    """The block at each place of an epoch. The blocks are cut into as many strata as a window has places, and every
    window takes one of each: so it holds all parts of the corpus alike."""
    whole, rest = divmod(blocks, window)
    turns, strata = np.divmod(places, window)
    if rest:  # the last window takes from the strata that have a block more
        strata = np.where(turns == whole, ((strata + 1) * window - 1) // rest, strata)
    firsts = strata * blocks // window
    sizes = (strata + 1) * blocks // window - firsts
    found = np.empty_like(places)
    for size in np.unique(sizes):
        here = sizes == size
        turned = (turns[here] + _shifts(strata[here], seed)) % size
        found[here] = firsts[here] + permute(turned, int(size), (*seed, 0))
    return found


def _place_of_block(number: int, blocks: int, window: int, seed: tuple[int, ...]) -> int:
    """Where `_block_at` puts a block."""
    whole, rest = divmod(blocks, window)
    stratum = ((number + 1) * window - 1) // blocks
    first = stratum * blocks // window
    size = (stratum + 1) * blocks // window - first
    turned = _place_of(number - first, size, (*seed, 0))
    turn = (turned - int(_shifts(np.array([stratum]), seed)[0])) % size
    return whole * window + stratum * rest // window if turn == whole else turn * window + stratum


def _shifts(strata: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """How far each stratum is ahead of the others in its permutation, int64, 31 bits."""
    return (mix(strata.astype(np.uint64) ^ _round_keys((*seed, 2))[0]) >> np.uint64(33)).astype(np.int64)


def permute(values: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) puts each value, int64.

    A Feistel network over the next even number of bits, walked until the value falls inside the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory, and any value without the others.
    """
    return _walk(values, size, _round_keys(seed), _forward)


def _place_of(value: int, size: int, seed: tuple[int, ...]) -> int:
    """What `permute` puts at value."""
    return int(_walk(np.array([value], np.int64), size, _round_keys(seed)[::-1], _backward)[0])


def _walk(
    values: np.ndarray,
    size: int,
    keys: np.ndarray,
    network: Callable[[np.ndarray, np.uint64, np.ndarray], np.ndarray],
) -> np.ndarray:
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    found: np.ndarray = network(values.astype(np.uint64), half, keys)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        found[outside] = network(found[outside], half, keys)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def _forward(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return np.asarray((left << half) | right)


def _backward(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right ^ (mix(left ^ key) & mask), left
    return np.asarray((left << half) | right)


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: tuple[int, ...]) -> np.ndarray:
    """uint64 [rounds], all different for different seeds."""
    state = np.zeros(1, np.uint64)
    for part in seed:
        state = mix(state ^ np.uint64(part))
    return mix(state + np.arange(_ROUNDS, dtype=np.uint64))
