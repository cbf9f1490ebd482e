"""What a rank does in some steps, as a trace for chrome://tracing or Perfetto.

The parts of a step carry the labels `data`, `forward-backward`, `optimizer` and `checkpoint`. Imports no Ray.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import profiler

from orchestrator import storage
from orchestrator.data.schedule import Share

log = logging.getLogger("terrane.worker")

labelled = profiler.record_function
"""A labelled part of a step: `with labelled("data"): ...`. Costs microseconds where nothing is traced."""


class Profiler:
    """Traces a range of steps.

    Args:
        uri: of the file, named .json.gz, that the trace is written to.
        steps: first and last; None: nothing is traced.
    """

    def __init__(self, uri: str, steps: tuple[int, int] | None) -> None:
        self._uri = uri
        self._steps = steps
        self._running: profiler.profile | None = None

    def over(self, shares: Iterator[Share], first: int) -> Iterator[Share]:
        """The same shares, of a loop whose body does all of a step.

        Args:
            first: step of the first one.
        """
        for step in itertools.count(first):
            self._begin(step)
            with labelled("data"):
                share = next(shares, None)
            if share is None:
                return
            yield share
            if self._steps and step >= self._steps[1]:
                self.close()

    def _begin(self, step: int) -> None:
        if self._steps and self._running is None and self._steps[0] <= step <= self._steps[1]:
            activities = [profiler.ProfilerActivity.CPU]
            activities += [profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profiler.profile(activities=activities)
            self._running.start()

    def close(self) -> None:
        """Write what is traced so far."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        with tempfile.TemporaryDirectory(prefix="terrane-") as folder:
            path = Path(folder, "trace.json.gz")
            running.export_chrome_trace(str(path))
            storage.upload(path, self._uri)
        log.info("profile: %s (for https://ui.perfetto.dev)", self._uri)
