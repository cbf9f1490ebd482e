"""A recipe and its faults, on a cluster of its own on this machine: `python -m jobs.chaos RECIPE [key=value ...]`.

It prints what became of each fault, and ends with 0 where the run came to its end.
"""

import sys

from orchestrator.chaos.show import main
from orchestrator.cli import guarded

if __name__ == "__main__":
    raise SystemExit(guarded(lambda: sys.exit(main(sys.argv[1:]))))
