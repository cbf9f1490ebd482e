"""The data order: which samples step s consumes, as a pure function of (samples, mixture, seed, step).

The world size never enters, so a run continues with exactly the next sample after any failure or resize, and its
data position is one integer. Needs neither the samples nor memory in proportion to them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from orchestrator.data.splitmix import mix

_ROUNDS = 4
_BLOCK = 10_000
"""Samples in which every weight of a mixture is met exactly, to this fraction."""


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


@dataclass(frozen=True, kw_only=True)
class Order:
    """Positions in the order go to pools by the weights of their stage, evenly spread.

    Every pool is drawn in epochs, each a permutation of its own, joined across stages: within a pool no sample is
    dropped or repeated at a seam.
    """

    pools: tuple[Pool, ...]
    stages: tuple[Stage, ...]
    seed: int
    global_batch_size: int
    """Sequences a step."""

    def step(self, step: int) -> np.ndarray:
        """Sample ids of a step, counted from 1, int64 [global_batch_size]."""
        first = (step - 1) * self.global_batch_size
        return self.samples(np.arange(first, first + self.global_batch_size, dtype=np.int64))

    def of_rank(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Sample ids of one data-parallel rank: the ranks take contiguous slices, so their union is the step."""
        each = self.global_batch_size // world_size
        return self.step(step)[rank * each : (rank + 1) * each]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at positions of the whole order, int64 like them."""
        ids = np.empty(len(positions), dtype=np.int64)
        chosen, drawn = self._draws(positions)
        for index in np.unique(chosen):
            pool, here = self.pools[index], chosen == index
            ids[here] = pool.first + _draw(drawn[here], pool.samples, self.seed + (int(index) << 32))
        return ids

    def _draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pool, how many samples of that pool come before) of each position."""
        pools, drawn = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        begin, before = 0, np.zeros(len(self.pools), np.int64)
        for stage in self.stages:
            pattern, ranks, counts = _pattern(stage.weights)
            end = np.iinfo(np.int64).max if stage.samples is None else begin + stage.samples
            here = (positions >= begin) & (positions < end)
            blocks, places = np.divmod(positions[here] - begin, _BLOCK)
            pools[here] = pattern[places]
            drawn[here] = before[pattern[places]] + blocks * counts[pattern[places]] + ranks[places]
            if stage.samples is not None:
                blocks_done, rest = divmod(stage.samples, _BLOCK)
                before = before + blocks_done * counts + np.bincount(pattern[:rest], minlength=len(counts))
                begin = end
        return pools, drawn


def uniform(*, samples: int, seed: int, global_batch_size: int) -> Order:
    """Every sample once an epoch, whatever its source."""
    return Order(pools=(Pool(0, samples),), stages=(Stage((1.0,)),), seed=seed, global_batch_size=global_batch_size)


@functools.lru_cache(maxsize=64)
def _pattern(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each place in a block: its pool, and its rank among the pool's places; and the number of places by pool.

    Each pool's places are spread evenly, so that any stretch holds its share to within one sample a pool.
    """
    shares = np.array(weights) / sum(weights) * _BLOCK
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")
    counts[largest[: _BLOCK - counts.sum()]] += 1
    pools = np.repeat(np.arange(len(weights)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / counts[pools], kind="stable")
    return pools[order], ranks[order], counts


def _draw(drawn: np.ndarray, samples: int, seed: int) -> np.ndarray:
    epochs, offsets = np.divmod(drawn.astype(np.uint64), np.uint64(samples))
    ids = np.empty(len(drawn), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(offsets[here], samples, seed, int(epoch))
    return ids


def permute(offsets: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) puts each offset.

    A Feistel network over the next even number of bits, walked until the value falls inside the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory, and any position without the ones before it.

    Args:
        offsets: uint64 values below size.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [mix(np.array([seed * 0x10001 + epoch * _ROUNDS + i], dtype=np.uint64))[0] for i in range(_ROUNDS)]
    values = offsets.astype(np.uint64, copy=True)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
