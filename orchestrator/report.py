"""A run directory -> report.html and report.md. Reads what is there and says what is missing.

The run becomes sections (paragraphs, facts, tables, plots) once; pages.py renders them.
"""

from __future__ import annotations

import statistics
from typing import Any

from orchestrator import pages, storage
from orchestrator.config import flatten
from orchestrator.goodput import in_words
from orchestrator.pages import Block, Cell, Facts, Row, Section, Table, as_text
from orchestrator.report_content import Content, Json, duration, load, words
from orchestrator.report_plots import INK, attempt_bars, draw_goodput, draw_steps, draw_timeline, plot, stage_bars
from orchestrator.runs import RunDir


def write_report(run: RunDir) -> str:
    """Write report.html and report.md of a run, however far it got; returns the URI of report.html."""
    content = load(run)
    parts = (_recipe, _timeline, _loss, _throughput, _attempts, _goodput, _perplexity, _answers, _corpus, _wall_time)
    sections = [part(content) for part in parts]
    for uri, render in ((run.report_markdown, pages.markdown), (run.report_html, pages.to_html)):
        page = render(run.name, _outcome(content), sections)
        storage.write(uri, page.encode("utf-8", "replace"))  # a model can emit lone surrogates, which UTF-8 cannot hold
    return run.report_html


# --- sections ---------------------------------------------------------------------------------------------------------


def _outcome(content: Content) -> str:
    """The run in one line."""
    if not content.attempts:
        return "Training has not begun."
    ended = content.attempts[-1].outcome
    state = "Training finished" if ended == "finished" else "Training is not finished"
    state += f" ({words(ended)})" if ended not in (None, "finished") else ""
    parts = [f"{state}: {len(content.counted)} of {as_text(content.recipe.get('train.steps'))} steps"]
    losses = _numbers(content.counted, "loss")
    if losses:
        parts.append(f"loss {as_text(losses[0])} → {as_text(losses[-1])}")
    survived = sum(row.failed for row in content.attempts[:-1])
    if survived:
        repeated = sum(row.steps_repeated for row in content.attempts)
        parts.append(f"failures survived: {survived}, steps repeated: {repeated}")
    if content.goodput.wall_s:
        parts.append(f"goodput {content.goodput.goodput * 100:.1f} %")
    if content.evaluations:
        before, after = _perplexities(content.evaluations[-1])
        parts.append(f"held-out perplexity {as_text(before)} → {as_text(after)}")
    return "; ".join(parts) + "."


def _recipe(content: Content) -> Section:
    if not content.recipe:
        return "Recipe", ["No resolved recipe in this run."]
    plan = next(reversed(content.plans.values()), {})
    get = content.recipe.get
    facts: Facts = {
        "model": get("model.path") or f"{as_text(get('model.preset') or get('model.architecture'))}, random weights",
        **_shape(content),
        "parameters": plan.get("parameters"),
        "corpus tokens": flatten(content.manifest).get("splits.train.tokens"),
        **{words(key): get(f"train.{key}") for key in ("steps", "global_batch_size", "sequence_length")},
        **_exceptions(content),
        "learning rate": _rates(content),
        "dtype": plan.get("dtype") or get("train.dtype"),
        "workers": _range(get("train.workers.min"), get("train.workers.max")),
    }
    versions = ", ".join(f"{name} {version}" for name, version in content.versions.items())
    return "Recipe", [facts, f"Versions: {versions or 'not recorded'}."]


def _rates(content: Content) -> str:
    get = content.recipe.get
    parts = [as_text(get("train.lr")), as_text(get("train.schedule"))]
    for name, unit in (("warmup", "steps"), ("warmup", "tokens"), ("decay", "steps"), ("decay", "tokens")):
        if length := get(f"train.{name}_{unit}"):
            parts.append(f"{name} {as_text(length)} {unit}")
    return ", ".join(parts)


def _exceptions(content: Content) -> Facts:
    """What training did otherwise than every sample in turn at one batch size."""
    get = content.recipe.get
    found = {
        "batch ramp": ", ".join(f"{s['sequences']} for {s['steps']} steps" for s in get("train.batch_ramp") or []),
        "steps passed over": ", ".join(f"{first} to {last}" for first, last in get("train.skip_steps") or []),
        "documents quarantined": ", ".join(get("train.quarantine") or []),
        "shards lost": ", ".join(shard["name"] for shard in content.lost_shards),
    }
    return {name: text for name, text in found.items() if text}


def _shape(content: Content) -> Facts:
    """Of a model made here; a given one and a preset say their own."""
    layers, hidden = (content.recipe.get(f"model.{key}") for key in ("layers", "hidden_size"))
    if content.recipe.get("model.path") or content.recipe.get("model.preset"):
        return {}
    return {"layers × hidden size": f"{as_text(layers)} × {as_text(hidden)}"}


