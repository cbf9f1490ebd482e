"""A live attempt, followed to its end: its metrics and its workers' reports, and what changes around it."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import cluster, nodes, storage
from orchestrator.capacity import AGENT_START_BESIDE_S, LOOK_ON_S3_S, LOOK_S, Capacity
from orchestrator.config import Recipe
from orchestrator.drivers import Driver
from orchestrator.elastic import LEAVE_S, SETTLE_S, Change
from orchestrator.endings import Death, Evidence, first_line, of_storage, patience_s
from orchestrator.errors import CapacityError, Interrupted, StorageError, UserError
from orchestrator.hangs import FIRST_S, RECENT_STEPS, Hang, durations, hang, named
from orchestrator.lease import Lease
from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir
from orchestrator.standby import Standby
from orchestrator.stop_requests import ask_to_make_way, request_stop
from orchestrator.worker_group import WorkerGroup

log = logging.getLogger(__name__)

POLL_S = 0.2
TRIAL_WARM_UP_STEPS, TRIAL_STEPS = 2, 5
"""Of a layout that is tried: those that do not count, and those that do."""
SIGNS_S = 5.0
"""Between two looks at the signs of life of all workers."""
SILENT_S = 60.0
"""After which the agent of a node that gives no answer is given up, and the node with it."""
STANDBY_PAYS_S = 30.0
"""A standby is started where training will take longer than that."""
FULL_MEMORY = 0.9
"""Share of a node's memory in use from which the death of a worker may have been Ray's own doing, which it tells."""

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all attempts of one command have in common."""

    run: RunDir
    recipe: Recipe
    driver: Driver
    lease: Lease
    capacity: Capacity
    standby: Standby
    on_step: OnStep
    """Called with each new record of the metrics."""


