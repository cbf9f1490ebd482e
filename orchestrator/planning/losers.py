"""Why a layout lost to the one that was chosen: the phases of a step that take longer, or the memory that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from orchestrator.planning.devices import Devices
from orchestrator.planning.layout import Layout
from orchestrator.planning.layout_search import Candidate, Found, micro_batches, sized
from orchestrator.planning.memory import Memory
from orchestrator.planning.request import Space, Work
from orchestrator.planning.throughput import StepTime

_GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "base")
MOST_FITTING, MOST_REJECTED = 5, 3


@dataclass(frozen=True, kw_only=True)
class Loser:
    candidate: Candidate
    fits: bool
    why: str
    change: str = ""
    """The one thing in which it differs from the chosen layout; empty: it is another cut of the model."""


def losers(work: Work, found: Found, space: Space) -> tuple[Loser, ...]:
    """Of the layouts on the devices of the chosen one: those that differ from it in one thing, other cuts of the model,
    and cuts that might have been faster, but do not fit."""
    best, available = found.best[0], found.devices.memory_bytes
    slower = tuple(
        Loser(candidate=other, fits=True, why=why_slower(best, other)) for other in found.best[1 : 1 + MOST_FITTING]
    )
    rejected = tuple(
        Loser(candidate=other, fits=False, why=f"even at its thriftiest it {why_too_large(other.memory, available)}")
        for other in found.rejected[:MOST_REJECTED]
    )
    return (*_one_change_away(work, found.devices, space, best), *slower, *rejected)


def _one_change_away(work: Work, devices: Devices, space: Space, best: Candidate) -> Iterator[Loser]:
    for change, layout, micro_batch_size in _changes(work, devices, space, best):
        other = sized(work, devices, layout, best.data_parallel, micro_batch_size, best.dtype)
        fits = other.memory.total <= devices.memory_bytes
        why = why_slower(best, other) if fits else why_too_large(other.memory, devices.memory_bytes)
        yield Loser(candidate=other, fits=fits, why=why, change=change)


def _changes(work: Work, devices: Devices, space: Space, best: Candidate) -> Iterator[tuple[str, Layout, int]]:
    """(what is different, the layout, its micro-batch)."""
    layout, size = best.layout, best.micro_batch_size
    sizes = sorted({of_one for _, of_one in micro_batches(-(-work.global_batch_size // best.data_parallel))})
    at = sizes.index(size)
    for other in (*sizes[at + 1 : at + 2], *sizes[max(at - 1, 0) : at]):
        yield f"micro-batch {other}", layout, other
    if space.recompute is None:
        name = "no recomputation" if layout.recompute else "recomputation"
        yield name, replace(layout, recompute=not layout.recompute), size
    if space.offload is None and layout.zero_stage and not devices.host_memory:
        name = "no offload" if layout.offload else "offload"
        yield name, replace(layout, offload=not layout.offload), size
    if space.zero_stage is None and layout.pipeline_stages == 1:
        for stage in (layout.zero_stage - 1, layout.zero_stage + 1):
            if 1 <= stage <= 3:
                yield f"ZeRO-{stage}", replace(layout, zero_stage=stage), size


def why_slower(best: Candidate, other: Candidate) -> str:
    """Names the phases that cost the most."""
    lost_s = other.step.total - best.step.total
    if lost_s <= 1e-6 * best.step.total:
        more = other.memory.total - best.memory.total
        if other.workers > best.workers:
            return f"as fast, on {other.workers - best.workers} more devices"
        if more > 0:
            return f"as fast, and takes {more / _GIB:.2f} GiB more"
        return "as fast"
    phases = more_of(best.step, other.step)
    told = [f"{seconds:.3g} s more {name}" for name, seconds in phases[:2] if seconds >= 0.1 * lost_s]
    share = lost_s / best.step.total
    return f"{_slower(share)} ({other.step.total:.3g} s a step): {', '.join(told)}"


def _slower(share: float) -> str:
    if share < 0.001:
        return "less than 0.1% slower"
    return f"{share:.1%} slower" if share < 1 else f"{1 + share:.1f} times as slow"


def more_of(best: StepTime, other: StepTime) -> list[tuple[str, float]]:
    """(phase, seconds that the other takes more), the most first."""
    names = [field.name for field in fields(StepTime)]
    found = [(PHASES[name], getattr(other, name) - getattr(best, name)) for name in names]
    return sorted(found, key=lambda phase: -phase[1])


PHASES = {
    "compute": "compute",
    "tensor_parallel": "tensor-parallel traffic",
    "pipeline": "traffic between stages",
    "fetch": "fetching of weights",
    "overhead": "starting of kernels",
    "bubble": "pipeline bubble",
    "data_parallel": "data-parallel traffic",
    "offload": "offload",
    "update": "optimizer",
}
"""Of a step, in words."""


def why_too_large(memory: Memory, available_bytes: int) -> str:
    most = sorted(_PARTS, key=lambda part: -getattr(memory, part))[:2]
    named = " and ".join(f"{getattr(memory, part) / _GIB:.1f} GiB of {part}" for part in most)
    return f"needs {memory.total / _GIB:.1f} of {available_bytes / _GIB:.1f} GiB, most of it {named}"
