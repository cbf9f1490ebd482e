"""Stragglers: replicas that are persistently slower than their peers, and hold all of them up at every step.

A rank is compared with the ranks that compute the same layers in other replicas, by the time that a sequence takes in
its forward pass (orchestrator.train.timing). A shared machine delays a step now and then, by any factor: so what counts
is the time of the quick steps of a window, two windows have to agree, and the steps of both have to differ from those
of the peers by more than chance. Imports no Ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir

log = logging.getLogger("terrane.worker")

WINDOW = 20
"""Steps that are judged together."""
WINDOWS = 2
"""In a row that a straggler is too slow."""
QUICK = 0.25
"""Share of the steps of a window that are quicker than the one that counts: nobody delayed them."""
SURE = 4.0
"""Standard deviations by which the ranks of a straggler's steps among all lie above what chance would give."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    rank: int
    """Of a tensor-parallel group the first: all of it are as slow as the slowest."""
    ratio: float
    """Its time to that of its peers."""


class Detector:
    """Judges one step after the other.

    Args:
        threshold: times slower than its peers, from which a rank is a straggler.
    """

    def __init__(self, plan: Plan, threshold: float) -> None:
        self._peers = peers(plan)
        self._threshold = threshold
        self._steps: list[tuple[float, ...]] = []

    def judge(self, forward_s: tuple[float, ...]) -> list[Straggler] | None:
        """Those that there are, with the last step of a window; None with the steps in between.

        Args:
            forward_s: of the engine's StepResult.
        """
        compared = [rank for group in self._peers for rank in group]
        if not compared or not np.isfinite([forward_s[rank] for rank in compared]).all():
            return None
        self._steps.append(forward_s)
        if len(self._steps) < WINDOWS * WINDOW:
            return None
        found = self._found(np.array(self._steps))
        self._steps = self._steps[WINDOW:]
        return found

    def _found(self, seconds: np.ndarray) -> list[Straggler]:
        stragglers = []
        for group in self._peers:
            for rank, ratio in zip(group, slowness(seconds[:, group]), strict=True):
                if ratio > self._threshold:
                    stragglers.append(Straggler(rank=rank, ratio=float(ratio)))
        return stragglers


class Stragglers:
    """The watch of an attempt over its stragglers. Every rank makes one; rank 0 tells.

    Args:
        threshold: train.straggler_ratio; None: nobody is looked for.
        nodes: of every rank, where it runs (orchestrator.train.integrity.Node).
        tell: called after every window in which there are stragglers, and the first in which there are none any more,
            with their ratios by rank.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        plan: Plan,
        threshold: float | None,
        nodes: list[Any],
        rank: int,
        tell: Callable[[dict[int, float]], object],
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._nodes = nodes
        self._detector = Detector(plan, threshold) if threshold and rank == 0 else None
        self._known: dict[int, float] = {}
        self._report = tell

    def follow(self, step: int, result: Any) -> None:
        """Judge a step, by the engine's StepResult, and tell of those that are found."""
        found = self._detector.judge(result.forward_s) if self._detector else None
        if found is None:
            return
        for straggler in found:
            if straggler.rank not in self._known:
                self._log(step, straggler)
        before, self._known = self._known, {straggler.rank: straggler.ratio for straggler in found}
        if before or self._known:
            self._report(self._known)

    def _log(self, step: int, found: Straggler) -> None:
        node, ratio = self._nodes[found.rank], round(found.ratio, 2)
        self._run.log_event(
            "straggler", attempt=self._attempt, rank=found.rank, node_id=node.id, host=node.host, ratio=ratio
        )
        log.warning(
            "step %d: rank %d on %s is a straggler: %.2f times slower than its peers", step, found.rank, node, ratio
        )


def peers(plan: Plan) -> list[list[int]]:
    """Ranks that compute the same layers in different replicas, of every pipeline stage; none of a single replica."""
    stages: dict[int, list[int]] = {}
    for rank in range(plan.workers):
        stage, _, tensor_rank = plan.coordinates(rank)
        if tensor_rank == 0:
            stages.setdefault(stage, []).append(rank)
    return [group for group in stages.values() if len(group) > 1]


def slowness(seconds: np.ndarray) -> np.ndarray:
    """How many times slower than the median of its peers each rank was, in the better of the windows; 1 where the
    difference may be chance.

    Args:
        seconds: [..., steps of the windows, ranks].

    Returns:
        [..., ranks]
    """
    windows = [_to_peers(np.quantile(part, QUICK, axis=-2)) for part in np.split(seconds, WINDOWS, axis=-2)]
    return np.where(_rank_sum_score(seconds) > SURE, np.minimum.reduce(windows), 1.0)


def _to_peers(values: np.ndarray) -> np.ndarray:
    """Each value relative to the median of the others, [..., ranks]."""
    count = values.shape[-1]
    others = [np.median(np.delete(values, rank, axis=-1), axis=-1) for rank in range(count)]
    ratios: np.ndarray = values / np.stack(others, axis=-1)
    return ratios


def _rank_sum_score(seconds: np.ndarray) -> np.ndarray:
    """By how many standard deviations the steps of each rank lie above those of its peers (Wilcoxon's rank-sum test,
    1945): no delay counts for more than its place among all steps. [..., ranks]"""
    *cases, own, ranks = seconds.shape
    places = seconds.reshape(*cases, own * ranks).argsort(-1).argsort(-1).reshape(seconds.shape) + 1
    others = own * (ranks - 1)
    wins = places.sum(-2) - own * (own + 1) / 2  # pairs in which the step of the rank is the slower one
    score: np.ndarray = (wins / (own * others) - 0.5) * math.sqrt(12 * own * others / (own + others + 1))
    return score
