"""What a person sees: log lines, one line a step, and progress bars where there is a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

log = logging.getLogger("terrane")

QUIET = ("ray", "botocore", "urllib3", "transformers", "deepspeed", "torch", "matplotlib", "filelock", "httpx")


def set_up_logging() -> None:
    """Log to standard error, with the time; standard output belongs to results."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


class Console:
    """Progress of long work: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._logged_at = 0.0

    def progress(self, what: str, done: int, of: int) -> None:
        if self._interactive:
            self._draw(what, done, of)
        elif what != self._what or done == of or time.monotonic() - self._logged_at > 10:
            self._logged_at = time.monotonic()
            if done:
                log.info("%s: %d of %d", what, done, of)
        self._what = what

    def step(self, record: dict[str, Any], total: int) -> None:
        """One line a step: what happened, and what it cost."""
        log.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %d tokens/s  %.2f s (data %.2f)%s",
            record["step"],
            total,
            record["loss"],
            record["grad_norm"],
            record["lr"],
            record["tokens_per_second"],
            record["step_time_s"],
            record["data_s"],
            f"  checkpoint {record['checkpoint_s']:.2f} s" if record["checkpoint_s"] else "",
        )

    def _draw(self, what: str, done: int, of: int) -> None:
        from rich import progress

        if what != self._what and self._bar is None:
            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
            from rich.console import Console as RichConsole

            self._bar = progress.Progress(*columns, progress.TimeElapsedColumn(), console=RichConsole(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(what, total=of)
        self._bar.update(self._task, completed=done)
        if done == of:
            self.close()

    def close(self) -> None:
        """Give the terminal back, also in the middle of a bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
