"""The next attempt's workers, started while the present attempt still runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.lease import Lease
from orchestrator.node_agent import Report
from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir
from orchestrator.worker_group import Examination, WorkerGroup

log = logging.getLogger(__name__)

AGAIN_S, MOST_AGAIN_S = 30.0, 1800.0
"""After a group that came to nothing, before the next is started: at first, and when many in a row have."""
CHANGED_S = 5.0
"""After a group for another plan."""
MOST = 2
"""Groups of a command at a time before another stands by: the live one, and one that is going."""
TOLD_S = 1.0
"""After which such a wait is told."""
UNWIND_S = 180.0
"""How long Ray Train is given, at the end of a command, to clear away after its worker groups: those that were starting
have to start first. A thread that still waits for it when Ray is shut down ends the process with exit code 1."""


class Standby:
    """Holds one group at most, and knows all that were started, to end them."""

    def __init__(self, run: RunDir, recipe: Recipe, vocab_size: int, lease: Lease) -> None:
        self._run = run
        self._recipe = recipe
        self._vocab_size = vocab_size
        self._lease = lease
        self._group: WorkerGroup | None = None
        self._started: list[WorkerGroup] = []
        self._not_before = 0.0
        self._failed = 0
        """Groups in a row that came to nothing."""

    def prepare(self, plan: Plan) -> None:
        """See that a group for a plan stands ready, or will, if the recipe wants one."""
        if not self._recipe.train.standby:
            return
        if self._group and self._group.fits(plan):
            return
        if self._group:
            self._failed = self._failed + 1 if self._group.broken else 0
            again_s = min(AGAIN_S * 2.0 ** (self._failed - 1), MOST_AGAIN_S) if self._failed else CHANGED_S
            self._not_before = time.monotonic() + again_s
        self.dismiss()
        self._started = [group for group in self._started if not group.unwound(0)]
        if time.monotonic() >= self._not_before and len(self._started) < MOST:
            self._group = self._start(plan, cold=False)

    def ready(self, plan: Plan) -> bool:
        group = self._group
        return group is not None and group.fits(plan) and group.ready and group.sound

    def take(self, plan: Plan) -> tuple[WorkerGroup, bool]:
        """The group of the attempt to come, and whether it stands ready; one that stands elsewhere is sent home."""
        if self._group and self._group.fits(plan) and not self._group.examination.failed:
            group, self._group, self._failed = self._group, None, 0
            return group, group.ready
        self.dismiss()
        return self._start(plan, cold=True), False

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Where the group stands, in the order of its plan."""
        return self._group.plan.node_ids if self._group and not self._group.broken else ()

    def note(self, reports: Sequence[Report]) -> None:
        if self._group:
            self._group.take(reports)

    def dismiss(self) -> None:
        """Send a waiting group home."""
        if self._group:
            self._group.dismiss()
            self._group = None

    def close(self) -> None:
        """Return when none of the groups that were started is left. Ctrl-C is raised then, not before."""
        end, interrupt = time.monotonic() + UNWIND_S, None
        while True:
            try:
                self._close(end)
                break
            except KeyboardInterrupt as error:
                interrupt = error
                log.warning("all that was committed is kept; Ray has still to end workers that were starting")
        if interrupt:
            raise interrupt

    def _close(self, end: float) -> None:
        self.dismiss()
        for group in self._started:
            if group.busy:
                group.end()
        left = [group for group in self._started if not group.unwound(TOLD_S)]
        if left:
            log.info("waiting for the end of workers that were to stand by")
        for group in left:
            if not group.unwound(max(0.0, end - time.monotonic())):
                group.end()
        storage.delete(self._run.ray_train)

    def _start(self, plan: Plan, cold: bool) -> WorkerGroup:
        self._started = [group for group in self._started if not group.unwound(0)]
        examination = Examination(self._run, self._recipe, plan, self._lease)
        group = WorkerGroup(self._run, self._recipe, self._vocab_size, plan, self._lease, examination, cold)
        self._started.append(group)
        return group
