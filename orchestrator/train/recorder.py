"""The parts of every step, timed: what an attempt's metrics are made of."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from orchestrator import storage
from orchestrator.data.schedule import Schedule, Share
from orchestrator.runs import RunDir


class Recorder:
    """Times the parts of every step; rank 0 writes them to the run's metrics."""

    def __init__(self, run: RunDir, attempt: int, rank: int, schedule: Schedule) -> None:
        self._out = storage.Appender(run.metrics(attempt)) if rank == 0 else None
        self._schedule = schedule
        self._started = self._received = self._computed = 0.0
        self._check_s = 0.0
        self.compute_s = 0.0
        """Of the last step."""
        self.checkpoint_s = 0.0
        """Since the last record."""

    def timed(self, shares: Iterator[Share]) -> Iterator[Share]:
        """Time the wait for each."""
        self._started = time.perf_counter()
        for share in shares:
            self._received = time.perf_counter()
            yield share

    def computed(self) -> None:
        """The step is made; what comes now is no part of its time."""
        self._computed = time.perf_counter()

    def record(self, step: int, result: Any, lr: float, held_out_loss: float | None) -> None:
        now = self._computed
        self.compute_s = now - self._received
        tokens = self._schedule.order.batch_size(step) * self._schedule.sequence_length
        line = {
            "step": step,
            "time": time.time(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "applied": result.applied,
            "tokens": self._schedule.order.position(step + 1) * self._schedule.sequence_length,
            "tokens_per_second": tokens / (now - self._started),
            "step_time_s": now - self._started,
            "data_s": self._received - self._started,
            "compute_s": self.compute_s,
            "checkpoint_s": self.checkpoint_s,
        }
        if self._check_s:
            line["check_s"] = self._check_s
        self._started, self.checkpoint_s, self._check_s = time.perf_counter(), 0.0, 0.0
        if held_out_loss is not None:
            line |= {"held_out_loss": held_out_loss, "evaluation_s": self._started - now}
        if self._out:
            self._out.append(json.dumps(line))

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Time of a check counts to the record of the step after it, and not to its step time."""
        before = time.perf_counter()
        yield
        took_s = time.perf_counter() - before
        self._check_s += took_s
        self._started += took_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time of a checkpoint, likewise."""
        before = time.perf_counter()
        yield
        took_s = time.perf_counter() - before
        self.checkpoint_s += took_s
        self._started += took_s

    def flush(self) -> None:
        """Put what is recorded on storage, where it is not yet. From any thread."""
        if self._out:
            self._out.flush()

    def close(self) -> None:
        if self._out:
            self._out.close()
