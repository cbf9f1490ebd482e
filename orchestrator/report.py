"""A run directory -> report.html and report.md. Reads what is there and says what is missing.

The run becomes sections (paragraphs, facts, tables, plots) once; pages.py renders them.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator import pages, storage
from orchestrator.config import flatten
from orchestrator.goodput import AttemptRow, attempt_rows
from orchestrator.pages import Block, Cell, Facts, Plot, Row, Section, Table, as_text
from orchestrator.runs import RunDir

Json = dict[str, Any]


class Bar(NamedTuple):
    """A stretch of wall time, in unix seconds; `ready` is when its useful part began."""

    label: str
    start: float
    ready: float
    end: float


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
    evaluations: list[Json]
    answers: list[Json]
    lost_shards: list[Json]


def write_report(run: RunDir) -> str:
    """Write report.html and report.md of a run, however far it got; returns the URI of report.html."""
    content = _load(run)
    parts = (_recipe, _timeline, _loss, _throughput, _attempts, _perplexity, _answers, _corpus, _wall_time)
    sections = [part(content) for part in parts]
    for uri, render in ((run.report_markdown, pages.markdown), (run.report_html, pages.to_html)):
        page = render(run.name, _outcome(content), sections)
        storage.write(uri, page.encode("utf-8", "replace"))  # a model can emit lone surrogates, which UTF-8 cannot hold
    return run.report_html


def _load(run: RunDir) -> Content:
    events = [event for event in run.events() if event.get("time") is not None]
    metrics = [line for line in run.metric_lines() if line.get("step") is not None]
    plans = {number: run.read_json(run.plan(number)) or {} for number in run.attempts()}
    claimed = [{"event": "planned", "attempt": number, "plan": plan} for number, plan in plans.items()]
    resolved = run.read_json(run.resolved) or {}
    folder = run.evaluation(0).rpartition("/")[0]
    results = [storage.join(folder, name) for name in storage.list_files(folder) if name.endswith(".json")]
    return Content(
        recipe=flatten(resolved.get("recipe") or {}),
        versions=resolved.get("versions") or {},
        manifest=run.read_json(run.corpus_manifest) or {},
        events=events,
        metrics=metrics,
        counted=[line for _, line in sorted(run.loss_curve().items())],
        plans=plans,
        attempts=attempt_rows([*claimed, *events], metrics),
        evaluations=[run.read_json(uri) or {} for uri in results],
        answers=(run.read_json(run.answers) or {}).get("answers") or [],
        lost_shards=run.read_json(run.lost_shards) or [],
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _outcome(content: Content) -> str:
    """The run in one line."""
    if not content.attempts:
        return "Training has not begun."
    ended = content.attempts[-1].outcome
    state = "Training finished" if ended == "finished" else "Training is not finished"
    state += f" ({_words(ended)})" if ended not in (None, "finished") else ""
    parts = [f"{state}: {len(content.counted)} of {as_text(content.recipe.get('train.steps'))} steps"]
    losses = _numbers(content.counted, "loss")
    if losses:
        parts.append(f"loss {as_text(losses[0])} → {as_text(losses[-1])}")
    survived = sum(row.failed for row in content.attempts[:-1])
    if survived:
        repeated = sum(row.steps_repeated for row in content.attempts)
        parts.append(f"failures survived: {survived}, steps repeated: {repeated}")
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
        **{_words(key): get(f"train.{key}") for key in ("steps", "global_batch_size", "sequence_length")},
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
    return as_text(least) if least == most else f"{as_text(least)} to {as_text(most)}"


def _corpus(content: Content) -> Section:
    manifest, columns = content.manifest, ("kept", "characters", "tokens")
    if not manifest:
        return "Corpus", ["No corpus yet."]
    documents: Json = manifest.get("documents") or {}
    dropped: dict[str, int] = documents.get("dropped") or {}
    fates: Json = {"in": documents.get("read"), "kept": documents.get("kept")}
    fates |= {f"dropped: {_words(reason)}": count for reason, count in dropped.items()}
    missing = (documents.get("read") or 0) - (documents.get("kept") or 0) - sum(dropped.values())
    note = f"Unaccounted for: {as_text(missing)} documents." if missing else "Documents in = kept + dropped."
    sources: list[Row] = [(k, *map(v.get, columns)) for k, v in (manifest.get("sources") or {}).items()]
    splits: list[Row] = [
        (_words(name), split.get("sequences"), split.get("tokens"), len(split.get("shards") or []))
        for name, split in (manifest.get("splits") or {}).items()
    ]
    blocks: list[Block] = [
        Table("lr", ("documents", "count"), list(fates.items())),
        note,
        Table("lrrr", ("source", *columns), sources),
        Table("lrrr", ("split", "sequences", "tokens", "shards"), splits),
        {_words(key): manifest.get(key) for key in ("vocab_size", "sequence_length", "tail_tokens_dropped")},
        f"Manifest hash: {as_text(manifest.get('hash'))}.",
    ]
    return "Corpus", blocks


def _loss(content: Content) -> Section:
    if not content.metrics:
        return "Loss", ["No training step yet."]

    def draw(left: Any, right: Any) -> None:
        _draw_steps(left, content, "grad_norm", "gradient norm")
        _draw_steps(right, content, "lr", "learning rate")

    def draw_losses(axes: Any) -> None:
        _draw_steps(axes, content, "loss", "loss", named=True)
        held_out = [line for line in content.counted if line.get("held_out_loss") is not None]
        if held_out:
            values = [line["held_out_loss"] for line in held_out]
            axes.plot(
                [line["step"] for line in held_out], values, color=_INK, marker="o", markersize=3, label="held out"
            )
            axes.legend(loc="upper right")

    caption = "Training loss. A wide pale line marks steps that a failure took and that were done again."
    blocks: list[Block] = [_plot("loss", caption, 3.4, draw_losses)]
    blocks.append(_plot("norm", "Gradient norm and learning rate.", 2.1, draw, columns=2))
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
        _draw_steps(axes, content, "tokens_per_second", "tokens/s")
        axes.axhline(median, color=_INK, linewidth=0.8, alpha=0.6)
        axes.set_ylim(bottom=0)

    times = {key: _numbers(content.counted, f"{key}_s") for key in ("step_time", "data", "compute")}
    facts: Facts = {"tokens/s, median": median}
    facts |= {f"{_words(key)}, median": _duration(statistics.median(values)) for key, values in times.items() if values}
    commits = [event for event in content.events if event["event"] == "committed"]
    stood_s = sum(_numbers(commits, "waited_s")) + sum(_numbers(commits, "copied_s"))
    facts["stood still for checkpoints, in all"] = _duration(stood_s)
    return "Throughput", [_plot("rate", "Tokens a second by step; the level line is the median.", 2.1, draw), facts]


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
        outcome, recovery = _words(row.outcome or "no end recorded"), _duration(row.recovery_s)
        rows.append((row.number, row.workers, row.layout, batch, steps, outcome, recovery, row.steps_repeated))
        decision = f"{_words(decided['action'])}: {decided.get('reason')}" if decided.get("action") else None
        texts = (planned.get("reason") or plan.get("reason"), ended.get("message"), decision)
        reasons.append((row.number, *map(_clip, texts)))
    headers = ("#", "workers", "layout", "micro-batch × acc.", "steps", "ended", "recovery", "repeated")
    note = "Recovery runs from the failure before an attempt to its first step."
    why = Table("rlll", ("#", "planned", "ended with", "decided"), reasons)
    return "Attempts", [Table("rrlrrlrr", headers, rows), note, why]


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
    for bar in _stage_bars(content):
        seconds[bar.label] = seconds.get(bar.label, 0.0) + bar.end - bar.start
    total = sum(seconds.values())
    if not total:
        return "Where the wall time went", ["No stage recorded yet."]
    rows: list[Row] = [
        (k, _duration(v), f"{v / total * 100:.0f} %", "█" * round(24 * v / total)) for k, v in seconds.items()
    ]
    return "Where the wall time went", [Table("lrrl", ("stage", "time", "share", ""), rows)]


def _timeline(content: Content) -> Section:
    bars = sorted([*_stage_bars(content), *_attempt_bars(content)], key=lambda bar: bar.start)
    if not bars:
        return "Time line", ["Nothing has started yet."]
    rows = list(dict.fromkeys(bar.label for bar in bars))
    caption = "Stages and attempts; an attempt is pale until its first step. Time between two commands is left out."
    height = 0.9 + 0.27 * len(rows)
    return "Time line", [_plot("time", caption, height, lambda axes: _draw_timeline(axes, content, bars, rows))]


# --- time -------------------------------------------------------------------------------------------------------------


def _stage_bars(content: Content) -> list[Bar]:
    """What each stage took, skipped ones left out. A stage without an end ends with the last sign of life before the
    next command, or of all."""
    signs = [record["time"] for record in [*content.events, *content.metrics] if record.get("time")]
    bars: list[Bar] = []
    opened: Json | None = None
    for event in [*content.events, {"event": "stage_started", "time": math.inf}]:
        if event["event"] not in ("stage_started", "stage_finished"):
            continue
        if opened:
            stage, begun = str(opened.get("stage")), opened["time"]
            finished = event["event"] == "stage_finished" and event.get("stage") == opened.get("stage")
            end = event["time"] if finished else max((at for at in signs if at < event["time"]), default=begun)
            if end > begun and not (finished and event.get("skipped")):
                bars.append(Bar(stage, begun, begun, end))
        opened = event if event["event"] == "stage_started" else None
    return bars


def _attempt_bars(content: Content) -> list[Bar]:
    bars: list[Bar] = []
    for row in content.attempts:
        steps = [line["time"] for line in content.metrics if line["attempt"] == row.number and line.get("time")]
        events = [event for event in content.events if event.get("attempt") == row.number]
        times = steps + [event["time"] for event in events if event["event"] != "decided"]
        ready = steps + [event["time"] for event in events if event["event"] == "first_step"]
        if times:
            bars.append(Bar(f"attempt {row.number}", min(times), min(ready, default=max(times)), max(times)))
    return bars


def _clock(bars: list[Bar]) -> Callable[[float], float]:
    """Unix time -> seconds of work since the run began: the hours between two commands take no room.

    Args:
        bars: sorted by their start.
    """
    merged: list[tuple[float, float]] = []
    for bar in bars:
        if merged and bar.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(bar.end, merged[-1][1]))
        else:
            merged.append((bar.start, bar.end))
    return lambda at: sum(min(at, end) - start for start, end in merged if start < at)


# --- plots ------------------------------------------------------------------------------------------------------------

_INK = "#010203"  # stands for the page's text colour
_RED = "#d9483b"
_COLOURS = ("#3d7fc1", "#e08b2d", "#3a9c77", "#9a6cc4", "#b3912f", "#48a2b6", "#c26a9b")
# Event: offset from the middle of its attempt's bar, marker, colour.
_MARKS = {
    "committed": (0.0, "|", _INK),
    "fault_injected": (-0.38, "v", _RED),
    "failed": (0.0, "X", _RED),
    "decided": (0.38, "D", "#9a6cc4"),
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_LOOK = {
    **dict.fromkeys(_INKED, _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.12,
    "path.simplify_threshold": 1.0,
    "svg.fonttype": "none",
}


def _plot(name: str, caption: str, height: float, draw: Callable[..., None], columns: int = 1) -> Plot:
    """An SVG that takes its text colour from the page; `name` keeps its ids apart from those of other plots."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    buffer = io.StringIO()
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    _, _, svg = buffer.getvalue().replace(_INK, "currentColor").partition("<svg")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)
    return Plot("<svg" + re.sub(r' (width|height)="[\d.]+pt"', "", svg), caption)


