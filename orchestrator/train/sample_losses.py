"""The loss of every sample of the last steps, and the documents that stand behind a sample. Imports no Ray."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data import inspection
from orchestrator.data.manifest import Manifest
from orchestrator.data.schedule import Role, Schedule
from orchestrator.errors import StorageError

log = logging.getLogger("terrane.worker")


@dataclass(frozen=True)
class Samples:
    """Samples that were trained on, each with its step and its loss; three arrays alike in length."""

    steps: np.ndarray
    ids: np.ndarray
    losses: np.ndarray

    def of_step(self, step: int) -> Samples:
        here = self.steps == step
        return Samples(self.steps[here], self.ids[here], self.losses[here])


class SampleLosses:
    """Of one rank's shares: 4 bytes a sample, for the last few steps."""

    def __init__(self, corpus: str, manifest: Manifest, schedule: Schedule, role: Role, steps: int) -> None:
        self._corpus = corpus
        self._manifest = manifest
        self._schedule = schedule
        self._role = role
        self._recent: deque[tuple[int, np.ndarray]] = deque(maxlen=steps)

    def add(self, step: int, losses: np.ndarray | None) -> None:
        """Args: losses: of every sequence of this rank's share, in order; None on a rank that computes none."""
        if losses is not None:
            self._recent.append((step, losses))

    def everyone(self) -> Samples:
        """Those of all ranks, on every rank; all call it. What is excluded has no loss."""
        mine = [(step, *self._counted(step, losses)) for step, losses in self._recent]
        parts = [part for theirs in gathered(mine) for part in theirs]
        steps = [np.full(len(ids), step) for step, ids, _ in parts]
        return Samples(_joined(steps, int), _joined([p[1] for p in parts], int), _joined([p[2] for p in parts], float))

    def documents(self, samples: Sequence[int]) -> list[list[str]]:
        """Of each sample, the one with most tokens first, without those that are left out already; empty where the
        corpus cannot tell."""
        try:
            found = inspection.trace(self._corpus, self._manifest, list(samples))
        except StorageError as error:
            log.warning("the documents of %d samples cannot be named: %s", len(samples), error.message)
            return [[] for _ in samples]
        left_out = self._schedule.exclusions.quarantined
        longest_first = [sorted(passages, key=lambda p: p.first - p.last) for passages in found]
        return [unique(p.document for p in passages if p.document not in left_out) for passages in longest_first]

    def _counted(self, step: int, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and losses of this rank's samples in a step that have a target."""
        ids = self._schedule.ids([step], self._role)
        counted = self._schedule.exclusions.counted(ids, self._schedule.sequence_length)
        left = np.ones(len(ids), dtype=bool) if counted is None else counted[:, 1:].any(axis=1)
        return ids[left], losses[left]


def gathered(mine: Any) -> list[Any]:
    """What every rank gives, by rank. All call it."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def rank() -> int:
    """Of this process, among all."""
    import torch.distributed as dist

    return dist.get_rank()


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(names))


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])
