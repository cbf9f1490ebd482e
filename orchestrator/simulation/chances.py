"""When things go wrong: random streams that are the same whatever else is changed between two simulations.

Failures of n nodes with rate r each are those of one process with rate n*r: superposed Poisson processes are one. How
many nodes there are changes in time, so that a stream is drawn in exposure (node-hours) rather than in time: a failure
comes when the exposure of all nodes together has reached the next of its exponentially distributed amounts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import Any

import simpy

Happening = Generator[simpy.Event, Any, None]


class Signal:
    """An event that happens again and again."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._event = env.event()

    def wait(self) -> simpy.Event:
        return self._event

    def fire(self) -> None:
        event, self._event = self._event, self._env.event()
        event.succeed()


def stream(seed: int, *names: object) -> random.Random:
    """Random numbers of its own for each name."""
    return random.Random(":".join(map(str, (seed, *names))))


def happen(
    env: simpy.Environment, dice: random.Random, rate: Callable[[], float], changed: Signal, act: Callable[[], None]
) -> Happening:
    """Act at the times of a Poisson process.

    Args:
        rate: per second, constant until `changed` fires.
    """
    while True:
        exposure = dice.expovariate(1.0)
        while True:
            now, per_s = env.now, rate()
            if per_s:
                due = env.timeout(exposure / per_s)
                yield due | changed.wait()
                if due.processed:
                    break
                exposure -= per_s * (env.now - now)
            else:
                yield changed.wait()
        act()