def _range(least: Cell, most: Cell) -> str:
    if most is None:
        return f"{as_text(least)} or more"
    return as_text(least) if least == most else f"{as_text(least)} to {as_text(most)}"


def _corpus(content: Content) -> Section:
    manifest, columns = content.manifest, ("kept", "characters", "tokens")
    if not manifest:
        return "Corpus", ["No corpus yet."]
    documents: Json = manifest.get("documents") or {}
    dropped: dict[str, int] = documents.get("dropped") or {}
    fates: Json = {"in": documents.get("read"), "kept": documents.get("kept")}
    fates |= {f"dropped: {words(reason)}": count for reason, count in dropped.items()}
    missing = (documents.get("read") or 0) - (documents.get("kept") or 0) - sum(dropped.values())
    note = f"Unaccounted for: {as_text(missing)} documents." if missing else "Documents in = kept + dropped."
    sources: list[Row] = [(k, *map(v.get, columns)) for k, v in (manifest.get("sources") or {}).items()]
    splits: list[Row] = [
        (words(name), split.get("sequences"), split.get("tokens"), len(split.get("shards") or []))
        for name, split in (manifest.get("splits") or {}).items()
    ]
    blocks: list[Block] = [
        Table("lr", ("documents", "count"), list(fates.items())),
        note,
        Table("lrrr", ("source", *columns), sources),
        Table("lrrr", ("split", "sequences", "tokens", "shards"), splits),
        {words(key): manifest.get(key) for key in ("vocab_size", "sequence_length", "tail_tokens_dropped")},
        f"Manifest hash: {as_text(manifest.get('hash'))}.",
    ]
    return "Corpus", blocks


def _loss(content: Content) -> Section:
    if not content.metrics:
        return "Loss", ["No training step yet."]

    def draw(left: Any, right: Any) -> None:
        draw_steps(left, content, "grad_norm", "gradient norm")
        draw_steps(right, content, "lr", "learning rate")

    def draw_losses(axes: Any) -> None:
        draw_steps(axes, content, "loss", "loss", named=True)
        held_out = [line for line in content.counted if line.get("held_out_loss") is not None]
        if held_out:
            values = [line["held_out_loss"] for line in held_out]
            axes.plot(
                [line["step"] for line in held_out], values, color=INK, marker="o", markersize=3, label="held out"
            )
            axes.legend(loc="upper right")

    caption = "Training loss. A wide pale line marks steps that a failure took and that were done again."
    blocks: list[Block] = [plot("loss", caption, 3.4, draw_losses)]
    blocks.append(plot("norm", "Gradient norm and learning rate.", 2.1, draw, columns=2))
    return "Loss", [*blocks, *_spikes(content)]


def _spikes(content: Content) -> list[Block]:
    """A table of the loss spikes, and of where the run went back to."""
    back = {event.get("attempt"): event for event in content.events if event["event"] == "rolled_back"}
    rows: list[Row] = []
    for event in content.events:
        if event["event"] == "spike":
            numbers = map(event.get, ("step", "attempt", "loss", "loss_z", "grad_norm", "norm_z"))
            left_out = event.get("quarantined") or []
            documents = (f"{d} (left out)" if d in left_out else d for d in event.get("documents") or [])
            action = event.get("action")
            if action == "rollback" and (gone := back.get(event.get("attempt"))):
                action = f"back to step {gone.get('back_to')}; passed over: {gone.get('first')} to {gone.get('last')}"
            rows.append((*numbers, action, _clip(", ".join(documents))))
    headers = ("spike at step", "attempt", "loss", "its z-score", "gradient norm", "its z-score", "action", "suspected")
    return [Table("rrrrrrll", headers, rows)] if rows else []


def _throughput(content: Content) -> Section:
    rates = _numbers(content.counted, "tokens_per_second")
    if not rates:
        return "Throughput", ["No throughput recorded yet."]
    median = statistics.median(rates)

    def draw(axes: Any) -> None:
        draw_steps(axes, content, "tokens_per_second", "tokens/s")
        axes.axhline(median, color=INK, linewidth=0.8, alpha=0.6)
        axes.set_ylim(bottom=0)

    times = {key: _numbers(content.counted, f"{key}_s") for key in ("step_time", "data", "compute")}
    facts: Facts = {"tokens/s, median": median}
    facts |= {f"{words(key)}, median": duration(statistics.median(values)) for key, values in times.items() if values}
    commits = [event for event in content.events if event["event"] == "committed"]
    stood_s = sum(_numbers(commits, "waited_s")) + sum(_numbers(commits, "copied_s"))
    facts["stood still for checkpoints, in all"] = duration(stood_s)
    return "Throughput", [plot("rate", "Tokens a second by step; the level line is the median.", 2.1, draw), facts]


