"""The ranks of one model replica get the same data, under torchrun: three pipeline stages of two tensor ranks each."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.launching import torchrun

RANKS = 6
FIRST, MIDDLE, LAST = (0, 1), (2, 3), (4, 5)
"""Global ranks of the stages, the source of each first."""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each rank says it got when nothing failed ("0"), when the source of the first stage failed at step 2 or 4,
    and when it was a replica of its own ("alone")."""
    return torchrun("replica_rank.py", RANKS)


def test_all_ranks_of_a_stage_get_what_its_source_has_read(told: list[dict[str, Any]]) -> None:
    steps = told[0]["0"]["steps"]
    assert [(step, tokens and tokens[:2], bool(counted)) for step, _, _, tokens, counted in steps] == [
        (1, ["uint16", [2, 7]], False),
        (2, None, False),
        (3, ["uint16", [0, 7]], True),
        (4, ["uint32", [3, 7]], True),
    ]
    for rank in FIRST + LAST:
        assert told[rank]["0"]["steps"] == steps, "to the byte, and the last stage as the first"
        assert told[rank]["0"]["error"] is None


def test_the_middle_of_a_pipeline_gets_no_data_and_takes_no_part(told: list[dict[str, Any]]) -> None:
    for rank in MIDDLE:
        assert [values[0] for values in told[rank]["0"]["steps"]] == [1, 2, 3, 4]
        assert all(values[3:] == [None, None] for values in told[rank]["0"]["steps"])
        assert told[rank]["0"]["calls"] == 0


def test_a_step_that_is_passed_over_costs_no_communication(told: list[dict[str, Any]]) -> None:
    assert [told[rank]["0"]["calls"] for rank in FIRST + LAST] == [6] * 4, "two in each of the other three"


def test_a_replica_of_one_rank_does_not_communicate(told: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert told[rank]["alone"] == {"steps": told[0]["0"]["steps"], "calls": 0, "error": None}


@pytest.mark.parametrize(("fails", "learned"), [(4, 4), (2, 3)], ids=["at a step", "where nothing is handed on"])
def test_a_source_that_fails_ends_its_peers_too(told: list[dict[str, Any]], fails: int, learned: int) -> None:
    source, peer = (told[rank][str(fails)] for rank in FIRST)
    assert source["error"] == "ValueError: no such shard", "the source raises its own error"
    assert peer["error"].startswith(f"PeerFailed: rank {FIRST[0]} failed to read the data of step {learned}")
    assert [values[0] for values in source["steps"]] == list(range(1, fails))
    assert [values[0] for values in peer["steps"]] == list(range(1, learned))
    assert all(told[rank][str(fails)] == told[rank]["0"] for rank in MIDDLE + LAST), "other stages are not concerned"
