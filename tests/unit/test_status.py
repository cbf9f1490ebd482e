"""What `terrane status` and `terrane logs` tell of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.errors import UserError
from orchestrator.runs import RunDir, open_run
from orchestrator.status import describe, summarize, worker_logs
from tests.made_runs import recipe


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return open_run(recipe(str(tmp_path)))


def write_event(run: RunDir, name: str, time: float, **facts: object) -> None:
    number = len(run.events()) + 1
    run.write_json(run.path("events", f"{number:06d}-{name}.json"), {"event": name, "time": time, **facts})


def write_log(run: RunDir, attempt: int, rank: int) -> None:
    storage.write(storage.join(run.attempt_logs(attempt), f"rank-{rank}.log"), b"a line")


def test_goodput_is_told_in_a_few_lines_the_largest_first(run: RunDir) -> None:
    write_event(run, "stage_started", 0.0, stage="train")
    write_event(run, "attempt_started", 10.0, attempt=1, resume_step=0)
    write_event(run, "attempt_ended", 100.0, attempt=1, outcome="hang", committed_step=1, failed_at=40.0)
    write_event(run, "stage_failed", 100.0, stage="train", message="")
    common = {"loss": 1.0, "tokens_per_second": 1.0, "step_time_s": 5.0}
    lines = [{"step": step, "time": at, "tokens": step * 100, **common} for step, at in ((1, 25.0), (2, 40.0))]
    storage.write(run.metrics(1), "".join(json.dumps(line) + "\n" for line in lines).encode())
    summary = summarize(run)
    assert summary["goodput"]["seconds"] == {
        "detection": 60.0,
        "lost_work": 15.0,
        "scheduling": 10.0,
        "start_up": 10.0,
        "productive": 5.0,
    }
    assert summary["goodput"]["failures"] == [{"outcome": "hang", "count": 1, "lost_s": 75.0, "mean_s": 75.0}]
    told = describe(summary).splitlines()
    first = told.index("  goodput      5.0 % of 1 min 40 s, 1 tokens a second of it")
    assert told[first + 1].split() == ["detection", "1", "min", "00", "s", "60.0", "%"]
    assert told[first + 5].split() == ["productive", "5", "s", "5.0", "%"]
    assert told[first + 6] == "  failures     1 x hang: 1 min 15 s lost, 1 min 15 s each"
    json.dumps(summary)


def test_run_before_its_training_has_no_goodput(run: RunDir) -> None:
    assert "goodput   " not in describe(summarize(run))


def test_a_run_that_waits_says_what_for_until_it_has_it(run: RunDir) -> None:
    line = "  waiting      for capacity: 2 more devices"
    write_event(run, "waiting", 1.0, missing="2 more devices")
    assert line in describe(summarize(run))
    write_event(run, "waited", 2.0, seconds=1.0)
    assert line not in describe(summarize(run))
    write_event(run, "waiting", 3.0, missing="2 more devices")
    write_event(run, "driver_started", 4.0)
    assert summarize(run)["waiting"] is None, "its driver was lost meanwhile"


def test_logs_are_of_the_last_attempt_that_has_any(run: RunDir) -> None:
    for _ in range(3):
        run.claim_attempt({})
    write_log(run, 1, rank=0)
    write_log(run, 1, rank=1)
    write_log(run, 2, rank=0)
    assert list(worker_logs(run, None, None)) == ["attempt 2 rank-0.log"]
    assert list(worker_logs(run, None, 1)) == ["attempt 1 rank-1.log"]
    assert list(worker_logs(run, 1, None)) == ["attempt 1 rank-0.log", "attempt 1 rank-1.log"]


@pytest.mark.parametrize(
    ("attempt", "rank", "message"),
    [(7, None, "no attempt 7"), (2, 1, "attempt 2 of .* has no log of rank 1"), (None, 5, "r has no log of rank 5")],
)
def test_logs_that_are_not_there_are_named(run: RunDir, attempt: int | None, rank: int | None, message: str) -> None:
    run.claim_attempt({})
    run.claim_attempt({})
    write_log(run, 2, rank=0)
    with pytest.raises(UserError, match=message):
        worker_logs(run, attempt, rank)


def test_run_without_an_attempt_has_no_logs(run: RunDir) -> None:
    with pytest.raises(UserError, match="no attempt yet"):
        worker_logs(run, None, None)
