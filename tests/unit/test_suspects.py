"""Nodes that computed wrong numbers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from orchestrator import suspects
from orchestrator.accelerators import Node, NodePool
from orchestrator.errors import SilentCorruption
from orchestrator.planning.shape import model_shape
from orchestrator.runs import RunDir
from orchestrator.status import describe, summarize
from tests.made_runs import recipe, root_of, train

POOL = NodePool(
    accelerator="cpu",
    nodes=tuple(Node(id=f"node-{n}", address=f"10.0.0.{n}", cpus=2, gpus=0, memory_bytes=2**35) for n in range(3)),
)


def corruption(node: str, sure: bool = True) -> SilentCorruption:
    suspect = {"rank": 1, "host": "a", "node_id": node, "sure": sure}
    return SilentCorruption("wrong", step=7, suspects=(suspect,))


def planned(run: RunDir, **values: Any) -> Any:
    settings = recipe(root_of(run), workers={"min": 1, "max": 6}, global_batch_size=24, **values)
    return suspects.plan_around(run, settings, model_shape(settings, 300), [POOL])


def test_a_node_is_left_out_after_its_second_verdict(run: RunDir) -> None:
    suspects.note(run, 1, corruption("node-1"))
    assert "node-1" in planned(run).node_ids, "once is no pattern"
    suspects.note(run, 2, corruption("node-1"))
    found = planned(run)
    assert found.node_ids == ("node-0", "node-2")
    assert found.workers_by_node == (2, 2)
    assert "without node-1 (10.0.0.1), which computed wrong numbers" in found.reason


def test_two_that_only_differ_from_each_other_stay(run: RunDir) -> None:
    for attempt in range(1, 4):
        suspects.note(run, attempt, corruption("node-1", sure=False))
    assert "node-1" in planned(run).node_ids


def test_the_run_goes_on_with_a_suspect_where_it_cannot_do_without(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt, node in enumerate(["node-0", "node-1", "node-2"] * 2, 1):
        suspects.note(run, attempt, corruption(node))
    assert len(planned(run).node_ids) == 3
    assert "goes on with nodes that computed wrong numbers" in caplog.text


def test_status_names_suspects(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 5)
    suspects.note(run, 1, corruption("node-1"))
    suspects.note(run, 2, corruption("node-1", sure=False))
    told = describe(summarize(run))
    assert "node node-1 on a computed wrong numbers (attempt 1 step 7) and perhaps did (attempt 2 step 7)" in told
    assert summarize(run)["suspect_nodes"][0]["verdicts"][0]["rank"] == 1
    assert [event["step"] for event in run.events() if event["event"] == "corruption"] == [7, 7]


def test_status_tells_of_an_attempt_without_a_step(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 5)
    run.log_event("attempt_started", attempt=2, workers=3, resume_step=5)
    assert "attempt 2    3 workers, no step yet, no end recorded" in describe(summarize(run))


def test_the_error_keeps_its_suspects_between_processes() -> None:
    error = corruption("node-1")
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.step, again.suspects) == (error.message, error.step, error.suspects)