class Attempt:
    def __init__(self, command: Command, number: int, plan: Plan, group: WorkerGroup) -> None:
        self._command = command
        self._run = command.run
        self._number = number
        self._plan = plan
        self._group = group
        self._follower = _Follower(command.run, number, command.on_step)
        self._change: Change | None = None
        self._leaving = False
        """Whether the workers were asked to make room for `_change`."""
        self._hang: Hang | None = None
        self._next_look = self._next_signs = 0.0
        self._interrupts = 0
        self._stop_wanted = False
        self._began = time.monotonic()

    @property
    def last_step(self) -> int:
        return self._follower.last_step

    def follow(self) -> Evidence:
        """Return when the attempt has ended, and none of its processes is left.

        Raises:
            Interrupted: the second Ctrl-C.
            RunFailed: another driver has taken over.
        """
        while not self._hang and not self._group.over(self._patience_s):
            try:
                self._poll()
            except KeyboardInterrupt:
                self._interrupted()
        now = time.time()
        finished = len(self._group.finished) == self._plan.workers
        if not finished or self._leaving:  # those that have finished hold memory of their devices until they are gone
            self._group.end()
        with self._without_storage():
            self._follower.poll(now=True)
        return self._evidence(finished, now)

    def _poll(self) -> None:
        self._command.driver.check()
        reports = self._command.lease.poll(POLL_S)
        self._group.take(reports)
        self._command.standby.note(reports)
        with self._without_storage():
            self._observe()

    @contextlib.contextmanager
    def _without_storage(self) -> Iterator[None]:
        """The attempt goes on unseen, as long as its workers do."""
        try:
            yield
        except Exception as error:
            if not of_storage(error):
                raise
            log.warning("attempt %d goes on unseen: %s", self._number, first_line(str(error)))
            self._next_look = self._next_signs = time.monotonic() + LOOK_ON_S3_S

    def _observe(self) -> None:
        self._tell_workers()
        self._follower.poll()
        if self._group.broken:
            return
        if time.monotonic() >= self._next_signs:
            self._next_signs = time.monotonic() + SIGNS_S
            self._look_for_signs()
        if self._follower.last_step and time.monotonic() >= self._next_look:
            dear = storage.is_s3(self._run.uri) and not cluster.draining()
            self._next_look = time.monotonic() + (LOOK_ON_S3_S if dear else LOOK_S)
            self._look_around()

    def _look_for_signs(self) -> None:
        """See that the workers get on, and keep their stacks where they do not."""
        signs = self._group.signs()
        self._command.lease.give_up_silent(SILENT_S)
        if len(signs) < self._plan.workers:
            if time.monotonic() > self._began + FIRST_S:
                missing = tuple(rank for rank in range(self._plan.workers) if rank not in signs)
                self._hang = Hang(step=0, seconds=FIRST_S, ranks=missing, message=f"{named(missing)} never started")
            return
        found = hang(
            signs,
            durations(list(self._follower.recent)),
            self._command.recipe.train.hang_after_s,
            self._stopped(),
            since_s=time.monotonic() - self._began,
        )
        if found is None:
            return
        self._hang = found
        log.warning("attempt %d hangs: %s", self._number, found.message)
        for rank, text in self._group.stacks().items():
            storage.write(self._run.stacks(self._number, rank), text.encode())
        self._run.log_event("hang", attempt=self._number, step=found.step, seconds=found.seconds, message=found.message)

    def _stopped(self) -> list[int]:
        return self._group.stopped() if self._follower.idle_s > SIGNS_S else []

    def _look_around(self) -> None:
        """Prepare for what comes next, and make room for it where that pays."""
        standby, steps_left = self._command.standby, self._command.recipe.train.steps - self._follower.last_step
        if self._leaving or not steps_left:
            return
        step_s = self._follower.step_s
        slow = {self._group.nodes[rank]: ratio for rank, ratio in self._group.slow.items()}
        before, self._change = self._change, self._wanted(step_s, steps_left, slow)
        change = self._change
        self._command.lease.keep({*self._plan.node_ids, *standby.node_ids, *(change.plan.node_ids if change else ())})
        if change is None:
            if step_s * steps_left > STANDBY_PAYS_S:
                standby.prepare(self._plan)
        elif before and before.plan.placement == change.plan.placement:  # what is seen once may be gone again
            self._make_way(change)

    def _wanted(self, step_s: float, steps_left: int, slow: dict[str, float]) -> Change | None:
        try:
            if self._plan.trial:
                return self._after_trial()
            change = self._command.capacity.change(self._plan, step_s, steps_left, slow)
        except StorageError:
            raise
        except UserError as error:  # as of a node that joined with a wrong label
            log.warning("attempt %d stays as it is: %s", self._number, error.message)
            return None
        young = time.monotonic() < self._began + SETTLE_S
        return None if change and young and change.kind != "drain" else change

    def _after_trial(self) -> Change | None:
        """None while it lasts, and where its layout stays."""
        seconds = [record["step_time_s"] for record in self._follower.recent][TRIAL_WARM_UP_STEPS:]
        if len(seconds) < TRIAL_STEPS:
            return None
        chosen = self._command.capacity.after_trial(self._plan, statistics.median(seconds))
        if str(chosen) != str(self._plan):
            return Change(plan=chosen, kind="trial", reason=f"{chosen} next: {chosen.reason}")
        log.info("attempt %d: goes on: %s", self._number, chosen.reason)
        self._plan = replace(self._plan, trial=False)
        return None

    def _make_way(self, change: Change) -> None:
        """Once the workers of a change stand ready, or cannot be waited for, ask the present ones to leave."""
        if change.plan is not self._plan and not self._goes_soon():
            try:
                self._command.capacity.hold(change.plan, AGENT_START_BESIDE_S)
            except CapacityError as lacking:
                log.info("attempt %d: %s", self._number, lacking.message)
                return
            self._command.standby.prepare(change.plan)
            if self._command.recipe.train.standby and not self._command.standby.ready(change.plan):
                return
        self._leaving = True  # also where a person has asked before: then the run stops
        if ask_to_make_way(self._run, self._number, change.kind):
            if change.kind == "eviction":
                self._quarantine(change)
            log.info("attempt %d: makes way: %s", self._number, change.reason)
            self._run.log_event("resized", attempt=self._number, kind=change.kind, reason=change.reason)

    def _quarantine(self, change: Change) -> None:
        for rank, ratio in self._group.slow.items():
            node = self._group.nodes[rank]
            if node not in change.plan.node_ids:
                reason = f"slower than its like by {ratio:.2f}, in attempt {self._number}"
                nodes.quarantine(self._run, node, cluster.hosts().get(node, ""), reason)

    def _goes_soon(self) -> bool:
        """Whether a node of the attempt will be gone before others can stand ready."""
        deadlines = [end for node, end in cluster.draining().items() if node in dict(self._plan.placement) and end]
        return bool(deadlines) and min(deadlines) < time.time() + LEAVE_S

    def _interrupted(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise Interrupted("stopped at once; what the last checkpoint holds is safe", "run the same command")
        when = "after this step" if self.last_step else "after their first step"
        log.warning("stopping: the workers commit %s (Ctrl-C again to drop it)", when)
        self._stop_wanted = True

    def _tell_workers(self) -> None:
        """Store the request of Ctrl-C, once that can be done."""
        if self._stop_wanted:
            request_stop(self._run, "Ctrl-C")
            self._stop_wanted = False

    def _patience_s(self) -> float:
        return patience_s(self._seen())

    def _seen(self) -> Evidence:
        """Of the attempt's end, by the agents."""
        deaths = tuple(
            Death(
                rank=report.rank,
                node_id=report.node_id,
                oom_kills=report.oom_kills,
                node_memory_share=report.node_memory_share,
            )
            for report in self._group.deaths.values()
        )
        return Evidence(errors=self._group.errors, deaths=deaths, lost_nodes=self._group.lost_nodes)

    def _evidence(self, finished: bool, now: float) -> Evidence:
        group, seen = self._group, self._seen()
        crowded = any(death.node_memory_share > FULL_MEMORY for death in seen.deaths)
        silent = not (finished or self._hang or seen.errors or seen.deaths or seen.lost_nodes)
        failed_at = now - self._hang.seconds if self._hang else group.failed_at or now
        return replace(
            seen,
            deaths=() if self._hang else seen.deaths,
            fit_error=group.fit_error(10.0 if crowded or silent else 0.0),
            hang=self._hang.message if self._hang else "",
            yielded=self._change.reason if self._change and self._leaving else "",
            finished=finished,
            failed_at=None if finished else failed_at,
        )


class _Follower:
    """Hands on the lines that rank 0 appends to an attempt's metrics."""

    def __init__(self, run: RunDir, attempt: int, on_step: OnStep) -> None:
        self._run = run
        self._attempt = attempt
        self._uri = run.metrics(attempt)
        self._on_step = on_step
        self._seen = 0
        self._next = 0.0
        self._news_at = time.monotonic()
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        """The newest records."""
        self.last_step = 0

    @property
    def step_s(self) -> float:
        """Seconds that a step takes of late."""
        return statistics.median(record["step_time_s"] for record in self.recent) if self.recent else 0.0

    @property
    def idle_s(self) -> float:
        """Seconds since the last record."""
        return time.monotonic() - self._news_at

    def poll(self, now: bool = False) -> None:
        if time.monotonic() < self._next and not now:
            return
        began = time.monotonic()
        self._take(self._news())
        took_s = time.monotonic() - began
        self._next = time.monotonic() + (max(5.0, 20 * took_s) if storage.is_s3(self._uri) else 0.0)

    def _news(self) -> bytes:
        """Whole lines that came since."""
        try:
            length = storage.size(self._uri) - self._seen
            text = storage.read_range(self._uri, self._seen, length) if length > 0 else b""
        except FileNotFoundError:
            return b""
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        return whole

    def _take(self, lines: bytes) -> None:
        for line in lines.splitlines():
            record = {"attempt": self._attempt, **json.loads(line)}
            if not self.last_step:
                self._run.log_event("first_step", attempt=self._attempt, step=record["step"])
            self.last_step = record["step"]
            self.recent.append(record)
            self._news_at = time.monotonic()
            self._on_step(record)
