"""Whether an attempt hangs, and which ranks the others wait for: pure functions of the ranks' beats."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.train.beats import PHASES, Phase, Sign

FIRST_S = 1800.0
"""For a phase that no step has gone through yet: kernels are compiled, weights fetched, caches filled."""
LEAST_S = 60.0
LEAST_ON_STORAGE_S = 300.0
"""Where storage is read or written, whose errors are tried again for minutes before they are told."""
SLOWER = 10.0
"""Than the slowest of the recent steps: what takes longer is no slow step."""
RECENT_STEPS = 50

_TIMES: dict[Phase, str] = {
    "data": "data_s",
    "step": "compute_s",
    "evaluation": "evaluation_s",
    "check": "check_s",
    "checkpoint": "checkpoint_s",
}
"""The key of metric lines that tells how long a phase took."""

Durations = Mapping[Phase, Sequence[float]]
"""Seconds that phases took in the last steps of the attempt."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    step: int
    """Of those that are behind."""
    seconds: float
    """Since any rank came to anything new."""
    ranks: tuple[int, ...]
    """That the others wait for; empty where nothing tells them apart."""
    message: str


@dataclass(frozen=True)
class Blame:
    ranks: tuple[int, ...]
    """That the others wait for; empty where nothing tells them apart."""
    message: str


def durations(lines: Sequence[Mapping[str, Any]]) -> dict[Phase, list[float]]:
    """From the metric lines of an attempt, the newest last."""
    recent = lines[-RECENT_STEPS:]
    return {phase: [line[key] for line in recent if line.get(key)] for phase, key in _TIMES.items()}


def hang_after_s(setting: float | None, recent: Durations, phase: Phase) -> float:
    """How long a phase may take before it counts as a hang.

    Args:
        setting: train.hang_after_s. It bounds the wait for data and the step, once steps flow; other phases take at
            least as long.
    """
    if phase == "parked":  # with a job: it is taken up at once
        return max(LEAST_ON_STORAGE_S, setting or 0.0)
    if not recent.get("step") or (phase not in ("data", "step") and not recent.get(phase)):
        return max(FIRST_S, setting or 0.0)
    if setting and phase in ("data", "step"):
        return setting
    least = LEAST_ON_STORAGE_S if phase in ("data", "checkpoint") else LEAST_S
    return max(least, SLOWER * max(recent.get(phase, ()), default=0.0), setting or 0.0)


def hang(
    signs: Mapping[int, Sign | None],
    recent: Durations,
    setting: float | None,
    stopped: Collection[int] = (),
    since_s: float = math.inf,
) -> Hang | None:
    """The hang that an attempt is in, if it is: no rank has come to anything new for longer than those that the others
    wait for may take.

    Args:
        signs: of every rank, all read just now; None of a rank that has given none.
        setting: train.hang_after_s.
        stopped: ranks whose process is stopped (orchestrator.train.stacks.state).
        since_s: seconds since the ranks were sent off; before that they stood by.
    """
    known = [sign for sign in signs.values() if sign]
    if not known:
        return None
    last = min(known, key=_place) if len(known) == len(signs) else None
    seconds = min(since_s, *(sign.age_s for sign in known))
    if seconds < hang_after_s(setting, recent, last.phase if last else "starting"):
        return None
    found = blame(signs, stopped)
    step = min(sign.step for sign in known)
    return Hang(step=step, seconds=seconds, ranks=found.ranks, message=found.message)


def blame(signs: Mapping[int, Sign | None], stopped: Collection[int] = ()) -> Blame:
    """Which ranks the others wait for: those that gave no sign, else those whose process is stopped, else those that
    are behind. Ranks that are all in one phase wait for each other; their stacks may tell what their beats do not.
    """
    silent = tuple(rank for rank, sign in sorted(signs.items()) if sign is None)
    known = {rank: sign for rank, sign in sorted(signs.items()) if sign}
    halted = tuple(rank for rank in known if rank in stopped)
    behind = tuple(rank for rank in known if _place(known[rank]) == min(map(_place, known.values())))
    if silent:
        return Blame(silent, _sentence(f"{named(silent)} gave no sign", _whereabouts(known)))
    if halted:
        where = _whereabouts({rank: known[rank] for rank in halted})
        return Blame(halted, _sentence(f"stopped: {where}", _whereabouts(_without(known, halted))))
    if len(behind) == len(known):
        return Blame((), f"all are in the same phase: {_whereabouts(known)}")
    where = _whereabouts({rank: known[rank] for rank in behind})
    return Blame(behind, _sentence(where, _whereabouts(_without(known, behind))))


def named(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {', '.join(parts)}"


def _place(sign: Sign) -> tuple[int, int]:
    """How far a rank is."""
    return sign.step, PHASES.index(sign.phase)


def _whereabouts(signs: Mapping[int, Sign]) -> str:
    """`rank 3 in data of step 17 for 95 s, ranks 0-2 in step of step 17 for 94 s`, those behind first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in sorted(signs, key=lambda rank: (_place(signs[rank]), rank)):
        groups.setdefault(_place(signs[rank]), []).append(rank)
    parts = []
    for ranks in groups.values():
        sign, seconds = signs[ranks[0]], max(signs[rank].age_s for rank in ranks)
        parts.append(f"{named(ranks)} in {sign.phase} of step {sign.step} for {seconds:.0f} s")
    return ", ".join(parts)


def _sentence(culprits: str, others: str) -> str:
    return f"{culprits}; waiting for that: {others}" if others else culprits


def _without(signs: Mapping[int, Sign], ranks: Collection[int]) -> dict[int, Sign]:
    return {rank: sign for rank, sign in signs.items() if rank not in ranks}
