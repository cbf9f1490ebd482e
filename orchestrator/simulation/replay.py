"""A real run, simulated again from what it measured: its costs and its failures in, its ledger out.

So the simulation is held to runs that were, and a forecast can start from the costs of one (`terrane simulate --like`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator.errors import UserError
from orchestrator.goodput import ENDED_WELL, Kind, Ledger, ledger
from orchestrator.runs import RunDir
from orchestrator.simulation.run import Result, simulate
from orchestrator.simulation.scenario import Costs, Island, Restart, Scenario, Strike, scaled

Record = Mapping[str, Any]
_WENT_BACK = ("rolled_back", "started_over", "checkpoint_damaged")
_PHASES: tuple[Kind, ...] = ("scheduling", "preflight", "start_up", "load")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took, and what happened to it."""

    step_s: float
    """Mean of the steps that count, evaluations and checks included."""
    costs: Costs
    workers: int
    saves_at: tuple[tuple[int, ...], ...]
    """Steps that each attempt committed, counted from `first_step`."""
    first_step: int
    last_step: int
    strikes: tuple[Strike, ...]
    """One for each attempt but the last, counted in steps from `first_step`; and one for that, if it ended before it
    came to the steps of another."""
    waiting_s: float
    """For capacity, in all."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    measured: Measured
    real: Ledger
    simulated: Result

    @property
    def wall_error(self) -> float:
        """By how much the simulated wall time is longer, as a share."""
        return self.simulated.wall_s / self.real.wall_s - 1

    @property
    def goodput_error(self) -> float:
        """Simulated less real."""
        return self.simulated.goodput - self.real.goodput

    def kind_errors(self, least_share: float = 0.05) -> dict[Kind, float]:
        """Simulated less real seconds, as a share of the real ones, of kinds that took so much of the wall time."""
        return {
            kind: self.simulated.seconds.get(kind, 0.0) / seconds - 1
            for kind, seconds in self.real.seconds.items()
            if seconds >= least_share * self.real.wall_s
        }


def replay(run: RunDir) -> Replay:
    """Simulate what a finished or stopped run went through.

    Raises:
        UserError: it has made no step yet, or gone back behind its last commit, which no failure of nodes does.
    """
    events, metrics = run.events(), run.metric_lines()
    if back := next((event["event"] for event in events if event["event"] in _WENT_BACK), None):
        raise UserError(f"{run.uri} has {back.replace('_', ' ')}, which is not simulated", "choose another run")
    real = _ledger(events, metrics)
    measured = _measure(run, events, metrics, real)
    return Replay(measured=measured, real=real, simulated=simulate(scenario_of(measured)))


def inputs_of(run: RunDir) -> Measured:
    """What a run measured.

    Raises:
        UserError: it has made no step yet.
    """
    events, metrics = run.events(), run.metric_lines()
    return _measure(run, events, metrics, _ledger(events, metrics))


def scenario_of(measured: Measured) -> Scenario:
    """The run once more: the same steps, saves and failures, at the mean costs."""
    waits = sum(strike.takes_node for strike in measured.strikes)
    strikes = tuple(
        Strike(**{**vars(strike), "seconds": measured.waiting_s / waits}) if strike.takes_node else strike
        for strike in measured.strikes
    )
    return Scenario(
        islands=(Island(nodes=1, step_s=scaled(measured.step_s, 1)),),
        steps=max(measured.last_step - measured.first_step, 1),
        costs=measured.costs,
        saves_at=measured.saves_at,
        strikes=strikes,
        max_restarts=len(strikes) + 1,
    )


def _ledger(events: Sequence[Record], metrics: Sequence[Record]) -> Ledger:
    last_sign = max((record["time"] for record in [*events, *metrics] if record.get("time")), default=0.0)
    return ledger(events, metrics, last_sign)


# --- what it measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Life:
    """Of one attempt, from the log."""

    number: int
    outcome: str
    standby: bool
    first: int
    """Step that it went on from."""
    last: int
    """Step that it did last."""
    part: float
    """Of the step after it that was done when it ended."""
    seconds: Mapping[Kind, float]


def _measure(run: RunDir, events: Sequence[Record], metrics: Sequence[Record], real: Ledger) -> Measured:
    lives = list(_lives(events, metrics, real))
    if not any(life.last > life.first for life in lives):
        raise UserError(f"{run.uri} has made no step yet", "simulate a run that has trained")
    begun = lives[0].first
    kept = max(lives[-1].last - begun, 1)
    commits = [event for event in events if event["event"] == "committed" and _of(event, lives)]
    seconds = real.seconds
    failed = [life for life in lives[:-1] if life.outcome not in ENDED_WELL]
    write_s = _mean([event["saved_s"] for event in commits if event.get("saved_s") is not None])
    tails_s = write_s * sum(life.outcome in ENDED_WELL for life in lives)  # of saves that nothing went on beside
    costs = Costs(
        cold=_restart([life for life in lives if not life.standby]) or _restart(lives) or Restart(),
        standby=_restart([life for life in lives if life.standby]),
        checkpoint_s=max(seconds.get("checkpoint", 0.0) - tails_s, 0.0) / max(len(commits), 1),
        write_s=write_s,
        data_wait_s=seconds.get("data_wait", 0.0) / kept,
        detection_s=_mean([life.seconds.get("detection", 0.0) for life in failed]),
        detection_by_outcome_s={
            outcome: _mean([life.seconds.get("detection", 0.0) for life in failed if life.outcome == outcome])
            for outcome in {life.outcome for life in failed}
        },
        closing_s=sum(span.end - span.begin for span in real.spans if span.attempt is None),
    )
    return Measured(
        step_s=seconds.get("productive", 0.0) / kept,
        costs=costs,
        workers=next((e["workers"] for e in reversed(events) if e["event"] == "attempt_started" and "workers" in e), 1),
        saves_at=tuple(tuple(e["step"] - begun for e in commits if e["attempt"] == life.number) for life in lives),
        first_step=begun,
        last_step=max(life.last for life in lives),
        strikes=tuple(_strikes(lives, begun)),
        waiting_s=seconds.get("waiting", 0.0),
    )


def _lives(events: Sequence[Record], metrics: Sequence[Record], real: Ledger) -> Iterator[_Life]:
    by_attempt: dict[int, dict[Kind, float]] = {}
    for span in real.spans:
        if span.attempt is not None:
            of_kind = by_attempt.setdefault(span.attempt, {})
            of_kind[span.kind] = of_kind.get(span.kind, 0.0) + span.end - span.begin
    backed_off_s = 0.0
    for number in sorted(by_attempt):
        said = {event["event"]: event for event in events if event.get("attempt") == number}
        lines = [line for line in metrics if line["attempt"] == number and line.get("step")]
        seconds = by_attempt[number]
        seconds["scheduling"] = max(seconds.get("scheduling", 0.0) - backed_off_s, 0.0)  # `decide` says it again
        backed_off_s = said.get("decided", {}).get("wait_s") or 0.0
        first = said.get("attempt_started", {}).get("resume_step")
        if first is None:
            first = lines[0]["step"] - 1 if lines else 0
        yield _Life(
            number=number,
            outcome=said.get("attempt_ended", {}).get("outcome", "driver_lost"),
            standby=bool(said.get("attempt_started", {}).get("standby")),
            first=first,
            last=max((line["step"] for line in lines), default=first),
            part=_part(lines, real, number),
            seconds=seconds,
        )


def _part(lines: Sequence[Record], real: Ledger, number: int) -> float:
    """Of the step under way that was done when an attempt failed: the lost time after its last record."""
    if not lines:
        return 0.0
    typical_s = statistics.median(line.get("step_time_s") or 0.0 for line in lines)
    after = [s for s in real.spans if s.attempt == number and s.kind == "lost_work"]
    lost_s = max((span.end - max(span.begin, lines[-1]["time"]) for span in after), default=0.0)
    return min(max(lost_s / typical_s, 0.0), 0.99) if typical_s else 0.0


def _restart(lives: Sequence[_Life]) -> Restart | None:
    """Mean of what attempts took before their first step."""
    if not lives:
        return None
    means = {kind: _mean([life.seconds.get(kind, 0.0) for life in lives]) for kind in _PHASES}
    return Restart(**{f"{kind}_s": seconds for kind, seconds in means.items()})


def _strikes(lives: Sequence[_Life], begun: int) -> Iterator[Strike]:
    yield from _between(lives, begun)
    if lives[-1].last < max(life.last for life in lives):
        yield Strike(step=lives[-1].last - begun, outcome="stopped")


def _between(lives: Sequence[_Life], begun: int) -> Iterator[Strike]:
    for life, after in pairwise(lives):
        outcome = "yielded" if life.outcome in ENDED_WELL else life.outcome
        waited = after.seconds.get("waiting", 0.0) > 0
        yield Strike(
            step=life.last - begun + (0.0 if outcome == "yielded" else life.part),
            outcome=outcome,
            standby=after.standby,
            takes_node=waited and outcome not in ("yielded", "driver_lost"),
        )


def _of(event: Record, lives: Sequence[_Life]) -> bool:
    return event.get("attempt") in {life.number for life in lives}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
