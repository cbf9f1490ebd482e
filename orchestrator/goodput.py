"""The goodput ledger: every second of a run's training in exactly one kind, from its event log and its metric lines.

Pure. The spans are painted in order of time and each begins where the one before ended, so that they tile the wall time
whatever a log lacks; the time that a missing field would have told apart goes to the kind beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Literal, get_args

Kind = Literal[
    "productive",
    "checkpoint",
    "data_wait",
    "lost_work",
    "detection",
    "scheduling",
    "preflight",
    "waiting",
    "start_up",
    "load",
]
"""What a second went into.

productive: steps that count, with the evaluations and checks that the recipe asks for. checkpoint: training stood still
for a save. data_wait: it waited for a batch. lost_work: steps that are done again or passed over, and the step that was
under way when an attempt failed. detection: from a failure until somebody knew of it. scheduling: planning, back-off,
taking an attempt down and starting the workers of the next. waiting: for capacity. start_up: imports, process group,
engine. load: reading the state.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

ENDED_WELL = ("finished", "stopped", "yielded")
"""Outcomes of attempts that committed their last step."""

_IN_WORDS = {"waiting": "waiting for capacity", "start_up": "start-up"}
_BEFORE_STEPS: tuple[Kind, ...] = ("scheduling", "preflight", "waiting", "start_up", "load")
_STAGE_ENDS = ("stage_finished", "stage_failed", "stage_stopped")
_ENDS_OF_WAITING = ("waited", "attempt_started", "driver_started", "stage_started", *_STAGE_ENDS)

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Span:
    begin: float
    """Unix time."""
    end: float
    kind: Kind
    attempt: int | None
    """That it belongs to, as the time before an attempt does; None after the last of a command."""


@dataclass(frozen=True, kw_only=True)
class FailureCost:
    """What the failures of one kind cost: the steps they lost, and the time to the next attempt's first step."""

    outcome: str
    """Of the attempts; driver_lost where none was recorded."""
    count: int
    lost_s: float

    @property
    def mean_s(self) -> float:
        return self.lost_s / self.count


