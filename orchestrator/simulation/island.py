"""One island of a simulated run: its nodes that come and go, and the lives of its attempts, one after the other.

It does what the supervisor does: wait for nodes, start workers, train until something ends the attempt, notice it, and
ask `failures.decide` what is next. A planned change commits first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import simpy

from orchestrator import elastic, failures
from orchestrator.elastic import LEAVE_S, SETTLE_S
from orchestrator.failures import Ending, Outcome
from orchestrator.goodput import Kind
from orchestrator.simulation.chances import Happening, Signal, happen, stream
from orchestrator.simulation.scenario import HOUR_S, Hazard, Island, Restart, Strike

if TYPE_CHECKING:
    from orchestrator.simulation.run import Run

STRAGGLER_STEPS = 40
"""After which a straggler is named (`train.straggler_ratio`)."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Of the end of an attempt."""

    outcome: str
    planned: bool = False
    """It commits first."""
    standby: bool | None = None
    """Whether workers that stand by serve the attempt after it; None: if they are ready."""


class IslandRun:
    def __init__(self, run: Run, place: int, island: Island, weight: float, seed: int) -> None:
        """
        Args:
            weight: of its seconds in the ledger of the run.
        """
        self.island = island
        self.weight = weight
        self.training = False
        self.used = 0
        """Nodes of the present attempt."""
        self.there = island.nodes + island.spare_nodes
        """Nodes that could be used."""
        self.node_s = 0.0
        """Seconds that nodes were held, idle ones included."""
        self._run = run
        self._env = run.env
        self._dice = {name: stream(seed, place, name) for name in ("which", "repair", "back", "slow")}
        self._changed = Signal(run.env)
        """Fires when rates, or the nodes that are there, have changed."""
        self._live = False
        """Whether an attempt is, that a failure can end."""
        self._slow: dict[int, float] = {}
        """Factors of the nodes that are slow, by a number."""
        self._slow_count = 0
        self._evicted: set[int] = set()
        """Of those, the ones that the next attempt does without."""
        self._attempt = 0
        """Its number."""
        self._began_s = 0.0
        """When the attempt's first step began."""
        self._counted_s = 0.0
        self._kind: Kind | None = None
        self._since_s = 0.0
        self._endings: list[Ending] = []
        self._process = run.env.process(self._live_through())
        for number, hazard in enumerate(island.hazards):
            act = partial(self._fails, hazard)
            self._begin(stream(seed, place, "hazard", number), partial(self._rate, hazard), act)
        if reclaims := island.reclaims:
            self._begin(stream(seed, place, "reclaim"), lambda: self.there / reclaims.mean_hours / HOUR_S, self._told)
        if slowdowns := island.slowdowns:
            per_s = 1 / slowdowns.mtbf_hours / HOUR_S
            self._begin(stream(seed, place, "slowdown"), lambda: self.used * per_s, self._slows)

    def _begin(self, dice: Any, rate: Any, act: Any) -> None:
        self._env.process(happen(self._env, dice, rate, self._changed, act))

    @property
    def step_s(self) -> float:
        """Of the whole batch, if it were alone."""
        return self.island.step_s(self.used) * self._drag

    @property
    def _drag(self) -> float:
        return max(self._slow.values(), default=1.0)

    # --- the ledger ---------------------------------------------------------------------------------------------------

    def enter(self, kind: Kind | None) -> None:
        """What its seconds are from now on; None while it trains, where `Progress` tells."""
        if self._kind:
            self._run.progress.seconds[self._kind] += (self._env.now - self._since_s) * self.weight
        self._kind, self._since_s = kind, self._env.now

    def count_nodes(self) -> None:
        """Up to now."""
        self.node_s += self.there * (self._env.now - self._counted_s)
        self._counted_s = self._env.now

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _live_through(self) -> Happening:
        restart = self._run.scenario.costs.cold
        while True:
            yield from self._wait_for_nodes()
            resumed_from = self._run.progress.committed
            try:
                yield from self._start(restart)
                yield from self._train()
            except simpy.Interrupt as interrupt:
                cause = cast("Cause", interrupt.cause)
            restart = self._restart_after(cause)
            step = self._stop(cause)
            yield from self._spend("detection", 0.0 if cause.planned else self._costs.detection(cause.outcome))
            if cause.outcome != "driver_lost":
                yield from self._decide(cause, resumed_from, step)

    @property
    def _costs(self) -> Any:
        return self._run.scenario.costs

    def _wait_for_nodes(self) -> Happening:
        self.enter("waiting")
        while self.there < self.island.least:
            yield self._changed.wait()

    def _start(self, restart: Restart) -> Happening:
        """
        Raises:
            simpy.Interrupt: a failure came before the first step.
        """
        self.used = min(self.island.nodes, self.there)
        self._live = True
        self._attempt += 1
        self._changed.fire()
        for kind, seconds in restart.phases:
            if kind == "load" and self._run.storage_back_s > self._env.now:
                self._live = False
                raise simpy.Interrupt(Cause(outcome="storage"))
            yield from self._spend(kind, seconds)

    def _train(self) -> Happening:
        """Until the attempt is interrupted, after the commit where that was planned.

        Raises:
            simpy.Interrupt: always.
        """
        self.enter(None)
        self._began_s = self._env.now
        self._run.joins(self)
        if self.island.nodes > self.used and self.there > self.used:
            self._look_for_more()
        try:
            yield self._env.event()
        except simpy.Interrupt as interrupt:
            if cast("Cause", interrupt.cause).planned and self._run.alone(self):
                self._live = True  # a failure may come before the commit does
                yield from self._run.commit()
                self._live = False
            raise

    def _stop(self, cause: Cause) -> int:
        """Returns the last step that was done."""
        self._live = False
        self._run.settle()
        step = int(self._run.progress.done + 1e-9)
        if self.training:
            self._run.leaves(self, lossless=cause.planned)
        self.used = 0
        while self._evicted:
            self._slow.pop(self._evicted.pop(), None)
        self._changed.fire()
        return step

    def _restart_after(self, cause: Cause) -> Restart:
        costs = self._costs
        ready = self.training and self._env.now >= self._began_s + costs.standby_start_s
        stood_by = ready if cause.standby is None else cause.standby
        return cast("Restart", costs.standby if costs.standby and stood_by else costs.cold)

    def _decide(self, cause: Cause, resumed_from: int, step: int) -> Happening:
        committed = self._run.progress.committed
        # Message and plan differ each time: chance does not strike twice for the same reason.
        ending = Ending(
            attempt=len(self._endings) + 1,
            outcome=cast("Outcome", cause.outcome),
            message=f"simulated, number {len(self._endings)}",
            resumed_from=resumed_from,
            last_step=max(step, committed),
            committed_step=committed,
            failed_step=step + 1,
            plan=str(len(self._endings)),
        )
        self._endings.append(ending)
        self._run.count(cause.outcome)
        decision = failures.decide(self._endings, self._run.scenario.max_restarts)
        if decision.action == "give_up":
            self._run.give_up(f"{cause.outcome} at step {step}: {decision.reason}")
        yield from self._spend("scheduling", decision.wait_s)

    def _spend(self, kind: Kind, seconds: float) -> Happening:
        if seconds > 0:
            self.enter(kind)
            yield self._env.timeout(seconds)

    # --- what ends them -----------------------------------------------------------------------------------------------

    def strikes(self, cause: Cause) -> None:
        """End the attempt, if there is one to end."""
        if self._live:
            self._live = False
            self._process.interrupt(cause)

    def _rate(self, hazard: Hazard) -> float:
        """A second."""
        if hazard.of == "run":
            count = 1 if self._live else 0
        else:
            count = self.there if hazard.takes_node else self.used if self._live else 0
        return count / hazard.mtbf_hours / HOUR_S

    def _fails(self, hazard: Hazard) -> None:
        if hazard.takes_node:
            self._node_goes(hazard.outcome, self._drawn("repair", self.island.repair_hours))
        else:
            self.strikes(Cause(outcome=hazard.outcome, planned=hazard.outcome == "yielded"))

    def _drawn(self, name: str, mean_hours: float) -> float:
        """Seconds."""
        return self._dice[name].expovariate(1.0) * mean_hours * HOUR_S

    def _in_use(self) -> bool:
        """Whether a node that something happens to is one of the attempt's."""
        return self._dice["which"].random() * max(self.there, 1) < self.used

    def _node_goes(self, outcome: str, away_s: float, in_use: bool | None = None) -> None:
        if not self.there:
            return
        hit = self._in_use() if in_use is None else in_use
        self._leave()
        self._env.process(self._comes_back(away_s))
        if hit:
            self.strikes(Cause(outcome=outcome, standby=False))

    def _leave(self) -> None:
        self.count_nodes()
        self.there -= 1
        self._changed.fire()

    def _comes_back(self, away_s: float) -> Happening:
        yield self._env.timeout(away_s)
        self.count_nodes()
        self.there += 1
        self._changed.fire()
        self._look_for_more()

    # --- planned changes ----------------------------------------------------------------------------------------------

    def _look_for_more(self) -> None:
        """Where nodes stand idle that the attempt could use, make room for a larger one."""
        if self.training and self.used < self.island.nodes:
            self._env.process(self._grows())

    def _grows(self) -> Happening:
        attempt, wait_s = self._attempt, SETTLE_S
        if self._costs.standby:
            wait_s = max(wait_s, self._costs.standby_start_s)
        yield self._env.timeout(wait_s)
        if self.training and self._attempt == attempt and self.there > self.used:
            more = min(self.there, self.island.nodes)
            share = self.island.step_s(more) / self.step_s
            if elastic.pays(share, self._run.left_s(), (self._costs.standby or self._costs.cold).total_s):
                self.strikes(Cause(outcome="yielded", planned=True))

    def _told(self) -> None:
        """A node is about to be taken back."""
        reclaims = self.island.reclaims
        assert reclaims
        self.drain(reclaims.notice_s, self._drawn("back", reclaims.back_hours))

    def drain(self, notice_s: float, away_s: float) -> None:
        """A node will go."""
        if self.there:
            self._env.process(self._goes_after(notice_s, away_s, self._in_use()))

    def _goes_after(self, notice_s: float, away_s: float, in_use: bool) -> Happening:
        attempt = self._attempt
        self._leave()  # it is not planned on any more
        if in_use and notice_s > LEAVE_S + self._run.commit_takes_s:
            self.strikes(Cause(outcome="yielded", planned=True))
        yield self._env.timeout(notice_s)
        self._env.process(self._comes_back(away_s))
        if in_use and self._live and self._attempt == attempt:  # it had no time to make way
            self.strikes(Cause(outcome="node_lost", standby=False))

    # --- stragglers ---------------------------------------------------------------------------------------------------

    def _slows(self) -> None:
        slowdowns = self.island.slowdowns
        assert slowdowns
        self.slow(slowdowns.factor, self._drawn("slow", slowdowns.mean_hours))

    def slow(self, factor: float, seconds: float) -> None:
        """A node of the attempt computes more slowly for a time."""
        if self.training:
            self._slow_count += 1
            self._env.process(self._is_slow(self._slow_count, factor, seconds))

    def _is_slow(self, number: int, factor: float, seconds: float) -> Happening:
        self._run.settle()
        self._slow[number] = factor
        self._run.changed.fire()
        named_s = min(STRAGGLER_STEPS * self.step_s, seconds)
        yield self._env.timeout(named_s)
        evicted = named_s < seconds and self.training and self._worth_evicting(number)
        if evicted:
            self._evicted.add(number)
            self._leave()
            self.strikes(Cause(outcome="yielded", planned=True))
        yield self._env.timeout(seconds - named_s)
        if evicted:
            yield from self._comes_back(0.0)
        elif number in self._slow:
            self._run.settle()
            del self._slow[number]
            self._run.changed.fire()

    def _worth_evicting(self, number: int) -> bool:
        left = min(self.there - 1, self.island.nodes)
        if left < self.island.least:
            return False
        drag = max((factor for other, factor in self._slow.items() if other != number), default=1.0)
        share = self.island.step_s(left) * drag / self.step_s
        return elastic.pays(share, self._run.left_s(), (self._costs.standby or self._costs.cold).total_s)

    # --- a fault script -----------------------------------------------------------------------------------------------

    def play(self, strike: Strike) -> None:
        """Do what a line of the script says."""
        if strike.outcome == "slow":
            self.slow(strike.slow_factor, strike.slow_steps * self.step_s * strike.slow_factor)
            return
        if strike.notice_s:
            self._env.process(self._goes_after(strike.notice_s, strike.seconds, in_use=True))
            return
        if strike.takes_node:
            self._node_goes(strike.outcome, strike.seconds, in_use=False)
        standby = False if strike.takes_node and strike.standby is None else strike.standby
        self.strikes(Cause(outcome=strike.outcome, planned=strike.outcome == "yielded", standby=standby))
