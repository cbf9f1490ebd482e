"""A rank's beat: what it does and since when, in shared memory that the agent of its node reads at any time.

So it is known how far a rank came that is killed, stopped or hangs, and cannot tell itself. Imports no Ray.
"""

from __future__ import annotations

import itertools
import mmap
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from orchestrator.data.schedule import Share

Phase = Literal["starting", "parked", "loading", "data", "step", "evaluation", "check", "checkpoint", "ending"]
"""What a rank does. `step` is the engine's, forward pass to update; `ending` begins after the last step."""
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a rank comes to them, those from `data` to `checkpoint` in every step."""

_BODY = struct.Struct("<BQqdd")
_SLOT = 64
_SIZE = 2 * _SLOT
_READS = 10


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank last said of itself."""

    phase: Phase
    step: int
    """That it is in; while it loads, the step that it goes on after."""
    age_s: float
    """How long it had been in the phase when this was read."""
    time: float
    """When it came to the phase, in unix seconds."""


def path(folder: str | Path, rank: int) -> Path:
    """Of the beat of a rank, in the folder of its attempt on its node."""
    return Path(folder, f"rank-{rank}.beat")


class Beat:
    """Of this process. A mark takes two microseconds and no system call that could block.

    Two slots take turns, so that a rank that is stopped in the middle of a mark leaves the mark before it.

    Args:
        path: of the file that is read elsewhere, on a disk of this node, in memory at best; it is made anew. None:
            nobody reads.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._count = 0
        self._memory = mmap.mmap(-1, _SIZE) if path is None else _mapped(path)
        self.mark("starting", 0)

    def mark(self, phase: Phase, step: int) -> None:
        """The rank comes to a phase of a step; it has left the one before."""
        self._count += 1
        body = _BODY.pack(PHASES.index(phase), self._count, step, time.monotonic(), time.time())
        start = self._count % 2 * _SLOT
        self._memory[start : start + _BODY.size + 4] = body + zlib.crc32(body).to_bytes(4, "little")

    def over(self, shares: Iterator[Share], first: int) -> Iterator[Share]:
        """The same shares, for a loop whose body makes the step; the wait for each is a phase of its own.

        Args:
            first: step of the first one.
        """
        for step in itertools.count(first):
            self.mark("data", step)
            share = next(shares, None)
            if share is None:
                return
            self.mark("step", step)
            yield share


def read(path: Path) -> Sign | None:
    """What a rank last marked; None where it has marked nothing yet. Takes microseconds, in any process of the node."""
    for _ in range(_READS):  # marks that come faster than a reader copies them spoil both slots: once, not ten times
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        marks = [mark for start in (0, _SLOT) if (mark := _unpacked(content[start : start + _SLOT]))]
        if marks:
            _, sign = max(marks, key=lambda mark: mark[0])
            return sign
    return None


def _mapped(path: Path) -> mmap.mmap:
    with path.open("w+b") as file:
        file.truncate(_SIZE)
        return mmap.mmap(file.fileno(), _SIZE)


def _unpacked(slot: bytes) -> tuple[int, Sign] | None:
    """(number of the mark, what it says); None where it is not whole."""
    body, checksum = slot[: _BODY.size], slot[_BODY.size : _BODY.size + 4]
    if len(checksum) < 4 or zlib.crc32(body) != int.from_bytes(checksum, "little"):
        return None
    phase, count, step, monotonic_s, at = _BODY.unpack(body)
    return count, Sign(phase=PHASES[phase], step=step, age_s=max(0.0, time.monotonic() - monotonic_s), time=at)
