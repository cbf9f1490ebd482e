"""Preflight: the process that measures a node, the node's side that starts it, and the driver's that asks all nodes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import examiner, nodes, storage
from orchestrator.errors import StorageError
from orchestrator.examiner import Examiner, NoAnswer, answer_of, examine
from orchestrator.findings import DeviceResult, Link, NodeResult, StorageResult
from orchestrator.links import Endpoint, LinkServer
from orchestrator.planning.plan import Plan
from orchestrator.preflight import preflight
from orchestrator.runs import RunDir
from tests.made_runs import recipe, root_of

# --- the process, and who starts it -----------------------------------------------------------------------------------


def test_a_node_is_measured_and_nothing_stays_behind(tmp_path: Path) -> None:
    found = asyncio.run(examine("cpu", [], ["fp32", "bf16"], 1, str(tmp_path), timeout_s=120))
    assert not found.error
    (device,) = found.devices
    assert (device.wrong, device.error) == ((), "")
    assert found.storage
    assert not found.storage.error
    assert min(device.flops["fp32"], device.bytes_per_s, found.storage.write_bytes_per_s) > 1e6
    assert device.typical_flops["fp32"] <= device.flops["fp32"]
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    from orchestrator.train.preflight import _storage

    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in _storage(str(tmp_path / "file")).error


def test_a_device_that_is_not_there_is_told() -> None:
    import torch

    from orchestrator.accelerators import CUDA
    from orchestrator.train.preflight import measure

    if torch.cuda.is_available():
        pytest.skip("this machine has what is to be missing")
    (device,) = measure(CUDA, [3], ["fp32"], torch.get_num_threads(), None).devices
    assert device.device == 3
    assert device.error


def test_every_core_is_tested_and_the_process_may_use_all_of_them_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from orchestrator.train import self_test
    from orchestrator.train.preflight import _wrong_answers

    cores = os.sched_getaffinity(0)
    bad = max(cores)
    monkeypatch.setattr(
        self_test, "wrong_answers", lambda *_: ["1 + 1 = 3"] if os.sched_getaffinity(0) == {bad} else []
    )
    assert _wrong_answers(torch.device("cpu"), "fp32") == [f"core {bad}: 1 + 1 = 3"]
    assert os.sched_getaffinity(0) == cores


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    hang = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(NoAnswer, match="did not answer within 2 s"):
        asyncio.run(answer_of([sys.executable, "-c", hang], timeout_s=2))
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_crashes_says_its_last_words() -> None:
    with pytest.raises(NoAnswer, match="ended with exit code 3: the driver is gone"):
        asyncio.run(
            answer_of([sys.executable, "-c", "import sys; print('the driver is gone', file=sys.stderr); exit(3)"], 60)
        )


def test_a_process_that_nobody_waits_for_ends_by_itself() -> None:
    command = [sys.executable, "-m", "orchestrator.train.preflight", "--accelerator=cpu", "--timeout-s=0.1"]
    with pytest.raises(NoAnswer, match="ended with exit code -14"):  # SIGALRM
        asyncio.run(answer_of(command, timeout_s=60))


def test_a_node_without_an_answer_has_a_result_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(command: list[str], timeout_s: float) -> str:
        raise NoAnswer("did not answer within 5 s")

    monkeypatch.setattr(examiner, "answer_of", silent)
    found = asyncio.run(examine("cuda", [0], ["fp32"], 1, "/x", 5))
    assert found == NodeResult(accelerator="cuda", error="preflight did not answer within 5 s")


def test_what_comes_back_from_storage_is_compared(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.probe(anywhere, 1000) > 0
    assert storage.list_files(anywhere) == []
    monkeypatch.setattr(storage, "read", lambda uri: b"other")
    with pytest.raises(StorageError, match="came back as something else"):
        storage.probe(anywhere, 1000)


# --- the driver -------------------------------------------------------------------------------------------------------

WELL = NodeResult(
    accelerator="cpu",
    devices=(DeviceResult(device=0, name="c", flops={"fp32": 1e11}, bytes_per_s=1e10),),
    storage=StorageResult(latency_s=0.01),
)


class _Remote:
    """A method as a Ray handle offers it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class FakeAgent:
    """Answers with given results, the last one again and again; its links are real ones, over loopback."""

    def __init__(self, *results: NodeResult | Exception) -> None:
        self.results = list(results)
        self.asked: list[dict[str, Any]] = []
        self._examiner = _OnLoopback()
        self.preflight = _Remote(self._preflight)
        self.open_link = _Remote(self._examiner.open_link)
        self.measure_link = _Remote(self._measure_link)
        self.close_link = _Remote(self._examiner.close_link)

    async def _preflight(self, **request: Any) -> NodeResult:
        self.asked.append(request)
        found = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(found, Exception):
            raise found
        return found

    async def _measure_link(self, endpoint: Endpoint) -> Link:
        link = await self._examiner.measure_link(endpoint)
        return Link(latency_s=1e-4, bytes_per_s=1e9) if not link.error else link


