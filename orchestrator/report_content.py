"""Everything that a report is made of, read from a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator import storage
from orchestrator.attempt_rows import AttemptRow, attempt_rows
from orchestrator.config import flatten
from orchestrator.goodput import Ledger, ledger
from orchestrator.runs import RunDir

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a report is made of; empty where the run has nothing yet."""

    recipe: Json  # by dotted name, as in train.lr
    versions: Json
    manifest: Json
    events: list[Json]
    metrics: list[Json]
    counted: list[Json]  # the metric lines that count, by step: where attempts overlap, the later one's
    plans: dict[int, Json]
    attempts: list[AttemptRow]
    goodput: Ledger  # up to the last sign of life of a run without an end
    evaluations: list[Json]
    answers: list[Json]
    lost_shards: list[Json]


def load(run: RunDir) -> Content:
    events = [event for event in run.events() if event.get("time") is not None]
    metrics = [line for line in run.metric_lines() if line.get("step") is not None]
    plans = {number: run.read_json(run.plan(number)) or {} for number in run.attempts()}
    claimed = [{"event": "planned", "attempt": number, "plan": plan} for number, plan in plans.items()]
    resolved = run.read_json(run.resolved) or {}
    folder = run.evaluation(0).rpartition("/")[0]
    results = [storage.join(folder, name) for name in storage.list_files(folder) if name.endswith(".json")]
    last_sign = max((record["time"] for record in [*events, *metrics] if record.get("time")), default=0.0)
    return Content(
        recipe=flatten(resolved.get("recipe") or {}),
        versions=resolved.get("versions") or {},
        manifest=run.read_json(run.corpus_manifest) or {},
        events=events,
        metrics=metrics,
        counted=[line for _, line in sorted(run.loss_curve().items())],
        plans=plans,
        attempts=attempt_rows([*claimed, *events], metrics),
        goodput=ledger(events, metrics, last_sign),
        evaluations=[run.read_json(uri) or {} for uri in results],
        answers=(run.read_json(run.answers) or {}).get("answers") or [],
        lost_shards=run.read_json(run.lost_shards) or [],
    )


def words(name: object) -> str:
    return str(name).replace("_", " ")


def duration(seconds: float | None) -> str | None:
    if seconds is None or seconds < 60:
        return None if seconds is None else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
