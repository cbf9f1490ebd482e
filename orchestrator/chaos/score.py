"""What became of each fault, from the log of the run and its metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.fault_config import BaseFault


@dataclass(frozen=True, kw_only=True)
class Row:
    fault: str
    step: int
    """At which it was to strike."""
    struck: bool
    outcome: str
    """Of the attempt that ended with it; `went on` where none did."""
    recovery_s: float | None
    """From the fault to the end of the next new step: one that no attempt had done. None where none followed."""


def score(
    faults: Sequence[BaseFault], events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> list[Row]:
    """A row for each fault of a recipe, in the order of their steps."""
    return [_row(fault, events, metrics) for fault in sorted(faults, key=lambda fault: fault.step)]


def _row(fault: BaseFault, events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Row:
    at = next((event["time"] for event in events if _is(event, fault)), None)
    if at is None:
        return Row(fault=str(fault), step=fault.step, struck=False, outcome="did not strike", recovery_s=None)
    recovered = _next_new_step(at, metrics)
    ended = [
        event["outcome"]
        for event in events
        if event["event"] == "attempt_ended"
        and at <= event["time"]
        and (recovered is None or event["time"] <= recovered)
    ]
    return Row(
        fault=str(fault),
        step=fault.step,
        struck=True,
        outcome=ended[0] if ended else "went on",
        recovery_s=None if recovered is None else recovered - at,
    )


def _is(event: Mapping[str, Any], fault: BaseFault) -> bool:
    return event["event"] == "fault_injected" and event.get("name") == fault.name


def _next_new_step(at: float, metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """When the first step ended, after a time, that had not been done before it."""
    steps = [line for line in metrics if line.get("step") is not None]
    done = max((line["step"] for line in steps if line["time"] <= at), default=0)
    return min((line["time"] for line in steps if line["time"] > at and line["step"] > done), default=None)


def table(rows: Sequence[Row]) -> str:
    """For a person."""
    lines = [f"{'fault':32} {'step':>5}  {'outcome':16} {'recovery':>9}"]
    for row in rows:
        recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
        lines.append(f"{row.fault:32} {row.step:5}  {row.outcome:16} {recovery:>9}")
    return "\n".join(lines)
