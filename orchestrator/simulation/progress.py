"""The steps and saves of a run, moved on over stretches of time in which its speed is the same.

Between two failures nothing is left to chance, so the time is divided up by arithmetic, a save at a time, and no event
is needed for a step. Seconds count for good once a commit stands behind them; those that a failure undoes are lost
work, the saves among them too, as in the ledger of a real run (`goodput`).
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from orchestrator.goodput import Kind
from orchestrator.simulation.scenario import Costs

STEADY_SHARE = 0.02
"""Of the time of a run, for which the estimate of how often it fails is taken to stay the same."""
_EXACT_S = 1e-7
"""Times nearer to each other are the same: sums of floating-point numbers are no better after months."""


class Progress:
    def __init__(
        self,
        steps: int,
        costs: Costs,
        saves: int | Sequence[Sequence[int]] | Callable[[float], float],
        steady: bool = False,
    ) -> None:
        """
        Args:
            saves: steps from one to the next; or the steps after which one comes, for each attempt; or the seconds of
                training from one to the next, asked for at a time of the run.
            steady: whether those seconds are the same at any time.
        """
        self.steps = steps
        self.done = 0.0
        """Steps, with the part of the one under way."""
        self.committed = 0
        """Step that a failure goes back to."""
        self.saves = 0
        self.seconds: dict[Kind, float] = defaultdict(float)
        """That have been decided."""
        self._costs = costs
        self._every = saves if isinstance(saves, int) else None
        self._interval_s = saves if callable(saves) else None
        self._planned = saves if isinstance(saves, Sequence) else ()
        self._attempt = -1
        self._steady = steady
        self._now = 0.0
        self._since_save_s = 0.0
        self._saved = 0
        self._saving_s = self._writing_s = 0.0
        """That the save under way goes on to stand still, and to write."""
        self._written_next = False
        """Whether training has stood still for a save, which is now to be written."""
        self._pending: int | None = None
        """Step of the save that is being written."""
        self._asked: int | None = None
        """Step to save at, whatever the interval."""
        self._at_risk: dict[Kind, float] = defaultdict(float)
        self._safe_with_pending: dict[Kind, float] = defaultdict(float)

    @property
    def finished(self) -> bool:
        return self.committed >= self.steps

    def advance(self, now: float, seconds: float, step_s: float, weight: float = 1.0) -> None:
        """Train for a time.

        Args:
            now: time at its begin, in seconds.
            step_s: without the wait for data.
            weight: of its seconds in the ledger.
        """
        self._now = now
        whole_s = step_s + self._costs.data_wait_s
        while seconds > _EXACT_S and not self.finished:
            skipped = self._whole_cycles(seconds, step_s, weight)
            seconds -= skipped
            self._now += skipped
            if self._saving_s:
                spent = self._stand_still(seconds, weight)
            elif self.done >= self.steps:
                spent = min(seconds, self._writing_s)
                self._at_risk["checkpoint"] += spent * weight
            else:
                spent = self._step(seconds, whole_s)
                self._at_risk["productive"] += spent * weight * step_s / whole_s
                self._at_risk["data_wait"] += spent * weight * self._costs.data_wait_s / whole_s
            self._write(spent)
            if self._written_next:
                self._begin_to_write()
            self._now += spent
            seconds -= spent

    def least_s(self, step: float, step_s: float) -> float:
        """No more seconds than it takes to do a step, or to commit the last one: the saves on the way are left out."""
        steps_s = max(step - self.done, 0.0) * (step_s + self._costs.data_wait_s)
        rest_s = self._writing_s if self.done >= self.steps else 0.0
        return max(steps_s + self._saving_s + rest_s, 10 * _EXACT_S)

    def save_s(self, step_s: float) -> float:
        """Seconds until the next save begins."""
        return 0.0 if self._saving_s else max(self._target(step_s) - self.done, 0.0) * step_s

    def save_now(self) -> int:
        """Save after the step under way. Returns the step that will be committed."""
        if self._saving_s:  # then what is under way is as good
            return round(self.done)
        self._asked = max(math.ceil(self.done - 1e-9), self._saved)
        return self._asked

    def commit_s(self, step_s: float) -> float:
        """No more seconds than until something of what `save_now` asked for is done."""
        if self._saving_s or self._pending is not None:
            return self._saving_s or max(self._writing_s, 10 * _EXACT_S)
        return max((self._target(step_s) - self.done) * (step_s + self._costs.data_wait_s), 10 * _EXACT_S)

    def begin(self) -> None:
        """An attempt begins to train: the time to the next save counts from here."""
        self._attempt += 1
        self._since_save_s = 0.0

    def fail(self) -> int:
        """Go back to the last commit. Returns the steps that were done since."""
        lost = int(self.done + 1e-9) - self.committed
        self.seconds["lost_work"] += sum(self._at_risk.values()) + sum(self._safe_with_pending.values())
        self._at_risk.clear()
        self._safe_with_pending.clear()
        self.done, self._saved = float(self.committed), self.committed
        self._saving_s = self._writing_s = self._since_save_s = 0.0
        self._pending = self._asked = None
        self._written_next = False
        return lost

    def drop_step(self, step_s: float, weight: float) -> None:
        """Lose the step under way alone, as where one island of several fails."""
        part = self.done - math.floor(self.done)
        lost = min(part * step_s * weight, self._at_risk["productive"])
        self._at_risk["productive"] -= lost
        self.seconds["lost_work"] += lost
        self.done = float(math.floor(self.done))

    def close(self) -> None:
        """What is at risk stands, since the run ends here."""
        _pour(self._safe_with_pending, self.seconds)
        _pour(self._at_risk, self.seconds)

    # --- a piece of time ----------------------------------------------------------------------------------------------

    def _whole_cycles(self, seconds: float, step_s: float, weight: float) -> float:
        """Pass over cycles of steps and a save that are all alike, in one go. Returns the seconds that they take.

        An interval that is asked for anew at every save counts as the same for 2 % of the run's time.
        """
        if (
            self._planned
            or self.done != self._saved
            or self.done >= self.steps
            or self._saving_s
            or self._asked is not None
        ):
            return 0.0
        if self._interval_s and not self._steady:
            seconds = min(seconds, STEADY_SHARE * self._now)
        whole_s = step_s + self._costs.data_wait_s
        each = self._target(whole_s) - self._saved
        if (self._every and each != self._every) or each * whole_s < self._costs.write_s:
            return 0.0
        cycle_s = each * whole_s + self._costs.checkpoint_s
        count = min(int(seconds / cycle_s), (self.steps - self._saved - 1) // each) - 1
        if count < 2:
            return 0.0
        self._write(math.inf)  # what is being written is committed before the next save begins
        cycle: dict[Kind, float] = {
            "productive": each * step_s,
            "data_wait": each * self._costs.data_wait_s,
            "checkpoint": self._costs.checkpoint_s,
        }
        for kind, cycle_part in cycle.items():
            self.seconds[kind] += (count - 1) * cycle_part * weight
            self._at_risk[kind] += cycle_part * weight
        self.committed = self._saved + (count - 1) * each
        self.saves += count - 1
        self.done = float(self._saved + count * each)
        self._begin_to_write()
        return count * cycle_s

    def _step(self, seconds: float, step_s: float) -> float:
        target = self._target(step_s)
        needed = (target - self.done) * step_s
        if needed > seconds + _EXACT_S:
            self.done += seconds / step_s
            self._since_save_s += seconds
            return seconds
        self.done = float(target)
        self._since_save_s += needed
        self._saving_s = self._costs.checkpoint_s
        self._written_next = not self._saving_s
        return max(needed, 0.0)

    def _stand_still(self, seconds: float, weight: float) -> float:
        spent = min(seconds, self._saving_s)
        self._at_risk["checkpoint"] += spent * weight
        self._saving_s -= spent
        if self._saving_s <= _EXACT_S:
            self._saving_s = 0.0
            self._written_next = True
        return spent

    def _begin_to_write(self) -> None:
        _pour(self._at_risk, self._safe_with_pending)
        self._saved = self._pending = round(self.done)
        self._written_next = False
        self._asked = None
        self._since_save_s = 0.0
        self._writing_s = self._costs.write_s
        self._write(0.0)

    def _write(self, spent: float) -> None:
        if self._pending is None:
            return
        self._writing_s -= spent
        if self._writing_s <= _EXACT_S:
            self.committed, self._pending = self._pending, None
            self._writing_s = 0.0
            self.saves += 1
            _pour(self._safe_with_pending, self.seconds)

    def _target(self, step_s: float) -> int:
        """The step after which the next save begins."""
        first = max(self._saved + 1, math.ceil(self.done - 1e-9))
        if self._pending is not None:  # none begins while another is written
            first = max(first, math.ceil(self.done + self._writing_s / step_s - 1e-9))
        if self._asked is not None:
            return max(self._asked, math.ceil(self.done - 1e-9))
        if self._every:
            due = (int(self.done + 1e-9) // self._every + 1) * self._every
        elif self._planned:
            own = self._planned[min(self._attempt, len(self._planned) - 1)]
            later = bisect.bisect(own, self._saved)
            due = own[later] if later < len(own) else self.steps
        else:
            assert self._interval_s
            due = round(self.done + (self._interval_s(self._now) - self._since_save_s) / step_s)
        return min(max(first, due), self.steps)


def _pour(one: dict[Kind, float], other: dict[Kind, float]) -> None:
    for kind, seconds in one.items():
        other[kind] += seconds
    one.clear()