class _OnLoopback(Examiner):
    async def open_link(self) -> Endpoint:
        self._server = LinkServer("127.0.0.1")
        return self._server.endpoint


@pytest.fixture(autouse=True)
def no_server_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "link-server"]


def plan(*names: str) -> Plan:
    return Plan(
        accelerator="cpu",
        node_ids=names,
        workers_by_node=(1,) * len(names),
        data_parallel=len(names),
        micro_batch_size=1,
        accumulation=1,
        dtype="fp32",
        parameters=1,
        memory_bytes=1,
        step_time_s=1.0,
    )


def sent(run: RunDir, agents: dict[str, FakeAgent]) -> list[str]:
    """A preflight of all nodes; returns who was found bad."""
    hosts = {name: f"host of {name}" for name in agents}
    settings = recipe(root_of(run), cpus_per_worker=2)
    return [found.node_id for found in preflight(run, settings, plan(*agents), agents, {"a": [2, 3]}, hosts)]


def slow(result: NodeResult = WELL) -> NodeResult:
    return replace(result, devices=(replace(result.devices[0], flops={"fp32": 2e10}),))


def test_every_new_node_is_asked_once_and_its_numbers_are_kept(run: RunDir) -> None:
    agents = {name: FakeAgent(WELL) for name in "abc"}
    assert sent(run, agents) == []
    kept = nodes.examinations(run, "abc")
    assert {name: set(found.links) for name, found in kept.items()} == {"a": {*"bc"}, "b": {*"ac"}, "c": {*"ab"}}
    assert kept["a"].result == WELL
    assert agents["a"].asked[0]["devices"] == [2, 3]
    assert (agents["b"].asked[0]["devices"], agents["b"].asked[0]["threads"]) == ([], 2)
    (event,) = (event for event in run.events() if event["event"] == "preflight")
    assert (event["nodes"], event["bad"]) == (["a", "b", "c"], [])
    assert sent(run, agents) == []
    assert [len(agent.asked) for agent in agents.values()] == [1, 1, 1]


def test_a_node_that_joins_is_measured_alone_with_its_links(run: RunDir) -> None:
    agents = {name: FakeAgent(WELL) for name in "abc"}
    sent(run, agents)
    joined = agents | {"d": FakeAgent(WELL)}
    assert sent(run, joined) == []
    assert [len(agent.asked) for agent in joined.values()] == [1, 1, 1, 1]
    assert set(nodes.examinations(run, "d")["d"].links) == {*"abc"}


def test_a_node_that_a_failure_is_blamed_on_is_asked_again(run: RunDir) -> None:
    agents = {name: FakeAgent(WELL) for name in "ab"}
    sent(run, agents)
    nodes.doubt(run, "b")
    sent(run, agents)
    assert [len(agent.asked) for agent in agents.values()] == [1, 2]


def test_a_bad_node_is_quarantined_with_its_reason(run: RunDir) -> None:
    wrong = replace(WELL, devices=(replace(WELL.devices[0], wrong=("all",)),))
    assert sent(run, {"a": FakeAgent(WELL), "b": FakeAgent(wrong)}) == ["b"]
    assert nodes.left_out(run) == {"b": "device 0 (c) computes wrong numbers: all"}
    (node,) = nodes.read(run)
    assert (node["host"], node["findings"][0]["for_good"]) == ("host of b", True)


def test_a_slow_node_gets_a_second_look(run: RunDir) -> None:
    agents = {"a": FakeAgent(WELL), "b": FakeAgent(WELL), "c": FakeAgent(slow(), WELL)}
    assert sent(run, agents) == []
    assert [len(agent.asked) for agent in agents.values()] == [1, 1, 2]
    assert nodes.examinations(run, "c")["c"].result == WELL


def test_a_node_that_is_slow_twice_is_quarantined(run: RunDir) -> None:
    assert sent(run, {"a": FakeAgent(WELL), "b": FakeAgent(WELL), "c": FakeAgent(slow())}) == ["c"]
    assert "20% of the 100.0 that 3 such nodes have as median" in nodes.left_out(run)["c"]


def test_a_node_that_goes_away_meanwhile_is_passed_over(run: RunDir) -> None:
    assert sent(run, {"a": FakeAgent(WELL), "b": FakeAgent(ConnectionError("actor died")), "c": FakeAgent(WELL)}) == []
    assert set(nodes.examinations(run, "abc")) == {"a", "c"}
    assert nodes.left_out(run) == {}


def test_a_storage_that_no_node_can_write_ends_it(run: RunDir) -> None:
    broken = replace(WELL, storage=StorageResult(error="cannot write to /x: No space left on device"))
    with pytest.raises(StorageError, match="No space left"):
        sent(run, {"a": FakeAgent(broken), "b": FakeAgent(broken)})
    assert nodes.left_out(run) == {}
