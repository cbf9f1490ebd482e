"""`train.checkpoint_every: auto`: rank 0's clock, which says when the next save is due."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.errors import StorageError
from orchestrator.goodput import ledger
from orchestrator.planning import checkpointing
from orchestrator.runs import RunDir

log = logging.getLogger("terrane.worker")

SAVES = 8
"""The last ones, whose median is the cost of a save."""
STEPS = 64
"""The last ones beside no save, whose median is how long a step takes."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What the run has seen before this attempt."""

    failures: int = 0
    observed_s: float = 0.0
    """Wall time of training, without the waits for capacity."""
    cost_s: float | None = None
    """Of a save."""


def read_history(run: RunDir) -> History:
    events = run.events()
    found = ledger(events, [], time.time())
    commits = [event for event in events if event["event"] == "committed"][-SAVES:]
    return History(
        failures=sum(cost.count for cost in found.failures),
        observed_s=found.wall_s - found.seconds.get("waiting", 0.0),
        cost_s=statistics.median(event["waited_s"] + event["copied_s"] for event in commits) if commits else None,
    )


def reading(run: RunDir) -> Future[History]:
    """Read the history while training begins: on S3 every event is a request."""
    pool = ThreadPoolExecutor(1, "history")
    future = pool.submit(read_history, run)
    pool.shutdown(wait=False)
    return future


class SaveClock:
    """Told of every step and save of an attempt, it says when to save.

    A save costs what training stands still for, and by how much steps are slower while it is written.
    """

    def __init__(
        self,
        history: Future[History],
        in_flight: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            in_flight: whether a save is being written.
            now: seconds, from anywhere.
        """
        self._history = history
        self._in_flight = in_flight
        self._now = now
        self._began = self._saved = now()
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._costs: deque[float] = deque(maxlen=SAVES)
        self._beside_save = False

    def due(self) -> bool:
        """Whether the step that begins is to be saved: its end is the one nearest to the best time."""
        half_s = statistics.median(self._steps) / 2 if self._steps else 0.0
        return not self._in_flight() and self._now() - self._saved + half_s >= self.interval_s

    def stepped(self, seconds: float) -> None:
        if not self._beside_save:
            self._steps.append(seconds)
        elif self._steps:
            self._costs[-1] += max(0.0, seconds - statistics.median(self._steps))
        self._beside_save = self._in_flight()

    def saved(self, stood_still_s: float) -> None:
        """A save has begun."""
        self._saved = self._now()
        self._costs.append(stood_still_s)
        self._beside_save = True
        figures = (self.interval_s, statistics.median(self._costs), self._mtbf_s / 60)
        log.info("saves every %.0f s: one costs %.2f s, and a failure is expected every %.0f minutes", *figures)

    @property
    def interval_s(self) -> float:
        cost_s = statistics.median(self._costs) if self._costs else self._seen.cost_s
        return checkpointing.interval_s(cost_s, self._mtbf_s)

    @property
    def _mtbf_s(self) -> float:
        seen = self._seen
        return checkpointing.mtbf_s(seen.failures, seen.observed_s + self._now() - self._began)

    @property
    def _seen(self) -> History:
        """Nothing, until it is read."""
        if not self._history.done():
            return History()
        try:
            return self._history.result()
        except StorageError as error:
            log.warning("the run's history could not be read, and the checkpoint interval does without: %s", error)
            self._history = Future()
            self._history.set_result(History())
            return History()
