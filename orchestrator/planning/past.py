"""What earlier attempts of a run teach the planner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MARGIN = 0.9
"""Of what a plan that ran out of memory was predicted to take: the next takes a tenth less, so that tries are few."""
_IN_ORDER = ("finished", "yielded", "stopped")
"""Ends of attempts that say nothing against their layout."""


@dataclass(frozen=True, kw_only=True)
class Past:
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """By accelerator: the share of a worker's memory that a plan may be predicted to take. A share, since predictions
    err by a factor, which holds for devices of another size, too."""
    workers: int = 0
    """The most that the run has had: what fits on so many lacks devices now, not memory."""
    cut: tuple[int, int] | None = None
    """Tensor and pipeline parallelism of the newest plan."""
    tried: Mapping[str, float] = field(default_factory=dict)
    """Seconds that a step has taken by layouts that were on trial; infinite where the trial came to nothing."""

    def after_trial(self, layout: str, step_s: float) -> Past:
        return replace(self, tried={**self.tried, layout: step_s})


NOTHING = Past()


def learned(events: Iterable[Mapping[str, Any]]) -> Past:
    """
    Args:
        events: of a run, those of earlier drivers included.
    """
    known = list(events)
    plans = {event["attempt"]: event["plan"] for event in known if event["event"] == "planned"}
    newest = next(reversed(plans.values()), None)
    return Past(
        ceilings=_ceilings(known, plans),
        workers=max(map(_workers, plans.values()), default=0),
        cut=_cut(newest) if newest else None,
        tried=_tried(known),
    )


def _ceilings(events: Iterable[Mapping[str, Any]], plans: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in events:
        if event["event"] == "attempt_ended" and event["outcome"] == "out_of_memory":
            failed = plans.get(event["attempt"], {})
            if failed.get("available_bytes"):
                share = MARGIN * failed["memory_bytes"] / failed["available_bytes"]
                found[failed["accelerator"]] = min(share, found.get(failed["accelerator"], share))
    return found


def _tried(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What has failed once on trial is not tried again."""
    found: dict[str, float] = {}
    on_trial: dict[int, str] = {}
    for event in events:
        if event["event"] == "planned":
            on_trial[event["attempt"]] = event.get("trial", "")
        elif event["event"] == "tried":
            found[event["layout"]] = event["step_s"]
        elif event["event"] == "attempt_ended" and event["outcome"] not in _IN_ORDER:
            found.setdefault(on_trial.get(event["attempt"], ""), math.inf)
    found.pop("", None)
    return found


def load_s(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that the newest attempt's workers took from their job to their state; 0 before there was one."""
    started = [event for event in events if event["event"] == "worker_started"]
    return float(started[-1]["loaded"] - started[-1]["began"]) if started else 0.0


def _workers(plan: Mapping[str, Any]) -> int:
    return int(plan["data_parallel"] * math.prod(_cut(plan)))


def _cut(plan: Mapping[str, Any]) -> tuple[int, int]:
    return plan.get("tensor_parallel", 1), plan.get("pipeline_stages", 1)
