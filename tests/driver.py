"""A process that drives a run until its input ends: `python -m tests.driver RUN`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from orchestrator.drivers import Pace, claim
from orchestrator.errors import RunFailed
from orchestrator.runs import RunDir

ROOT = Path(__file__).parents[1]
PACE = Pace(beat_s=0.1, silence_s=1)


def launch(run: RunDir) -> subprocess.Popen[str]:
    """Returns once it holds the run."""
    command = [sys.executable, "-m", "tests.driver", run.uri]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=os.environ)
    assert said(process) == "holds it"
    return process


def said(process: subprocess.Popen[str]) -> str:
    """The next line that it says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def main(uri: str) -> None:
    with claim(RunDir(uri), PACE) as driver:
        print("holds it", flush=True)
        for _ in sys.stdin:
            try:
                driver.check()
                print("still holds it", flush=True)
            except RunFailed as error:
                print(error.message, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
