"""Peak memory of a piece of work, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

_PRELUDE = r"""
import re, sys
from pathlib import Path

def mib(key):
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
"""
_MEASURED = """
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = mib("VmRSS")
work()
print(mib("VmHWM") - before)
"""


def peak_growth_mib(script: str, *arguments: str) -> int:
    """By how much the memory of a process grows at the most while it calls `work()`, which the script defines."""
    command = [sys.executable, "-c", _PRELUDE + script + _MEASURED, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return int(done.stdout)
