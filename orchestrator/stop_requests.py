"""Requests that a run's workers commit and leave: a person's, which ends the run, and the supervisor's own."""

from __future__ import annotations

import json
import time

from orchestrator import storage
from orchestrator.runs import RunDir

OURS = "supervisor"
"""Who asks, where it is not a person."""


def request_stop(run: RunDir, reason: str) -> None:
    """Ask a run's workers to commit after the step they are in, and return."""
    run.write_json(run.stop_request, {"reason": reason, "time": time.time()})


def asked_to_stop(run: RunDir) -> bool:
    """Whether a person has asked the run to stop."""
    found = run.read_json(run.stop_request)
    return found is not None and found.get("by") != OURS


def take_back_request(run: RunDir) -> None:
    """Delete a request of the supervisor's, if there is one."""
    if storage.exists(run.stop_request) and not asked_to_stop(run):
        storage.delete(run.stop_request)


def ask_to_make_way(run: RunDir, attempt: int, reason: str) -> bool:
    """Ask the workers the same for the supervisor, which goes on with others; not where anybody has asked before."""
    request = {"by": OURS, "attempt": attempt, "reason": reason, "time": time.time()}
    return storage.create(run.stop_request, json.dumps(request).encode())
