"""Who asked a run to stop, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.runs import RunDir
from orchestrator.stop_requests import ask_to_make_way, asked_to_stop, request_stop, take_back_request


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


def test_the_supervisors_request_ends_with_the_attempt_that_it_was_for(run: RunDir) -> None:
    assert ask_to_make_way(run, 1, "drain")
    assert not asked_to_stop(run)
    take_back_request(run)
    assert not storage.exists(run.stop_request)


def test_a_persons_request_is_never_taken_back(run: RunDir) -> None:
    request_stop(run, "terrane stop")
    assert not ask_to_make_way(run, 1, "drain"), "it is not written over"
    take_back_request(run)
    assert asked_to_stop(run)


def test_a_person_may_ask_while_the_workers_make_way(run: RunDir) -> None:
    assert ask_to_make_way(run, 1, "drain")
    request_stop(run, "Ctrl-C")
    assert asked_to_stop(run)
    take_back_request(run)
    assert asked_to_stop(run)


def test_nothing_is_asked_where_nobody_has(run: RunDir) -> None:
    take_back_request(run)
    assert not asked_to_stop(run)