@dataclass(frozen=True, kw_only=True)
class Ledger:
    spans: tuple[Span, ...]
    """In order of time. Between two commands, while nothing was asked of the run, there is none."""
    wall_s: float
    """Of the commands that trained."""
    tokens: int
    """Seen in the steps that count."""
    failures: tuple[FailureCost, ...]
    """The costliest first."""

    @property
    def seconds(self) -> dict[Kind, float]:
        """Of each kind that took any, the largest first."""
        sums = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            sums[span.kind] += span.end - span.begin
        return dict(sorted(((kind, s) for kind, s in sums.items() if s), key=lambda item: -item[1]))

    @property
    def goodput(self) -> float:
        """Share of the wall time that was productive."""
        return self.seconds.get("productive", 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of wall time."""
        return self.tokens / self.wall_s if self.wall_s else 0.0


def ledger(events: Sequence[Record], metrics: Sequence[Record], now: float) -> Ledger:
    """The ledger of a run since it was last started over.

    The clock runs from `stage_started` of training to the stage's end, for every command. After a driver that died
    without a word it runs on until the next command. The step under way in a run still going counts as productive for
    as long as a step takes; what is beyond has not been seen to be anything, and is detection until it is.

    Args:
        events: in the order of the log.
        metrics: in the order of the steps, each with its `attempt`.
        now: unix time up to which a run still going is looked at.
    """
    begun = max((n for n, event in enumerate(events) if event["event"] == "started_over"), default=-1)
    log = [event for event in events[begun + 1 :] if event.get("time") is not None]
    commands = list(_commands(log, now))
    attempts = _attempts(log, commands, [line for line in metrics if line.get("time") and line.get("step")])
    instead = _instead_of_scheduling(log)
    tapes = [_painted(command, attempts.get(n, []), instead) for n, command in enumerate(commands)]
    spans = tuple(span for tape in tapes for span in tape.spans)
    everyone = [attempt for n in sorted(attempts) for attempt in attempts[n]]
    counted = (line.get("tokens") or 0 for a in everyone for line in a.records if line["step"] <= a.kept)
    return Ledger(
        spans=spans,
        wall_s=sum(command.end - command.begin for command in commands),
        tokens=max(counted, default=0),
        failures=_failure_costs(spans, everyone),
    )


def in_words(kind: str) -> str:
    return _IN_WORDS.get(kind, kind.replace("_", " "))


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Command:
    begin: float
    end: float
    how: Literal["ended", "died", "live"]
    events: Sequence[Record]

    @property
    def noticed(self) -> float:
        """When somebody came after a driver that died."""
        last = self.events[-1]
        return float(last["time"]) if last["event"] == "driver_started" else self.end

    @property
    def last_sign(self) -> float:
        """Of life, of a driver that died."""
        return float(max(event["time"] for event in self.events if event["event"] != "driver_started"))


def _commands(log: Sequence[Record], now: float) -> Iterator[_Command]:
    opened: list[Record] = []
    after = -math.inf

    def command(end: float, how: Literal["ended", "died", "live"]) -> _Command:
        nonlocal after
        begin = max(opened[0]["time"], after)  # clocks of two machines may differ
        after = max(end, begin)
        return _Command(begin=begin, end=after, how=how, events=tuple(opened))

    for event in log:
        begins = event["event"] == "stage_started"
        if opened and (begins or (event["event"] in _STAGE_ENDS and event.get("stage") == "train")):
            yield command(event["time"], "died" if begins else "ended")
            opened = []
        if opened or (begins and event.get("stage") == "train"):
            opened.append(event)
    if opened:
        yield command(now, "live")


def _instead_of_scheduling(log: Sequence[Record]) -> list[tuple[float, float, Kind]]:
    """Stretches (begin, end, kind) in which, between two attempts, something else went on."""
    found: list[tuple[float, float, Kind]] = []
    since: float | None = None
    for event in log:
        name, at = event["event"], event["time"]
        if name == "preflight":
            found.append((at - (event.get("seconds") or 0.0), at, "preflight"))
        elif name == "waiting":
            since = at if since is None else since
        elif name == "waited" and since is None:
            found.append((at - (event.get("seconds") or 0.0), at, "waiting"))
        elif since is not None and name in _ENDS_OF_WAITING:
            found.append((since, at, "waiting"))
            since = None
    return sorted(found if since is None else [*found, (since, math.inf, "waiting")])


# --- attempts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    number: int
    begin: float
    over: float
    """Nothing of it is left: its end as recorded, or the next thing that was."""
    stopped: float
    """Its work ceased: before its end where that took time to be known."""
    how: Literal["well", "failed", "live"]
    outcome: str
    phases: tuple[tuple[Kind, float], ...]
    """What rank 0 told of its start, each with its end."""
    records: Sequence[Record]
    typical_s: float
    """Of a step; infinite where there is nothing to go by."""
    kept: float
    """Steps up to this one count."""
    committed: float
    """Time of its last commit."""


def _attempts(
    log: Sequence[Record], commands: Sequence[_Command], metrics: Sequence[Record]
) -> dict[int, list[_Attempt]]:
    """Those of each command, by its place."""
    said: dict[int, list[Record]] = {}
    for event in log:
        if event.get("attempt") is not None:
            said.setdefault(event["attempt"], []).append(event)
    lines: dict[int, list[Record]] = {}
    for line in metrics:
        lines.setdefault(line["attempt"], []).append(line)
    found: dict[int, list[_Attempt]] = {}
    kept = math.inf  # what later attempts leave of the earlier ones
    for place, command in reversed(list(enumerate(commands))):
        after = None
        starts = [e for e in command.events if e["event"] == "attempt_started" and e.get("attempt") is not None]
        for start in reversed(starts):
            number = start["attempt"]
            attempt = _attempt(command, start, after, said[number], lines.get(number, []), kept)
            found.setdefault(place, []).insert(0, attempt)
            kept, after = min(kept, _resumed_from(start, said[number], lines.get(number, []))), start
    return found


def _attempt(
    command: _Command, start: Record, after: Record | None, said: list[Record], lines: list[Record], kept: float
) -> _Attempt:
    """
    Args:
        after: the start of the next attempt of the command.
        said: its events.
        kept: the last step that later attempts go on from.
    """
    facts = {event["event"]: event for event in said}
    ended = facts.get("attempt_ended", {})
    outcome, committed_step = ended.get("outcome"), ended.get("committed_step")
    typical_s, last = _typical_s(lines), lines[-1]["time"] if lines else -math.inf
    over = ended.get("time") or (after["time"] if after else command.noticed)
    alive = outcome is None and after is None and command.how == "live" and command.noticed == command.end
    how: Literal["well", "failed", "live"] = "live" if alive else "well" if outcome in ENDED_WELL else "failed"
    stopped = over
    if how == "failed":
        told = [at for at in (ended.get("failed_at"), _fault_at(command, start, over)) if at and at >= last - typical_s]
        silent = last + typical_s if lines else over if ended else max(event["time"] for event in said)
        cut_short = not ended and command.how == "ended" and after is None
        stopped = min(told, default=over if cut_short else silent)
    worker = facts.get("worker_started", {})
    phases: list[tuple[Kind, str]] = [("scheduling", "began"), ("start_up", "engine_began"), ("load", "loaded")]
    return _Attempt(
        number=start["attempt"],
        begin=start["time"],
        over=over,
        stopped=min(max(stopped, last), over),
        how=how,
        outcome=outcome or "driver_lost",
        phases=tuple((kind, worker[key]) for kind, key in phases if worker.get(key) is not None),
        records=lines,
        typical_s=typical_s,
        kept=min(kept, math.inf if committed_step is None else committed_step),
        committed=facts.get("committed", {}).get("time", -math.inf),
    )


def _resumed_from(start: Record, said: Sequence[Record], lines: Sequence[Record]) -> float:
    """Step that an attempt went on from; infinite where nothing says it."""
    told = [start.get("resume_step"), *(event.get("resumed_from") for event in said)]
    told += [line["step"] - 1 for line in lines[:1]]
    return next((step for step in told if step is not None), math.inf)


def _typical_s(lines: Sequence[Record]) -> float:
    seconds = [line["step_time_s"] for line in lines if line.get("step_time_s") is not None]
    seconds = seconds or [after["time"] - before["time"] for before, after in pairwise(lines)]
    return statistics.median(seconds) if seconds else math.inf


def _fault_at(command: _Command, start: Record, over: float) -> float | None:
    faults = [
        e["time"] for e in command.events if e["event"] == "fault_injected" and start["time"] <= e["time"] <= over
    ]
    return faults[-1] if faults else None


# --- painting ---------------------------------------------------------------------------------------------------------


class _Tape:
    """Spans, each beginning where the one before ended. What lies behind the tape's place has been decided."""

    def __init__(self, command: _Command, instead: Sequence[tuple[float, float, Kind]]) -> None:
        """
        Args:
            instead: stretches of another kind, in order, wherever they meet scheduling.
        """
        self.at = command.begin
        self.spans: list[Span] = []
        self._end = command.end
        self._instead = instead

    def to(self, until: float, kind: Kind, attempt: int | None) -> None:
        """Up to a time, if that is yet to come, is of a kind."""
        if kind == "scheduling":
            for begin, end, other in self._instead:
                self._append(min(begin, until), kind, attempt)
                self._append(min(end, until), other, attempt)
        self._append(until, kind, attempt)

    def _append(self, until: float, kind: Kind, attempt: int | None) -> None:
        until = min(until, self._end)
        if until <= self.at:
            return
        begin = self.at
        if self.spans and (self.spans[-1].kind, self.spans[-1].attempt) == (kind, attempt):
            begin = self.spans.pop().begin
        self.spans.append(Span(begin=begin, end=until, kind=kind, attempt=attempt))
        self.at = until


def _painted(command: _Command, attempts: Sequence[_Attempt], instead: Sequence[tuple[float, float, Kind]]) -> _Tape:
    tape = _Tape(command, instead)
    for attempt in attempts:
        tape.to(attempt.begin, "scheduling", attempt.number)
        _paint(tape, attempt)
    if command.how == "died":
        tape.to(command.last_sign, "scheduling", None)
        tape.to(command.noticed, "detection", None)
    tape.to(command.end, "scheduling", None)
    return tape


def _paint(tape: _Tape, attempt: _Attempt) -> None:
    number = attempt.number
    for kind, until in attempt.phases:
        tape.to(min(until, attempt.stopped), kind, number)
    _paint_steps(tape, attempt)
    if attempt.how == "well":  # what is left belongs to the next attempt
        tape.to(min(attempt.committed, attempt.over), "checkpoint", number)
        return
    stepping = bool(attempt.records or attempt.phases)
    if attempt.how == "failed":
        tape.to(attempt.stopped, "lost_work" if stepping else "start_up", number)
    else:
        last = attempt.records[-1]["time"] if attempt.records else tape.at
        tape.to(min(last + attempt.typical_s, attempt.over), "productive" if stepping else "start_up", number)
    tape.to(attempt.over, "detection", number)


def _paint_steps(tape: _Tape, attempt: _Attempt) -> None:
    if attempt.records:
        first = attempt.records[0]
        took_s = first.get("step_time_s", attempt.typical_s) + (first.get("evaluation_s") or 0.0)
        tape.to(first["time"] - took_s, "start_up", attempt.number)
    for before, line in zip([None, *attempt.records], attempt.records, strict=False):
        ends = min(line["time"], attempt.stopped)
        for kind, seconds, step in _parts(before, line):
            tape.to(min(tape.at + seconds, ends), kind if step <= attempt.kept else "lost_work", attempt.number)


def _parts(before: Record | None, line: Record) -> Iterator[tuple[Kind, float, int]]:
    """What lies between the ends of two steps, in the worker's order, each with its seconds and the step it is for:
    check and save after the one; batch, step and evaluation of the other."""
    if before is not None:
        yield "productive", line.get("check_s") or 0.0, before["step"]
        yield "checkpoint", line.get("checkpoint_s") or 0.0, before["step"]
    yield "data_wait", line.get("data_s") or 0.0, line["step"]
    yield "productive", math.inf, line["step"]


def _failure_costs(spans: Sequence[Span], attempts: Sequence[_Attempt]) -> tuple[FailureCost, ...]:
    costs: dict[int, dict[str, float]] = {}
    for span in spans:
        if span.attempt is not None:
            of_kind = costs.setdefault(span.attempt, {})
            of_kind[span.kind] = of_kind.get(span.kind, 0.0) + span.end - span.begin
    lost: dict[str, list[float]] = {}
    for attempt, after in zip_longest(attempts, attempts[1:]):
        if attempt.how == "failed":
            own, others = costs.get(attempt.number, {}), costs.get(after.number, {}) if after else {}
            seconds = sum(own.get(kind, 0.0) for kind in ("lost_work", "detection"))
            seconds += sum(others.get(kind, 0.0) for kind in _BEFORE_STEPS)
            lost.setdefault(attempt.outcome, []).append(seconds)
    made = (FailureCost(outcome=name, count=len(each), lost_s=sum(each)) for name, each in lost.items())
    return tuple(sorted(made, key=lambda cost: -cost.lost_s))
