from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.elastic import Change, wanted_change
from orchestrator.planning.plan import Plan

A, B, C = "aaaa", "bbbb", "cccc"


def plan_on(*nodes: str, workers: int = 1, step_time_s: float | None = None) -> Plan:
    total = workers * len(nodes)
    return Plan(
        accelerator="cpu",
        node_ids=nodes,
        workers_by_node=(workers,) * len(nodes),
        data_parallel=total,
        layers_per_stage=(2,),
        micro_batch_size=1,
        accumulation=8,
        dtype="fp32",
        parameters=1000,
        memory_bytes=2**20,
        step_time_s=step_time_s or 12.0 / total,
    )


def change(live: Plan, candidate: Plan, **values: Any) -> Change | None:
    facts: dict[str, Any] = {"leaving": set(), "slow": {}, "step_s": 10.0, "steps_left": 100, "change_s": 5.0}
    return wanted_change(live, candidate, **{**facts, **values})


def test_a_new_node_is_used_when_it_pays() -> None:
    found = change(plan_on(A, B), plan_on(A, B, C))
    assert found is not None
    assert found.kind == "resize"
    assert found.reason == "2 -> 3 workers, 0.67 of the step time (predicted)"


def test_the_same_placement_is_no_change() -> None:
    assert change(plan_on(A, B), replace(plan_on(A, B), step_time_s=0.1, losers=("x",))) is None


def test_a_gain_that_the_run_has_no_time_left_for_is_no_gain() -> None:
    """33 s are won back at 10 steps of 10 s, 3.3 at one; a change of 5 s must be won back twice."""
    assert change(plan_on(A, B), plan_on(A, B, C), steps_left=10) is not None
    assert change(plan_on(A, B), plan_on(A, B, C), steps_left=1) is None


def test_a_gain_within_the_error_of_predictions_is_no_gain() -> None:
    assert change(plan_on(A, B), plan_on(A, B, C, step_time_s=5.9), steps_left=10**6) is None


@pytest.mark.parametrize("steps_left", [1, 10**6])
def test_a_node_that_will_go_is_left_whatever_that_costs(steps_left: int) -> None:
    found = change(plan_on(A, B), plan_on(A), leaving={B}, steps_left=steps_left)
    assert found is not None
    assert found.kind == "drain"
    assert found.reason == "node bbbb will go: 2 -> 1 workers"


def test_a_node_that_will_go_and_is_not_used_matters_to_nobody() -> None:
    assert change(plan_on(A), plan_on(A), leaving={B}) is None


def test_a_slow_node_is_left_out_when_the_others_are_faster_alone() -> None:
    """Three nodes wait for one that is twice as slow: two alone take 6 s where the three take 8."""
    found = change(plan_on(A, B, C), plan_on(A, B), slow={C: 2.0})
    assert found is not None
    assert found.kind == "eviction"
    assert found.reason == "without node cccc, slower by 2.00: 3 -> 2 workers, 0.75 of the step time (predicted)"


def test_a_slow_node_stays_when_the_others_would_be_slower_without_it() -> None:
    assert change(plan_on(A, B), plan_on(A), slow={B: 1.6}) is None
    assert change(plan_on(A, B), plan_on(A), slow={B: 2.5}) is not None


def test_a_slow_node_is_changed_for_a_spare_one() -> None:
    found = change(plan_on(A, B), plan_on(A, C), slow={B: 1.3})
    assert found is not None
    assert found.kind == "eviction"
