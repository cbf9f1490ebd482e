"""A run, simulated from its first step to the commit of its last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import simpy

from orchestrator.goodput import Kind
from orchestrator.planning import checkpointing
from orchestrator.simulation.chances import Happening, Signal
from orchestrator.simulation.island import Cause, IslandRun
from orchestrator.simulation.progress import Progress
from orchestrator.simulation.scenario import HOUR_S, Scenario


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one simulated run."""

    wall_s: float
    seconds: Mapping[Kind, float]
    """By kind, as in the ledger of a run. Of several islands each counts by its share of the speed."""
    steps: int
    """That are committed."""
    endings: Mapping[str, int]
    """How many attempts ended how; those that were asked for are `yielded`."""
    saves: int
    steps_repeated: int
    cost: float
    """In the currency of the prices."""
    device_hours: float
    """Of all devices held, idle ones included."""
    gave_up: str
    """Why, if it did not come to its last step."""

    @property
    def goodput(self) -> float:
        """Share of the wall time that was productive."""
        return self.seconds.get("productive", 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def failures(self) -> int:
        return sum(count for outcome, count in self.endings.items() if outcome != "yielded")


def simulate(scenario: Scenario, seed: int = 0) -> Result:
    """One run. The same seed meets the same failures, as far as the scenarios allow."""
    return Run(scenario, seed).play()


class Run:
    """What the islands have in common: the clock, the steps, and the faults that wait for one."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.env = simpy.Environment()
        self.scenario = scenario
        self.changed = Signal(self.env)
        """Fires when the speed has changed."""
        self.storage_back_s = 0.0
        """Until this time, saves and loads fail."""
        steady = scenario.interval_s is not None
        every: int | Sequence[Sequence[int]] | None = scenario.saves_at
        if every is None and not steady and scenario.checkpoint_every != "auto":
            every = scenario.checkpoint_every
        self.progress = Progress(scenario.steps, scenario.costs, every or self._interval_s, steady)
        self._failures = 0
        self._endings: Counter[str] = Counter()
        self._steps_repeated = 0
        self._settled_s = 0.0
        self._over = self.env.event()
        self._gave_up = ""
        self._strikes = list(scenario.strikes)
        whole = sum(1 / island.step_s(island.nodes) for island in scenario.islands)
        self._islands = [
            IslandRun(self, place, island, 1 / island.step_s(island.nodes) / whole, seed)
            for place, island in enumerate(scenario.islands)
        ]
        self.env.process(self._follow())

    def play(self) -> Result:
        until = self._over
        if self.scenario.longest_s < float("inf"):
            self.env.process(self._run_out())
        self.env.run(until=until)
        self.settle()
        for one in self._islands:
            one.enter(None)
            one.count_nodes()
        self.progress.close()
        closing_s = 0.0 if self._gave_up else self.scenario.costs.closing_s
        self.progress.seconds["scheduling"] += closing_s
        hours = {one: one.node_s / HOUR_S * one.island.devices_per_node for one in self._islands}
        return Result(
            wall_s=self.env.now + closing_s,
            seconds={kind: s for kind, s in sorted(self.progress.seconds.items(), key=lambda item: -item[1]) if s > 0},
            steps=self.progress.committed,
            endings=dict(self._endings),
            saves=self.progress.saves,
            steps_repeated=self._steps_repeated,
            cost=sum(held * one.island.price_per_device_hour for one, held in hours.items()),
            device_hours=sum(hours.values()),
            gave_up=self._gave_up,
        )

    def give_up(self, why: str) -> None:
        if not self._over.triggered:
            self._gave_up = why
            self._over.succeed()

    def count(self, outcome: str) -> None:
        self._endings[outcome] += 1
        self._failures += outcome != "yielded"

    # --- the islands that train ---------------------------------------------------------------------------------------

    @property
    def _training(self) -> list[IslandRun]:
        return [one for one in self._islands if one.training]

    @property
    def step_s(self) -> float:
        """Of the islands that train: each takes a share of the batch by its speed."""
        training = self._training
        together = 1 / sum(1 / one.step_s for one in training)
        return together + (self.scenario.exchange_s if len(training) > 1 else 0.0)

    def left_s(self) -> float:
        """Seconds until the last step, as things are."""
        self.settle()
        return (self.scenario.steps - self.progress.done) * self.step_s if self._training else 0.0

    @property
    def commit_takes_s(self) -> float:
        """After a step that is to be committed."""
        costs = self.scenario.costs
        return (self.step_s if self._training else 0.0) + costs.checkpoint_s + costs.write_s

    def alone(self, one: IslandRun) -> bool:
        return self._training == [one]

    def joins(self, one: IslandRun) -> None:
        self.settle()
        if not self._training:
            self.progress.begin()
        one.training = True
        self.changed.fire()

    def leaves(self, one: IslandRun, lossless: bool) -> None:
        """An island trains no more. If it was the last, the run goes back to its last commit; else the others go on
        with the step that was under way."""
        self.settle()
        step_s, weight = self.step_s, sum(other.weight for other in self._training)
        one.training = False
        if not self._training:
            self._steps_repeated += self.progress.fail()
        elif not lossless:
            self.progress.drop_step(step_s, weight)
        self.changed.fire()

    def settle(self) -> None:
        """Count the time since it was last done, in which the speed was the same."""
        if self._training:
            weight = sum(one.weight for one in self._training)
            self.progress.advance(self._settled_s, self.env.now - self._settled_s, self.step_s, weight)
        self._settled_s = self.env.now

    def commit(self) -> Happening:
        """Save after the step under way."""
        self.settle()
        step = self.progress.save_now()
        while self.progress.committed < step:
            yield self.env.timeout(self.progress.commit_s(self.step_s))
            self.settle()

    def _interval_s(self, now: float) -> float:
        """Seconds of training to the next save."""
        scenario = self.scenario
        if scenario.interval_s:
            return scenario.interval_s
        cost_s = scenario.costs.checkpoint_s if self.progress.saves else None
        observed_s = now - self.progress.seconds.get("waiting", 0.0)
        return checkpointing.interval_s(cost_s, checkpointing.mtbf_s(self._failures, observed_s))

    # --- what waits for a step ----------------------------------------------------------------------------------------

    def _follow(self) -> Happening:
        """See to the faults of the script, and to the end."""
        while True:
            self.settle()
            if self.progress.finished and not self._over.triggered:
                self._over.succeed()
                return
            self._strike_due()
            if self._training:
                step = min([self.scenario.steps, *(strike.step for strike in self._strikes[:1])])
                yield self.env.timeout(self.progress.least_s(step, self.step_s)) | self.changed.wait()
            else:
                yield self.changed.wait()

    def _strike_due(self) -> None:
        while self._strikes and self._training and self.progress.done >= self._strikes[0].step - 1e-9:
            strike = self._strikes.pop(0)
            if strike.outcome == "outage":
                self.env.process(self._storage_fails(strike.seconds))
            elif strike.outcome == "stopped":
                self.env.process(self._stops())
            elif strike.outcome == "driver_lost":
                self.count(strike.outcome)
                for one in self._islands:
                    one.strikes(Cause(outcome=strike.outcome, standby=False))
            else:
                self._islands[strike.island].play(strike)
            if strike.outcome != "slow":
                return  # the next strikes when this one has had its effect

    def _stops(self) -> Happening:
        """Asked to by a person."""
        yield from self.commit()
        self._over.succeed()

    def _storage_fails(self, seconds: float) -> Happening:
        self.storage_back_s = self.env.now + seconds
        until_save_s = self.progress.save_s(self.step_s)
        if until_save_s < seconds:
            yield self.env.timeout(until_save_s)
            for one in self._training:
                one.strikes(Cause(outcome="storage"))

    def _run_out(self) -> Happening:
        yield self.env.timeout(self.scenario.longest_s)
        self.give_up(f"not done after {self.scenario.longest_s / HOUR_S / 24:.0f} days")
