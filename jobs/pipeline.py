"""Every stage as a Ray job: `ray job submit --working-dir . -- python -m jobs.pipeline RECIPE [key=value ...]`.

It connects to the cluster that it runs in. Submitted again, it goes on where it stopped.
"""

import sys

from orchestrator.cli import run_job
from orchestrator.stages import STAGES

if __name__ == "__main__":
    raise SystemExit(run_job(STAGES, sys.argv[1:]))
