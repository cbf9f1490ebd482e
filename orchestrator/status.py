"""Where a run is, for `terrane status` and `terrane logs`: read from its directory alone."""

from __future__ import annotations

import math
import time
from typing import Any

from orchestrator import nodes, storage
from orchestrator.attempt_rows import attempt_rows
from orchestrator.errors import UserError
from orchestrator.goodput import Ledger, in_words, ledger
from orchestrator.report_content import duration, words
from orchestrator.runs import RunDir
from orchestrator.train.checkpoints import committed_steps


def summarize(run: RunDir) -> dict[str, Any]:
    """The state of a run as plain values."""
    events, lines = run.events(), run.metric_lines()
    recipe = run.recipe()
    curve = [line for _, line in sorted(run.loss_curve().items())]
    last = max(curve, key=lambda line: line["time"], default=None)
    states = {
        "stage_started": "begun",
        "stage_finished": "done",
        "stage_stopped": "stopped",
        "stage_failed": "failed",
    }
    begun = max((n for n, event in enumerate(events) if event["event"] == "started_over"), default=0)
    stages = {event["stage"]: states[event["event"]] for event in events[begun:] if event["event"] in states}
    failures = [event["message"] for event in events if event["event"] == "stage_failed"]
    evaluations = [name for name in storage.list_files(run.path("evaluation")) if name.endswith(".json")]
    return {
        "run": run.uri,
        "stages": stages,
        "failure": failures[-1] if failures and "failed" in stages.values() else None,
        "waiting": _waiting(events),
        "step": last["step"] if last else 0,
        "steps": recipe.train.steps,
        "loss": last["loss"] if last else None,
        "held_out_loss": next((line["held_out_loss"] for line in reversed(curve) if "held_out_loss" in line), None),
        "tokens_per_second": last["tokens_per_second"] if last else None,
        "checkpoints": committed_steps(run.checkpoints),
        "lost_shards": [shard["name"] for shard in run.read_json(run.lost_shards) or []],
        "spikes": [event for event in events[begun:] if event["event"] == "spike"],
        "rollbacks": [event for event in events[begun:] if event["event"] == "rolled_back"],
        "quarantined_nodes": nodes.read(run),
        "attempts": [vars(row) for row in attempt_rows(events, lines)],
        "goodput": _goodput(ledger(events, lines, time.time())),
        "evaluation": run.read_json(run.path("evaluation", evaluations[-1])) if evaluations else None,
        "last_event": events[-1] if events else None,
    }


def _waiting(events: list[dict[str, Any]]) -> str | None:
    """What capacity the run waits for, if it does."""
    ends = ("waited", "stage_finished", "stage_stopped", "stage_failed", "driver_started")
    last = next((event for event in reversed(events) if event["event"] in ("waiting", *ends)), None)
    return last["missing"] if last and last["event"] == "waiting" else None


def _goodput(found: Ledger) -> dict[str, Any]:
    """As plain values."""
    return {
        "goodput": found.goodput,
        "wall_s": found.wall_s,
        "tokens": found.tokens,
        "tokens_per_second": found.tokens_per_second,
        "seconds": found.seconds,
        "failures": [{**vars(cost), "mean_s": cost.mean_s} for cost in found.failures],
    }


def finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for: a loss that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    out = [summary["run"]]
    stages = ", ".join(f"{name} {state}" for name, state in summary["stages"].items())
    out.append(f"  stages       {stages or 'none begun'}")
    if summary["failure"]:
        out.append(f"  failed       {summary['failure']}")
    if summary["waiting"]:
        out.append(f"  waiting      for capacity: {summary['waiting']}")
    if summary["step"]:
        held_out = f" ({summary['held_out_loss']:.4f} held out)" if summary["held_out_loss"] else ""
        speed = f"loss {summary['loss']:.4f}{held_out}, {summary['tokens_per_second']:.0f} tokens/s"
        out.append(f"  step         {summary['step']} of {summary['steps']}, {speed}")
    for row in summary["attempts"]:
        repeated = f", {row['steps_repeated']} steps repeated" if row["steps_repeated"] else ""
        recovered = f", recovered in {row['recovery_s']:.1f} s" if row["recovery_s"] else ""
        recovered += f", resized in {row['resize_s']:.1f} s" if row["resize_s"] else ""
        steps = f"steps {row['first_step']}-{row['last_step']}" if row["last_step"] is not None else "no step yet"
        state = row["outcome"] or "no end recorded"
        how = f"{row['workers']} workers ({row['layout']})" if row["layout"] else f"{row['workers']} workers"
        out.append(f"  attempt {row['number']:<4} {how}, {steps}, {state}{repeated}{recovered}")
    out += _goodput_lines(summary["goodput"])
    for spike in summary["spikes"]:
        suspected = f", suspected {', '.join(spike['documents'])}" if spike["documents"] else ""
        scores = f"z {spike['loss_z']:.1f}, of the gradient norm {spike['norm_z']:.1f}"
        out.append(
            f"  loss spike   step {spike['step']}, loss {spike['loss']:.4f} ({scores}), {spike['action']}{suspected}"
        )
    for back in summary["rollbacks"]:
        without = f", without {', '.join(back['quarantined'])}" if back["quarantined"] else ""
        passed = f"steps {back['first']}-{back['last']} passed over"
        out.append(f"  rolled back  from step {back['step']} to step {back['back_to']}, {passed}{without}")
    if summary["lost_shards"]:
        out.append(f"  goes on without  {', '.join(summary['lost_shards'])}")
    for node in summary["quarantined_nodes"]:
        out.append(f"  node         {nodes.in_words(node)}")
    if summary["checkpoints"]:
        out.append(f"  checkpoints  {', '.join(map(str, summary['checkpoints']))}")
    if evaluation := summary["evaluation"]:
        before, after = evaluation["base"]["perplexity"], evaluation["model"]["perplexity"]
        out.append(f"  perplexity   {before:.1f} before, {after:.1f} after")
    return "\n".join(out)


def _goodput_lines(goodput: dict[str, Any]) -> list[str]:
    """Nothing of a run that has not begun to train."""
    wall_s = goodput["wall_s"]
    if not wall_s:
        return []
    rate = f"{goodput['tokens_per_second']:.0f} tokens a second of it"
    lines = [f"  goodput      {goodput['goodput'] * 100:.1f} % of {duration(wall_s)}, {rate}"]
    for kind, seconds in goodput["seconds"].items():
        lines.append(f"    {in_words(kind):<21} {duration(seconds):>12} {seconds / wall_s * 100:6.1f} %")
    for cost in goodput["failures"]:
        lost = f"{duration(cost['lost_s'])} lost, {duration(cost['mean_s'])} each"
        lines.append(f"  failures     {cost['count']} x {words(cost['outcome'])}: {lost}")
    return lines


def worker_logs(run: RunDir, attempt: int | None, rank: int | None) -> dict[str, str]:
    """Log file name -> text, of one attempt: without a number the last that has any.

    Raises:
        UserError: there is no such attempt or rank.
    """
    attempts = run.attempts()
    if not attempts:
        raise UserError(f"{run.uri} has no attempt yet", "terrane run begins one")
    if attempt not in (None, *attempts):
        raise UserError(f"{run.uri} has no attempt {attempt}", f"it has {', '.join(map(str, attempts))}")
    chosen = reversed(attempts) if attempt is None else [attempt]
    number, names = next(((n, names) for n in chosen if (names := _log_names(run, n, rank))), (0, []))
    if not names:
        whose = run.uri if attempt is None else f"attempt {attempt} of {run.uri}"
        raise UserError(f"{whose} has no log{'' if rank is None else f' of rank {rank}'}")
    folder = run.attempt_logs(number)
    return {
        f"attempt {number} {name}": storage.read(storage.join(folder, name)).decode(errors="replace") for name in names
    }


def _log_names(run: RunDir, attempt: int, rank: int | None) -> list[str]:
    names = storage.list_files(run.attempt_logs(attempt))
    return [name for name in names if rank is None or name == f"rank-{rank}.log"]
