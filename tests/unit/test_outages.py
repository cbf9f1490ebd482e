"""A storage that fails for a while, or for good, under the supervisor's own calls."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from orchestrator import supervisor
from orchestrator.errors import UserError
from orchestrator.failures import Ending
from orchestrator.planning.past import load_s
from orchestrator.runs import RunDir

ENDING = Ending(attempt=3, outcome="storage", message="no room", resumed_from=10, last_step=14, committed_step=10)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(supervisor, "OUTAGE_S", (0.0,) * 4)
    return RunDir(str(tmp_path / "run"))


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    """The events that are asked for; the first ones fail."""
    asked: list[str] = []
    write = RunDir.log_event

    def log_event(self: RunDir, event: str, **facts: Any) -> None:
        asked.append(event)
        if len(asked) <= times:
            raise error
        write(self, event, **facts)

    monkeypatch.setattr(RunDir, "log_event", log_event)
    return asked


def test_the_end_of_an_attempt_is_recorded_once_a_full_disk_has_room(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), times=3)
    supervisor._record_ending(run, ENDING)
    assert len(asked) == 4
    [event] = run.events()
    assert (event["event"], event["attempt"], event["outcome"]) == ("attempt_ended", 3, "storage")


def test_a_storage_that_fails_for_good_is_told(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), times=100)
    with pytest.raises(OSError, match="No space left"):
        supervisor._record_ending(run, ENDING)
    assert len(asked) == 1 + 4


def test_what_is_not_of_the_storage_is_told_at_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, UserError("a bad recipe"), times=100)
    with pytest.raises(UserError, match="a bad recipe"):
        supervisor._record_ending(run, ENDING)
    assert len(asked) == 1


def test_what_a_change_costs_follows_the_newest_load() -> None:
    def began(attempt: int, seconds: float) -> dict[str, Any]:
        return {"event": "worker_started", "attempt": attempt, "began": 100.0, "loaded": 100.0 + seconds}

    assert load_s([]) == 0
    assert load_s([began(1, 3.0), {"event": "first_step"}, began(2, 40.0)]) == 40
