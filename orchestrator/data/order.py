"""The data order: which samples step s consumes, as a pure function of (number of samples, seed, step).

The world size never enters, so a run continues with exactly the next sample after any failure or resize, and its
data position is one integer. Needs neither the samples nor memory in proportion to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.data.splitmix import mix

_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Order:
    """Every epoch is a permutation of its own; epochs are joined, so no sample is dropped or repeated at their seam."""

    samples: int
    seed: int
    global_batch_size: int
    """Sequences a step."""

    def step(self, step: int) -> np.ndarray:
        """Sample ids of a step, counted from 1, int64 [global_batch_size]."""
        first = (step - 1) * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size, dtype=np.uint64)
        epochs, offsets = positions // np.uint64(self.samples), positions % np.uint64(self.samples)
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = permute(offsets[chosen], self.samples, self.seed, int(epoch))
        return ids

    def of_rank(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Sample ids of one data-parallel rank: the ranks take contiguous slices, so their union is the step."""
        each = self.global_batch_size // world_size
        return self.step(step)[rank * each : (rank + 1) * each]


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
