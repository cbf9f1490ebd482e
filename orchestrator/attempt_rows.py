"""The attempts of a run: what each covered, what it did again and how long the recovery before it took.

Pure: the event log and the metric lines in, rows out. Fields that are absent there are None here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from orchestrator.goodput import ENDED_WELL
from orchestrator.planning.layout import Layout


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    number: int
    workers: int | None
    layout: str | None
    """As planned, with the precision."""
    first_step: int | None
    last_step: int | None
    outcome: str | None
    """None: no end is recorded; the attempt runs, or its driver died."""
    steps_repeated: int
    """Of its steps, those that an earlier attempt had done already."""
    recovery_s: float | None
    """Seconds from the failure before it to the end of its own first step; None where it did not follow a failure.
    The failure happened with the injected fault where one came after the last step, else when the end says, else when
    the attempt ended."""
    resize_s: float | None
    """Seconds from the last step of the attempt before it to the end of its own first; None where that did not yield
    to it."""

    @property
    def failed(self) -> bool:
        return self.outcome is not None and self.outcome not in ENDED_WELL


def attempt_rows(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[AttemptRow]:
    """One row for each attempt that the events (in the order of the log) or the metric lines name."""
    facts: dict[int, dict[str, Mapping[str, Any]]] = {}
    for event in events:
        if event.get("attempt") is not None:
            facts.setdefault(event["attempt"], {})[event["event"]] = event
    recoveries, resizes = _recoveries(events, metrics), _resizes(events, metrics)
    anew = [event["last_attempt"] for event in events if event["event"] == "started_over"]
    rows: list[AttemptRow] = []
    for number in sorted(facts.keys() | {line["attempt"] for line in metrics}):
        known = facts.get(number, {})
        plan = known.get("planned", {}).get("plan") or {}
        first, last = _steps_covered(known, [line for line in metrics if line["attempt"] == number])
        row = AttemptRow(
            number=number,
            workers=known.get("attempt_started", {}).get("workers") or _workers(plan),
            layout=_layout(plan),
            first_step=first,
            last_step=last,
            outcome=known.get("attempt_ended", {}).get("outcome"),
            steps_repeated=_overlap(
                first, last, [row for row in rows if not any(row.number <= a < number for a in anew)]
            ),
            recovery_s=recoveries.get(number),
            resize_s=resizes.get(number),
        )
        rows.append(row)
    return rows


def _workers(plan: Mapping[str, Any]) -> int | None:
    if "data_parallel" not in plan:
        return None
    return int(plan["data_parallel"] * plan.get("pipeline_stages", 1) * plan.get("tensor_parallel", 1))


def _layout(plan: Mapping[str, Any]) -> str | None:
    known = {key.name: plan[key.name] for key in fields(Layout) if key.name in plan}
    if len(known) < len(fields(Layout)):  # of a version that knew fewer
        return f"ZeRO-{plan['zero_stage']}" if "zero_stage" in plan else None
    return f"{Layout(**known)}, {plan['dtype']}"


def _steps_covered(
    known: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]
) -> tuple[int | None, int | None]:
    """First and last step of an attempt; an attempt without a first step covered none, whatever its end says."""
    steps = [line["step"] for line in lines if line.get("step") is not None]
    announced = known.get("first_step", {}).get("step")
    steps += [] if announced is None else [announced]
    if not steps:
        return None, None
    ended = known.get("attempt_ended", {}).get("last_step")
    return min(steps), max([*steps, *([] if ended is None else [ended])])


def _overlap(first: int | None, last: int | None, earlier: Sequence[AttemptRow]) -> int:
    done = [row.last_step for row in earlier if row.last_step is not None]
    if first is None or last is None or not done:
        return 0
    return max(0, min(max(done), last) - first + 1)


def _recoveries(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """{attempt: seconds without a step before its first one}.

    Attempts that fail before any step lengthen the recovery of the next. A new command (`stage_started`) ends the
    count: the time until somebody types it is not recovery. A first step happened when its metric line says; the
    driver learns of it, and writes its event, later.
    """
    first_line_at = {line["attempt"]: line["time"] for line in reversed(metrics) if line.get("time") is not None}
    last_line = {line["attempt"]: line for line in metrics if line.get("time") is not None}
    recovered: dict[int, float] = {}
    fault_at: float | None = None
    down_since: float | None = None
    for event in events:
        name, at, attempt = event["event"], event.get("time"), event.get("attempt")
        if name == "stage_started":
            fault_at = down_since = None
        elif name == "attempt_started":
            fault_at = None
        elif name == "fault_injected":
            fault_at = at
        elif name == "attempt_ended" and event.get("outcome") in (None, *ENDED_WELL):
            down_since = None
        elif name == "attempt_ended" and down_since is None:
            down_since = _failed_at(event, fault_at, last_line.get(attempt or 0))
        elif name == "first_step" and down_since is not None and at is not None and attempt is not None:
            recovered[attempt] = max(0.0, min(at, first_line_at.get(attempt, at)) - down_since)
            down_since = None
    return recovered


def _failed_at(ended: Mapping[str, Any], fault_at: float | None, last: Mapping[str, Any] | None) -> float | None:
    """
    Args:
        last: record of the attempt's last step. A fault from before that step did not end the attempt.
    """
    begun = last["time"] - (last.get("step_time_s") or 0.0) if last else -math.inf
    if fault_at is not None and fault_at >= begun:
        return fault_at
    return ended.get("failed_at") or ended.get("time")


def _resizes(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """{attempt: seconds from the last step of the one that yielded to it to its own first}."""
    times: dict[int, list[float]] = {}
    for line in metrics:
        if line.get("time") is not None:
            times.setdefault(line["attempt"], []).append(line["time"])
    yielded = {e.get("attempt") for e in events if e["event"] == "attempt_ended" and e.get("outcome") == "yielded"}
    pairs = pairwise(sorted(times))
    return {after: times[after][0] - times[before][-1] for before, after in pairs if before in yielded}
