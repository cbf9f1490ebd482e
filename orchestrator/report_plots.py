"""The plots of a report, as SVG that takes its colours from the page, and the time line that one of them shows."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orchestrator.goodput import Kind, Span, in_words
from orchestrator.pages import Plot
from orchestrator.report_content import Content, Json, words

INK = "#010203"  # stands for the page's text colour
_RED = "#d9483b"
_COLOURS = ("#3d7fc1", "#e08b2d", "#3a9c77", "#9a6cc4", "#b3912f", "#48a2b6", "#c26a9b")
_KIND_COLOURS: dict[Kind, str] = {
    "productive": "#3a9c77",
    "checkpoint": "#3d7fc1",
    "data_wait": "#48a2b6",
    "lost_work": _RED,
    "detection": "#e08b2d",
    "scheduling": "#9a6cc4",
    "preflight": "#c26a9b",
    "waiting": "#8a94a3",
    "start_up": "#b3912f",
    "load": "#7a6a4f",
}
_BINS = 120
# Event: offset from the middle of its attempt's bar, marker, colour.
_MARKS = {
    "committed": (0.0, "|", INK),
    "fault_injected": (-0.38, "v", _RED),
    "failed": (0.0, "X", _RED),
    "decided": (0.38, "D", "#9a6cc4"),
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
_LOOK = {
    **dict.fromkeys(_INKED, INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.12,
    "path.simplify_threshold": 1.0,
    "svg.fonttype": "none",
}


class Bar(NamedTuple):
    """A stretch of wall time, in unix seconds; `ready` is when its useful part began."""

    label: str
    start: float
    ready: float
    end: float


def stage_bars(content: Content) -> list[Bar]:
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


def attempt_bars(content: Content) -> list[Bar]:
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


def plot(name: str, caption: str, height: float, draw: Callable[..., None], columns: int = 1) -> Plot:
    """An SVG that takes its text colour from the page; `name` keeps its ids apart from those of other plots."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    buffer = io.StringIO()
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    _, _, svg = buffer.getvalue().replace(INK, "currentColor").partition("<svg")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)
    return Plot("<svg" + re.sub(r' (width|height)="[\d.]+pt"', "", svg), caption)


def draw_steps(axes: Any, content: Content, key: str, label: str, named: bool = False) -> None:
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
                words(row.outcome) if named else "", (row.last_step, 1), xycoords=("data", "axes fraction"), **place
            )
    axes.set(xlabel="step", ylabel=label)
    axes.locator_params(axis="x", integer=True)
    if named and 1 < len(content.attempts) <= len(_COLOURS):
        axes.legend(loc="upper right")


def draw_timeline(axes: Any, content: Content, bars: list[Bar], rows: list[str]) -> None:
    clock = _clock(bars)
    total = max(clock(bar.end) for bar in bars)
    unit, size = _unit(total)
    colours = {f"attempt {row.number}": _colour(row.number) for row in content.attempts}
    for bar in bars:
        row, (start, ready, end) = rows.index(bar.label), (clock(at) / size for at in bar[1:])
        colour = colours.get(bar.label, "#8a94a3")
        axes.barh(row, ready - start, left=start, height=0.56, color=colour, alpha=0.35)
        axes.barh(row, end - ready, left=ready, height=0.56, color=colour)
    for name, places in _marks(content, rows).items():
        offset, marker, colour = _MARKS[name]
        x, y = [clock(at) / size for _, at in places], [row + offset for row, _ in places]
        axes.scatter(x, y, marker=marker, color=colour, s=34, zorder=3, label=words(name))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_MARKS))
    axes.set(xlabel=unit, xlim=(0, None), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), yticklabels=rows)
    axes.grid(visible=False, axis="y")


def _unit(total_s: float) -> tuple[str, int]:
    """Of an axis of time: its name and its seconds."""
    return ("seconds", 1) if total_s < 200 else ("minutes", 60) if total_s < 12_000 else ("hours", 3600)


def draw_goodput(axes: Any, spans: Sequence[Span]) -> None:
    """Shares of the kinds over the wall time, stacked."""
    import numpy as np

    lengths = np.array([span.end - span.begin for span in spans])
    knots = np.cumsum([0.0, *lengths])
    edges = np.linspace(0.0, knots[-1], _BINS + 1)
    kinds = [kind for kind in _KIND_COLOURS if any(span.kind == kind for span in spans)]
    shares = []
    for kind in kinds:
        of_kind = np.cumsum([0.0, *lengths * [span.kind == kind for span in spans]])
        share = np.diff(np.interp(edges, knots, of_kind)) / (edges[1] - edges[0]) * 100
        shares.append([*share, share[-1]])
    unit, size = _unit(knots[-1])
    colours, labels = [_KIND_COLOURS[kind] for kind in kinds], [in_words(kind) for kind in kinds]
    axes.stackplot(edges / size, shares, colors=colours, labels=labels, step="post", linewidth=0)
    axes.set(xlabel=unit, ylabel="%", xlim=(0, edges[-1] / size), ylim=(0, 100))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


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
