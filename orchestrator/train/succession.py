"""Which attempt a step belongs to, where several have written checkpoints to one directory: a pure function of names.

    succession/attempt-003                 attempt 3 has begun: what an earlier one has not committed yet, it never will
    succession/attempt-003.from-00000100   it went on from step 100: later steps of earlier attempts do not count
    succession/attempt-003.back-to-00000040  a rollback after it: neither do its own steps after 40, nor those before it

Workers outlive their driver, and a process that was stopped wakes up again. So no attempt is trusted to know that it
has been replaced: what it commits lies in a place of its own, and counts or not by these names alone. Imports no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

FOLDER = "succession"
_MARK = re.compile(r"attempt-(\d+)(?:\.(from|back-to)-(\d+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Steps after one no longer count, of the attempts up to one."""

    attempt: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Succession:
    newest: int = 0
    """The attempt that may commit, 0 before the first."""
    cuts: tuple[Cut, ...] = ()

    def counts(self, step: int, attempt: int) -> bool:
        """Whether a step that an attempt has committed is part of what the run has trained."""
        return not any(attempt <= cut.attempt and step > cut.step for cut in self.cuts)

    def has_replaced(self, attempt: int) -> bool:
        """Whether the run has gone on from somewhere without this attempt, or is about to."""
        return self.newest > attempt or any(attempt <= cut.attempt for cut in self.cuts)


def mark_begun(attempt: int) -> str:
    return f"attempt-{attempt:03d}"


def mark_resumed(attempt: int, step: int) -> str:
    return f"{mark_begun(attempt)}.from-{step:08d}"


def mark_back(attempt: int, step: int) -> str:
    return f"{mark_begun(attempt)}.back-to-{step:08d}"


def succession(names: Iterable[str], last_before_start_over: int = 0) -> Succession:
    """
    Args:
        names: of the marks; others are passed over.
        last_before_start_over: the last attempt of which nothing counts.
    """
    newest, cuts = 0, {Cut(attempt=last_before_start_over, step=0)}
    for mark in filter(None, map(_MARK.fullmatch, names)):
        attempt, what, step = int(mark[1]), mark[2], int(mark[3] or 0)
        newest = max(newest, attempt)
        if what:
            cuts.add(Cut(attempt=attempt - 1 if what == "from" else attempt, step=step))
    return Succession(newest=newest, cuts=tuple(sorted(cuts, key=lambda cut: (cut.attempt, cut.step))))
