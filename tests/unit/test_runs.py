from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.fault_config import KillRank
from orchestrator.runs import RunDir, find_run, open_run


def recipe(storage_uri: str, **train: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "storage": storage_uri,
            "corpus": {"sources": [{"name": "a", "path": "/data"}]},
            "train": {"steps": 10, "lr": 0.1, **train},
        }
    )


def test_a_run_is_found_again_by_its_directory(anywhere: str) -> None:
    run = open_run(recipe(anywhere), "name: r\n")
    assert find_run(run.uri).recipe() == recipe(anywhere)
    assert storage.read(run.path("recipe.yaml")) == b"name: r\n"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"recipe": {"name": "r"}}'])
def test_a_damaged_run_is_named(tmp_path: Path, content: bytes) -> None:
    run = open_run(recipe(str(tmp_path)))
    storage.write(run.resolved, content)
    with pytest.raises(UserError, match="damaged"):
        find_run(run.uri)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        find_run(str(tmp_path))


def test_a_changed_result_is_refused_and_a_changed_way_is_not(tmp_path: Path) -> None:
    run = open_run(recipe(str(tmp_path), lr=9.0))
    open_run(recipe(str(tmp_path)))  # nothing came of the first one yet
    run.claim_attempt({})
    open_run(recipe(str(tmp_path), workers=3))
    with pytest.raises(UserError, match=r"train\.lr was 0\.1, is 0\.2"):
        open_run(recipe(str(tmp_path), lr=0.2))
    assert find_run(str(tmp_path / "r")).recipe().train.workers.max == 3


def test_two_drivers_never_claim_one_attempt(anywhere: str) -> None:
    run = RunDir(storage.join(anywhere, "r"))
    with ThreadPoolExecutor(6) as pool:
        claimed = list(pool.map(lambda n: run.claim_attempt({"plan": n}), range(6)))
    assert sorted(claimed) == run.attempts() == [1, 2, 3, 4, 5, 6]


def test_events_keep_their_order_and_none_is_lost(anywhere: str) -> None:
    run = RunDir(storage.join(anywhere, "r"))
    for step in range(5):
        run.log_event("committed", step=step)
    assert [event["step"] for event in run.events()] == [0, 1, 2, 3, 4]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: run.log_event("planned", n=n), range(6)))
    assert {event["n"] for event in run.events()[5:]} == set(range(6))


def test_of_repeated_steps_the_later_attempt_counts(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    storage.write(run.metrics(1), b'{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n')
    storage.write(run.metrics(2), b'{"step": 2, "loss": 7}\n{"step": 3, "lo')
    assert {step: line["loss"] for step, line in run.loss_curve().items()} == {1: 9, 2: 7}
    assert len(run.metric_lines()) == 3


def test_an_injected_fault_comes_once(anywhere: str) -> None:
    run = RunDir(storage.join(anywhere, "r"))
    first, second = (KillRank(kind="kill_rank", rank=1, step=step) for step in (5, 6))
    assert [run.claim_fault(first), run.claim_fault(first), run.claim_fault(second)] == [True, False, True]


def test_files_that_are_damaged_or_foreign_block_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = RunDir(str(tmp_path / "r"))
    made.log_event("driver_started")
    for name, content in {
        "events/garbage.json": b'{"bad',
        "events/000002-empty.json": b"",
        "events/000003-list.json": b"[]",
        "events/000004-other.json": b"{}",
        "events/000005-bytes.json": b"\xff\xfe",
        "metrics/foo": b"1\n",
        "metrics/attempt-x.jsonl": b"{}\n",
        "metrics/attempt-001.jsonl": b'\xff\n[]\nnull\n{"step": 1}\n{"step": 2',
        "attempts/zzz/plan.json": b"{}",
    }.items():
        storage.write(made.path(*name.split("/")), content)
    made.log_event("stage_started")
    assert [event["event"] for event in made.events()] == ["driver_started", "stage_started"]
    assert caplog.text.count("is damaged, and left out") == 4
    assert made.metric_lines() == [{"attempt": 1, "step": 1}]
    assert made.attempts() == []
