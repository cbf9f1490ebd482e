"""A live attempt, followed to its end: its metrics and its workers' reports, and what changes around it."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from orchestrator import storage
from orchestrator.capacity import LOOK_S, Capacity
from orchestrator.cluster import draining
from orchestrator.elastic import Change
from orchestrator.endings import Death, Evidence, raised_alike
from orchestrator.errors import CapacityError, Interrupted
from orchestrator.lease import Lease
from orchestrator.planning.search import Plan
from orchestrator.runs import RunDir
from orchestrator.standby import Standby
from orchestrator.worker_group import WorkerGroup

log = logging.getLogger(__name__)

POLL_S = 0.2
STANDBY_PAYS_S = 30.0
"""A standby is started where training will take longer than that."""
LEAVE_S = 15.0
"""Before a draining node goes, its state must be on its way to storage."""
FULL_MEMORY = 0.9
"""Share of a node's memory in use from which the death of a worker may have been Ray's own doing, which it tells."""

OnStep = Callable[[dict[str, Any]], None]


def request_stop(run: RunDir, reason: str) -> None:
    """Ask a run's workers to commit after the step they are in, and return."""
    run.write_json(run.stop_request, {"reason": reason, "time": time.time()})


class Attempt:
    """
    Args:
        steps: the last step of the run.
        on_step: called with each new record of the metrics, in the driver.
    """

    def __init__(
        self,
        run: RunDir,
        number: int,
        plan: Plan,
        group: WorkerGroup,
        lease: Lease,
        capacity: Capacity,
        standby: Standby | None,
        steps: int,
        on_step: OnStep,
    ) -> None:
        self._run = run
        self._number = number
        self._plan = plan
        self._group = group
        self._lease = lease
        self._capacity = capacity
        self._standby = standby
        self._steps = steps
        self._follower = _Follower(run, number, on_step)
        self._change: Change | None = None
        self._leaving = False
        """Whether the workers were asked to make room for `_change`."""
        self._next_look = 0.0
        self._interrupts = 0

    @property
    def last_step(self) -> int:
        return self._follower.last_step

    def follow(self) -> Evidence:
        """Return when the attempt has ended, and none of its processes is left.

        Raises:
            Interrupted: the second Ctrl-C.
        """
        while not self._group.over(raised_alike(self._group.errors)):
            try:
                self._poll()
            except KeyboardInterrupt:
                self._interrupted()
        failed_at = time.time()
        finished = len(self._group.finished) == self._plan.workers
        if not finished:
            self._group.end()
        self._follower.poll(now=True)
        return self._evidence(finished, failed_at)

    def _poll(self) -> None:
        reports = self._lease.poll(POLL_S)
        self._group.take(reports)
        if self._standby:
            self._standby.note(reports)
        self._follower.poll()
        if self._follower.last_step and time.monotonic() >= self._next_look and not self._group.broken:
            self._next_look = time.monotonic() + LOOK_S
            self._look_around()

    def _look_around(self) -> None:
        """Prepare for what comes next, and make room for it where that pays."""
        steps_left = self._steps - self._follower.last_step
        if self._leaving or not steps_left:
            return
        step_s = self._follower.step_s
        before, self._change = self._change, self._capacity.change(self._plan, step_s, steps_left, {})
        change = self._change
        if change is None:
            if self._standby and step_s * steps_left > STANDBY_PAYS_S:
                self._standby.prepare(self._plan)
        elif before and before.plan.placement == change.plan.placement:  # what is seen once may be gone again
            self._make_way(change)

    def _make_way(self, change: Change) -> None:
        """Once the workers of a change stand ready, or cannot be waited for, ask the present ones to leave."""
        if change.plan is not self._plan and not self._goes_soon():
            try:
                self._capacity.hold(change.plan)
            except CapacityError as lacking:
                log.info("attempt %d: %s", self._number, lacking.message)
                return
            if self._standby:
                self._standby.prepare(change.plan)
                if not self._standby.ready(change.plan):
                    return
        log.info("attempt %d: makes way: %s", self._number, change.reason)
        self._run.log_event("resized", attempt=self._number, kind=change.kind, reason=change.reason)
        self._leaving = storage.create(self._run.stop_request, json.dumps({"reason": change.kind}).encode())

    def _goes_soon(self) -> bool:
        """Whether a node of the attempt will be gone before others can stand ready."""
        deadlines = [end for node, end in draining().items() if node in dict(self._plan.placement) and end]
        return bool(deadlines) and min(deadlines) < time.time() + LEAVE_S

    def _interrupted(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise Interrupted("stopped at once; what the last checkpoint holds is safe", "run the same command")
        log.warning("stopping: the workers commit after this step (Ctrl-C again to drop it)")
        request_stop(self._run, "Ctrl-C")
        self._leaving = False

    def _evidence(self, finished: bool, failed_at: float) -> Evidence:
        group = self._group
        deaths = tuple(
            Death(
                rank=report.rank,
                node_id=self._node_of(report.rank),
                oom_kills=report.oom_kills,
                node_memory_share=report.node_memory_share,
            )
            for report in group.deaths.values()
        )
        crowded = any(report.node_memory_share > FULL_MEMORY for report in group.deaths.values())
        silent = not (finished or group.errors or deaths or group.lost_nodes)
        return Evidence(
            errors=group.errors,
            deaths=deaths,
            lost_nodes=group.lost_nodes,
            fit_error=group.fit_error(10.0 if crowded or silent else 0.0),
            yielded=self._change.reason if self._change and self._leaving else "",
            finished=finished,
            failed_at=None if finished else failed_at,
        )

    def _node_of(self, rank: int) -> str:
        first = 0
        for node, workers in self._plan.placement:
            first += workers
            if rank < first:
                return node
        return ""


class _Follower:
    """Hands on the lines that rank 0 appends to an attempt's metrics."""

    def __init__(self, run: RunDir, attempt: int, on_step: OnStep) -> None:
        self._run = run
        self._attempt = attempt
        self._uri = run.metrics(attempt)
        self._on_step = on_step
        self._seen = 0
        self._next = 0.0
        self._step_times: deque[float] = deque(maxlen=20)
        self.last_step = 0

    @property
    def step_s(self) -> float:
        """Seconds that a step takes of late."""
        return statistics.median(self._step_times) if self._step_times else 0.0

    def poll(self, now: bool = False) -> None:
        if time.monotonic() < self._next and not now:
            return
        self._next = time.monotonic() + (5.0 if storage.is_s3(self._uri) else 0.0)
        try:
            text = storage.read(self._uri)
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole[self._seen :].splitlines():
            record = {"attempt": self._attempt, **json.loads(line)}
            if not self.last_step:
                self._run.log_event("first_step", attempt=self._attempt, step=record["step"])
            self.last_step = record["step"]
            self._step_times.append(record["step_time_s"])
            self._on_step(record)
        self._seen = len(whole)