def _draw_steps(axes: Any, content: Content, key: str, label: str, named: bool = False) -> None:
    """One metric by step: a colour an attempt, a dashed line a failure."""
    counts = {id(line) for line in content.counted}
    for row in content.attempts:
        lines = [line for line in content.metrics if line["attempt"] == row.number]
        lost = [line for line in lines if id(line) not in counts]
        for part, width, alpha in ((lost, 7, 0.35), (lines, 1.5, 1.0)):
            look: Json = {"color": _colour(row.number), "linewidth": width, "markersize": width, "alpha": alpha}
            look["marker"] = "o" if len(part) < 3 else ""  # a line of one point is invisible
            look["label"] = f"attempt {row.number}" if part is lines and lines else None
            values = [math.nan if line.get(key) is None else line[key] for line in part]
            axes.plot([line["step"] for line in part], values, **look)
        if row.failed and row.last_step is not None:
            axes.axvline(row.last_step, color=_RED, linewidth=1, linestyle=(0, (4, 3)))
            place: Json = {"xytext": (4, -1), "textcoords": "offset points", "va": "top", "color": _RED}
            axes.annotate(
                _words(row.outcome) if named else "", (row.last_step, 1), xycoords=("data", "axes fraction"), **place
            )
    axes.set(xlabel="step", ylabel=label)
    axes.locator_params(axis="x", integer=True)
    if named and 1 < len(content.attempts) <= len(_COLOURS):
        axes.legend(loc="upper right")


