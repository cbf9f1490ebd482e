"""Times that no micro-batch of a layout is below: what lets a search leave most layouts unseen, and still be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import Load
from orchestrator.planning.platform import Platform
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.throughput import Pace, paces

ROUNDING = 1 - 1e-9
"""Sums in another order must not rule out what is as fast."""


@dataclass(frozen=True)
class Bound:
    """Of a layout and number of replicas. In a pipeline of accumulation a, every stage takes one micro-batch and the
    slowest a - 1 more; each has share/a sequences. Whichever stage is taken for the slowest, the step is not faster."""

    sequence_s: float
    """Of the stage that is the slowest with many sequences."""
    fixed_s: float
    all_sequence_s: float
    """Of all stages together."""
    all_fixed_s: float
    reduce_s: float
    """Of gradients, once a step."""
    update_s: float

    @classmethod
    def of(cls, stages: Sequence[Pace]) -> Bound:
        slowest = max(stages, key=lambda pace: (pace.sequence_s, pace.fixed_s))
        return cls(
            slowest.sequence_s,
            slowest.fixed_s,
            sum(pace.stages * pace.sequence_s for pace in stages),
            sum(pace.stages * pace.fixed_s for pace in stages),
            max(pace.reduce_s for pace in stages),
            max(pace.update_s for pace in stages),
        )

    def with_accumulation(self, share: int, accumulation: float) -> float:
        """Seconds of a step.

        Args:
            share: sequences of a replica.
        """
        one = share / accumulation
        first = self.all_sequence_s * one + self.all_fixed_s
        more = (accumulation - 1) * (self.sequence_s * one + self.fixed_s)
        return ROUNDING * (first + more + self.reduce_s + self.update_s)

    def at_best(self, share: int) -> float:
        """With whatever accumulation is the best, whole or not."""
        grows, shrinks = self.fixed_s, (self.all_sequence_s - self.sequence_s) * share
        best = math.sqrt(shrinks / grows) if grows > 0 else share
        return self.with_accumulation(share, min(max(best, 1.0), share))


class Bounds:
    def __init__(
        self, shape: ModelShape, platform: Platform, global_batch_size: int, sequence_length: int, dtype: str
    ) -> None:
        self._shape = shape
        self._platform = platform
        self._batch = global_batch_size
        self._sequence_length = sequence_length
        self._dtype = dtype
        self._orderly = _links_slow_down(platform)
        self._known: dict[tuple[Layout, int], Bound] = {}

    def share(self, replicas: int) -> int:
        """Sequences of the replica that has the most."""
        return math.ceil(self._batch / replicas)

    def of(self, layout: Layout, replicas: int) -> Bound:
        key = (layout, replicas)
        if key not in self._known:
            load = Load(
                dtype=self._dtype,
                data_parallel=replicas,
                micro_batch_size=1,
                accumulation=1,
                sequence_length=self._sequence_length,
            )
            self._known[key] = Bound.of(paces(self._shape, layout, self._platform, load))
        return self._known[key]

    def of_range(self, layout: Layout, fewest: int, most: int) -> float:
        """Seconds that no step of so many replicas is below: few have the least to reduce, over the fastest links, and
        many the smallest shares and the smallest parts of a split optimizer."""
        if not self._orderly:
            return 0.0 if fewest < most else self.of(layout, most).at_best(self.share(most))
        many = self.of(layout, most)
        return replace(self.of(layout, fewest), update_s=many.update_s).at_best(self.share(most))


def _links_slow_down(platform: Platform) -> bool:
    """Whether groups that are larger than a node have slower links, and not faster ones."""
    slower = platform.link_bytes_per_s <= platform.device_link_bytes_per_s
    return slower and platform.link_latency_s >= platform.device_link_latency_s
