"""What Ray workers run in the tests of the transport: one rank's stream, a step at a time. Light: no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from orchestrator.data import stream
from orchestrator.data.schedule import Role, Schedule


@dataclass(frozen=True)
class Report:
    """What a rank took in a step."""

    step: int
    rows: list[int]
    """Hash of each sequence."""
    targets: int


class Consumer:
    """A rank of an attempt, as an actor. The steps are passed on one by one, read ahead as in training."""

    def __init__(
        self,
        corpus: str,
        schedule: dict[str, Any],
        role: Role,
        steps: range,
        unit_tokens: int,
        execution_units: int,
    ) -> None:
        stream.EXECUTION_UNITS = execution_units
        given = Schedule.from_json(schedule)
        self._shares = stream.stream(corpus, given, role, steps[0], steps[-1], unit_tokens)

    def pid(self) -> int:
        return os.getpid()

    def take(self) -> Report:
        share = next(self._shares)
        rows = np.empty((0, 0)) if share.tokens is None else share.tokens
        return Report(share.step, hashes(rows), share.targets)


def hashes(rows: np.ndarray) -> list[int]:
    """One hash a sequence."""
    return [int(xxhash.xxh3_64_intdigest(row.tobytes())) for row in rows]
