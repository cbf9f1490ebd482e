"""Exclusions: what training goes on without, though the order names it: lost shards, quarantined documents.

The order stays as it is, and so does every position in it. What is excluded counts for no target, and the loss is
divided by the targets that are left in the *global* batch, which every rank knows from here. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LostShard:
    """A shard that is missing or damaged: its samples are not there."""

    name: str
    first: int
    """Id of its first sample."""
    samples: int
    reason: str


@dataclass(frozen=True)
class Run:
    """Tokens of a sample that belong to a quarantined document."""

    sample: int
    first: int
    last: int
    """Of the tokens of the sample, both ends included."""


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    lost: tuple[LostShard, ...] = ()
    quarantined: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    """Runs of tokens by document."""
    filler: int = 0
    """The token that stands where an excluded one was: the one that ends documents."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.quarantined)

    def lost_samples(self, ids: np.ndarray) -> np.ndarray:
        """Which of the samples lie in lost shards, bool like ids."""
        found = np.zeros(len(ids), dtype=bool)
        for shard in self.lost:
            found |= (ids >= shard.first) & (ids < shard.first + shard.samples)
        return found

    def counted(self, ids: np.ndarray, sequence_length: int) -> np.ndarray | None:
        """Which tokens of the samples are left, bool [len(ids), sequence_length]; None where all are."""
        lost = self.lost_samples(ids)
        runs = [(place, run) for place, sample in enumerate(ids.tolist()) for run in self._runs.get(sample, ())]
        if not runs and not lost.any():
            return None
        left = np.ones((len(ids), sequence_length), dtype=bool)
        left[lost] = False
        for place, run in runs:
            left[place, run.first : run.last + 1] = False
        return left

    def targets(self, ids: np.ndarray, sequence_length: int) -> int:
        """Tokens of the samples that the loss counts: all that are left but the first of each sample."""
        left = self.counted(ids, sequence_length) if self else None
        return len(ids) * (sequence_length - 1) if left is None else int(left[:, 1:].sum())

    def as_json(self) -> dict[str, Any]:
        return {
            "lost": [asdict(shard) for shard in self.lost],
            "quarantined": {
                document: [[run.sample, run.first, run.last] for run in runs]
                for document, runs in self.quarantined.items()
            },
            "filler": self.filler,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Exclusions:
        return Exclusions(
            lost=tuple(LostShard(**shard) for shard in values["lost"]),
            quarantined={
                document: tuple(Run(*run) for run in runs) for document, runs in values["quarantined"].items()
            },
            filler=values["filler"],
        )

    @functools.cached_property
    def _runs(self) -> dict[int, list[Run]]:
        """By sample."""
        found: dict[int, list[Run]] = {}
        for runs in self.quarantined.values():
            for run in runs:
                found.setdefault(run.sample, []).append(run)
        return found