def _draw_timeline(axes: Any, content: Content, bars: list[Bar], rows: list[str]) -> None:
    clock = _clock(bars)
    total = max(clock(bar.end) for bar in bars)
    unit, size = ("seconds", 1) if total < 200 else ("minutes", 60) if total < 12_000 else ("hours", 3600)
    colours = {f"attempt {row.number}": _colour(row.number) for row in content.attempts}
    for bar in bars:
        row, (start, ready, end) = rows.index(bar.label), (clock(at) / size for at in bar[1:])
        colour = colours.get(bar.label, "#8a94a3")
        axes.barh(row, ready - start, left=start, height=0.56, color=colour, alpha=0.35)
        axes.barh(row, end - ready, left=ready, height=0.56, color=colour)
    for name, places in _marks(content, rows).items():
        offset, marker, colour = _MARKS[name]
        x, y = [clock(at) / size for _, at in places], [row + offset for row, _ in places]
        axes.scatter(x, y, marker=marker, color=colour, s=34, zorder=3, label=_words(name))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_MARKS))
    axes.set(xlabel=unit, xlim=(0, None), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), yticklabels=rows)
    axes.grid(visible=False, axis="y")


def _marks(content: Content, rows: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Event -> rows and times. An event that names no attempt belongs to the attempt before it."""
    failed = {row.number for row in content.attempts if row.failed}
    marks: dict[str, list[tuple[int, float]]] = {}
    current = None
    for event in content.events:
        current = event.get("attempt", current)
        name = "failed" if event["event"] == "attempt_ended" and current in failed else event["event"]
        if name in _MARKS and f"attempt {current}" in rows:
            marks.setdefault(name, []).append((rows.index(f"attempt {current}"), event["time"]))
    return marks


def _colour(attempt: int) -> str:
    return _COLOURS[(attempt - 1) % len(_COLOURS)]


# --- words ------------------------------------------------------------------------------------------------------------


def _numbers(lines: list[Json], key: str) -> list[float]:
    return [line[key] for line in lines if line.get(key) is not None]


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _clip(text: object) -> str | None:
    return f"{str(text)[:240]}{'…' if len(str(text)) > 240 else ''}" if text else None


def _duration(seconds: float | None) -> str | None:
    if seconds is None or seconds < 60:
        return None if seconds is None else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
