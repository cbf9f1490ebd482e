"""Scripts of this directory as the ranks of a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

DEADLINE_S = 600
"""Starting takes a few seconds, but machines are shared; ranks that wait for each other would wait for ever."""


def torchrun(script: str, ranks: int, *arguments: str, deadline_s: float = DEADLINE_S) -> list[dict[str, Any]]:
    """What rank 0 prints after the word RESULTS."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with subprocess.Popen(
        [*launcher, str(Path(__file__).parent / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    ) as launched:
        try:
            out, errors = launched.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            launched.terminate()  # it ends its ranks then, which it would leave behind if it were killed
            raise
    assert launched.returncode == 0, out[-1000:] + errors[-8000:]
    line = next(line for line in out.splitlines() if line.startswith("RESULTS"))
    return list(json.loads(line.removeprefix("RESULTS")))