def _attempts(content: Content) -> Section:
    if not content.attempts:
        return "Attempts", ["No attempt yet."]
    rows: list[Row] = []
    reasons: list[Row] = []
    for row in content.attempts:
        said = {event["event"]: event for event in content.events if event.get("attempt") == row.number}
        planned, ended, decided = (said.get(name, {}) for name in ("planned", "attempt_ended", "decided"))
        plan = content.plans.get(row.number) or planned.get("plan") or {}
        batch = f"{as_text(plan.get('micro_batch_size'))} × {as_text(plan.get('accumulation'))}"
        steps = None if row.first_step is None else f"{as_text(row.first_step)}–{as_text(row.last_step)}"
        outcome, recovery = words(row.outcome or "no end recorded"), duration(row.recovery_s)
        rows.append((row.number, row.workers, row.layout, batch, steps, outcome, recovery, row.steps_repeated))
        decision = f"{words(decided['action'])}: {decided.get('reason')}" if decided.get("action") else None
        texts = (planned.get("reason") or plan.get("reason"), ended.get("message"), decision)
        reasons.append((row.number, *map(_clip, texts)))
    headers = ("#", "workers", "layout", "micro-batch × acc.", "steps", "ended", "recovery", "repeated")
    note = "Recovery runs from the failure before an attempt to its first step."
    why = Table("rlll", ("#", "planned", "ended with", "decided"), reasons)
    return "Attempts", [Table("rrlrrlrr", headers, rows), note, why]


def _goodput(content: Content) -> Section:
    found = content.goodput
    if not found.wall_s:
        return "Goodput", ["Training has not begun."]
    parts = found.seconds.items()
    rows: list[Row] = [(in_words(kind), duration(s), f"{s / found.wall_s * 100:.1f} %") for kind, s in parts]
    costs: list[Row] = [
        (words(cost.outcome), cost.count, duration(cost.lost_s), duration(cost.mean_s)) for cost in found.failures
    ]
    caption = "What the wall time of training went into; time between two commands is left out."
    facts: Facts = {"wall time of training": duration(found.wall_s), "tokens a second of it": found.tokens_per_second}
    blocks: list[Block] = [plot("goodput", caption, 2.1, lambda axes: draw_goodput(axes, found.spans)), facts]
    blocks.append(Table("lrr", ("went into", "time", "share"), rows))
    if costs:
        blocks.append(Table("lrrr", ("failure", "count", "time lost", "each"), costs))
    return "Goodput", blocks


def _perplexity(content: Content) -> Section:
    title = "Perplexity on held-out documents"
    if not content.evaluations:
        return title, ["Not evaluated yet."]
    rows: list[Row] = []
    for evaluation in content.evaluations:
        before, after = _perplexities(evaluation)
        change = f"{(after / before - 1) * 100:+.1f} %" if before and after else None
        rows.append((*map(evaluation.get, ("step", "sequences", "tokens")), before, after, change))
    return title, [Table("rrrrrr", ("step", "sequences", "tokens", "before", "after", "change"), rows)]


def _perplexities(evaluation: Json) -> tuple[float | None, float | None]:
    return (evaluation.get("base") or {}).get("perplexity"), (evaluation.get("model") or {}).get("perplexity")


def _answers(content: Content) -> Section:
    if not content.answers:
        return "Sample answers", ["The model has not been asked anything yet."]
    keys = ("prompt", "completion", "tokens", "seconds")
    return "Sample answers", [Table("llrr", keys, [tuple(map(answer.get, keys)) for answer in content.answers])]


def _wall_time(content: Content) -> Section:
    seconds: dict[str, float] = {}
    for bar in stage_bars(content):
        seconds[bar.label] = seconds.get(bar.label, 0.0) + bar.end - bar.start
    total = sum(seconds.values())
    if not total:
        return "Where the wall time went", ["No stage recorded yet."]
    rows: list[Row] = [
        (k, duration(v), f"{v / total * 100:.0f} %", "█" * round(24 * v / total)) for k, v in seconds.items()
    ]
    return "Where the wall time went", [Table("lrrl", ("stage", "time", "share", ""), rows)]


def _timeline(content: Content) -> Section:
    bars = sorted([*stage_bars(content), *attempt_bars(content)], key=lambda bar: bar.start)
    if not bars:
        return "Time line", ["Nothing has started yet."]
    rows = list(dict.fromkeys(bar.label for bar in bars))
    caption = "Stages and attempts; an attempt is pale until its first step. Time between two commands is left out."
    height = 0.9 + 0.27 * len(rows)
    return "Time line", [plot("time", caption, height, lambda axes: draw_timeline(axes, content, bars, rows))]


# --- words ------------------------------------------------------------------------------------------------------------


def _numbers(lines: list[Json], key: str) -> list[float]:
    return [line[key] for line in lines if line.get(key) is not None]


def _clip(text: object) -> str | None:
    return f"{str(text)[:240]}{'…' if len(str(text)) > 240 else ''}" if text else None
