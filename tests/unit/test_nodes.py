"""Nodes that a run leaves out, and what it measured of the others."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import nodes
from orchestrator.accelerators import Node, NodePool
from orchestrator.errors import SilentCorruption
from orchestrator.findings import DeviceResult, Link, NodeResult, StorageResult
from orchestrator.nodes import Examination
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


def planned(run: RunDir, least: int = 1) -> Any:
    settings = recipe(root_of(run), workers={"min": least, "max": 6}, global_batch_size=24)
    return nodes.plan_around(run, settings, model_shape(settings, 300), [POOL])


def test_a_node_is_left_out_after_its_second_verdict(run: RunDir) -> None:
    nodes.note_corruption(run, 1, corruption("node-1"))
    assert "node-1" in planned(run).node_ids, "once is no pattern"
    nodes.note_corruption(run, 2, corruption("node-1"))
    found = planned(run)
    assert found.node_ids == ("node-0", "node-2")
    assert found.workers_by_node == (2, 2)
    assert "without node-1 (10.0.0.1): computed wrong numbers (attempt 1 step 7, attempt 2 step 7)" in found.reason


def test_a_node_is_left_out_at_once_when_it_is_quarantined(run: RunDir) -> None:
    nodes.quarantine(run, "node-1", "b", "copies memory at 1 GB/s")
    assert planned(run).node_ids == ("node-0", "node-2")
    assert planned(run).reason.endswith("; without node-1 (10.0.0.1): copies memory at 1 GB/s")
    (event,) = (event for event in run.events() if event["event"] == "node_quarantined")
    assert (event["node_id"], event["host"], event["reason"]) == ("node-1", "b", "copies memory at 1 GB/s")


def test_the_second_verdict_is_told_as_a_quarantine(run: RunDir) -> None:
    for attempt in (1, 2, 3):
        nodes.note_corruption(run, attempt, corruption("node-1"))
    told = [event["reason"] for event in run.events() if event["event"] == "node_quarantined"]
    assert told == ["computed wrong numbers (attempt 1 step 7, attempt 2 step 7)"]


def test_what_may_be_mended_is_tried_again_and_what_computed_wrong_numbers_is_not(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.quarantine(run, "node-0", "a", "slow")
    nodes.quarantine(run, "node-1", "b", "computes wrong numbers", for_good=True)
    assert planned(run).node_ids == ("node-2",)
    later = time.time() + nodes.VALID_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert planned(run).node_ids == ("node-0", "node-2")
    assert set(nodes.left_out(run)) == {"node-1"}


def test_without_the_quarantine_file_every_node_is_trusted_again(run: RunDir) -> None:
    nodes.quarantine(run, "node-1", "b", "computes wrong numbers", for_good=True)
    Path(run.quarantined_nodes).unlink()
    assert len(planned(run).node_ids) == 3


def test_a_slow_node_is_taken_back_before_one_that_computes_wrong_numbers(run: RunDir) -> None:
    nodes.quarantine(run, "node-0", "a", "slow")
    nodes.quarantine(run, "node-1", "b", "computes wrong numbers", for_good=True)
    assert planned(run, least=4).node_ids == ("node-0", "node-2")


def test_two_that_only_differ_from_each_other_stay(run: RunDir) -> None:
    for attempt in range(1, 4):
        nodes.note_corruption(run, attempt, corruption("node-1", sure=False))
    assert "node-1" in planned(run).node_ids


def test_the_run_goes_on_with_a_suspect_where_it_cannot_do_without(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt, node in enumerate(["node-0", "node-1", "node-2"] * 2, 1):
        nodes.note_corruption(run, attempt, corruption(node))
    assert len(planned(run).node_ids) == 3
    assert "no plan does without the nodes in quarantine, node-0 (10.0.0.0)" in caplog.text


def test_status_names_suspects(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 5)
    nodes.note_corruption(run, 1, corruption("node-1"))
    nodes.note_corruption(run, 2, corruption("node-1", sure=False))
    told = describe(summarize(run))
    assert "node node-1 on a: computed wrong numbers (attempt 1 step 7) and perhaps did (attempt 2 step 7)" in told
    assert summarize(run)["quarantined_nodes"][0]["verdicts"][0]["rank"] == 1
    assert [event["step"] for event in run.events() if event["event"] == "corruption"] == [7, 7]


def test_status_tells_of_an_attempt_without_a_step(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 5)
    run.log_event("attempt_started", attempt=2, workers=3, resume_step=5)
    assert "attempt 2    3 workers, no step yet, no end recorded" in describe(summarize(run))


def test_the_error_keeps_its_suspects_between_processes() -> None:
    error = corruption("node-1")
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.step, again.suspects) == (error.message, error.step, error.suspects)


# --- examinations -----------------------------------------------------------------------------------------------------


def examination(*flops: float, links: dict[str, Link] | None = None) -> Examination:
    devices = tuple(DeviceResult(device=n, name="x", flops={"fp32": value}) for n, value in enumerate(flops))
    result = NodeResult(accelerator="cpu", devices=devices, storage=StorageResult(latency_s=0.1))
    return Examination(time=time.time(), result=result, links=links or {})


def test_an_examination_is_kept_and_found_again(run_anywhere: RunDir) -> None:
    made = examination(1e11, links={"node-2": Link(latency_s=1e-4, bytes_per_s=1e9)})
    nodes.keep(run_anywhere, "node-1", made)
    assert nodes.examinations(run_anywhere, ["node-0", "node-1"]) == {"node-1": made}
    assert nodes.examinations(run_anywhere, ["node-0"]) == {}
    nodes.doubt(run_anywhere, "node-1")
    assert nodes.examinations(run_anywhere, ["node-1"]) == {}


def test_an_examination_does_not_hold_for_ever(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.keep(run, "node-1", examination(1e11))
    later = time.time() + nodes.VALID_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert nodes.examinations(run, ["node-1"]) == {}


def test_the_slowest_device_and_the_link_in_the_middle_are_the_speeds_of_a_node() -> None:
    links = {str(n): Link(latency_s=n, bytes_per_s=n) for n in (1, 5, 9)} | {"broken": Link(error="refused")}
    found = nodes.speeds(examination(3e11, 2e11, links=links))
    assert (found.flops, found.link_bytes_per_s, found.link_latency_s) == ({"fp32": 2e11}, 5, 5)


def test_measured_speeds_reach_the_plan(run: RunDir) -> None:
    nominal = planned(run).step_time_s
    for name in ("node-0", "node-1", "node-2"):
        nodes.keep(run, name, examination(1e9))
    assert planned(run).step_time_s > nominal
