"""What became of each fault, from the log of the run and its metrics. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.fault_config import BaseFault

Facts = Sequence[Mapping[str, Any]]


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


def score(faults: Sequence[BaseFault], events: Facts, metrics: Facts) -> list[Row]:
    """A row for each fault of a recipe, in the order of their steps.

    What happens between a fault and the next one counts as its consequence.
    """
    struck = sorted((e["time"], e["name"]) for e in events if e["event"] == "fault_injected" and "name" in e)
    ends = [*(at for at, _ in struck[1:]), math.inf]
    windows = {name: (at, end) for (at, name), end in zip(struck, ends, strict=False)}
    return [_row(fault, windows.get(fault.name), events, metrics) for fault in sorted(faults, key=lambda f: f.step)]


def _row(fault: BaseFault, window: tuple[float, float] | None, events: Facts, metrics: Facts) -> Row:
    outcome, recovery_s = _consequence(*window, events, metrics) if window else ("did not strike", None)
    return Row(fault=str(fault), step=fault.step, struck=window is not None, outcome=outcome, recovery_s=recovery_s)


def _consequence(at: float, until: float, events: Facts, metrics: Facts) -> tuple[str, float | None]:
    """The outcome and the recovery of the fault that struck at a time and was alone until another."""
    within = [event for event in events if at <= event["time"] < until]
    started = [event["time"] for event in within if event["event"] == "attempt_started"]
    ended = [
        event["outcome"]
        for event in within
        if event["event"] == "attempt_ended" and (not started or event["time"] <= started[0])
    ]
    interrupted = started or (ended and ended[0] != "finished")
    outcome = "went on" if not interrupted else ended[0] if ended else "driver lost"
    new = next_new_step(started[0] if started else at, metrics) if started or not interrupted else None
    return outcome, None if new is None else new - at


def next_new_step(at: float, metrics: Facts) -> float | None:
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
