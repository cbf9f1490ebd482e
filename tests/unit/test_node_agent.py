"""The agent of a node, with real processes, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import node_agent
from orchestrator.node_agent import NodeAgent, Report

Start = Callable[[], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that sleeps, and gives its pid."""
    processes: list[subprocess.Popen[bytes]] = []

    def sleeper() -> int:
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return processes[-1].pid

    yield sleeper
    for process in processes:
        process.kill()
        process.wait()


def within(work: Awaitable[Any], deadline_s: float = 30.0) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, deadline_s)

    return asyncio.run(bounded())


def test_a_killed_worker_is_reported_at_once(start: Start) -> None:
    async def life() -> list[Report]:
        agent, pid = NodeAgent(), start()
        await agent.register("g", 3, pid)
        os.kill(pid, signal.SIGKILL)
        return await agent.news(0)

    (report,) = within(life())
    assert (report.kind, report.group, report.rank) == ("died", "g", 3)


def test_a_worker_that_has_finished_may_end(start: Start) -> None:
    async def life() -> list[Report]:
        agent, pids = NodeAgent(), [start(), start()]
        for rank, pid in enumerate(pids):
            await agent.register("g", rank, pid)
        await agent.finished("g", 0)
        await agent.failed("g", 1, ValueError("x"))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await agent.end("g")
        return await agent.news(0)

    assert [(report.kind, report.rank) for report in within(life())] == [("finished", 0), ("failed", 1)]


def test_a_worker_that_was_gone_before_it_could_be_watched_has_died() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    async def life() -> list[Report]:
        agent = NodeAgent()
        await agent.register("g", 0, ended.pid)
        return await agent.news(0)

    assert within(life())[0].kind == "died"


def test_workers_wait_for_their_job_in_whatever_order_it_comes() -> None:
    async def life() -> list[Any]:
        agent = NodeAgent()
        early = asyncio.ensure_future(agent.arrive("g", 0))
        await agent.news(0)
        await agent.go("g", {"attempt": 1})
        late = await agent.arrive("g", 1)
        other = asyncio.ensure_future(agent.arrive("other", 0))
        await asyncio.sleep(0)
        waits = not other.done()
        await agent.go("other", None)
        return [await early, late, waits, await other]

    assert within(life()) == [{"attempt": 1}, {"attempt": 1}, True, None]


def test_the_end_of_a_group_spares_no_process_of_it_and_no_other(start: Start) -> None:
    async def life() -> tuple[list[int], int]:
        agent, pids, other = NodeAgent(), [start(), start()], start()
        os.kill(pids[0], signal.SIGSTOP)  # a stopped process ends, too
        for rank, pid in enumerate(pids):
            await agent.register("g", rank, pid)
        await agent.register("h", 0, other)
        await agent.end("g")
        return pids, other

    pids, other = within(life())
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.kill(other, 0)


def test_news_are_told_once_each_in_order() -> None:
    async def life() -> list[list[str]]:
        agent = NodeAgent()
        await agent.finished("g", 0)
        first = await agent.news(0)
        waiting = asyncio.ensure_future(agent.news(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        await agent.finished("g", 1)
        return [[f"{r.kind} {r.rank}" for r in reports] for reports in (first, await waiting)]

    assert within(life()) == [["finished 0"], ["finished 1"]]


def test_a_death_tells_of_processes_that_the_kernel_killed_for_memory(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 1\noom_kill 1\n")
    monkeypatch.setattr(node_agent, "OOM_COUNTERS", (str(counter),))

    async def life() -> list[Report]:
        agent, pid = NodeAgent(), start()
        await agent.register("g", 0, pid)
        counter.write_text("low 0\noom 2\noom_kill 3\n")
        os.kill(pid, signal.SIGKILL)
        return await agent.news(0)

    (report,) = within(life())
    assert report.oom_kills == 2
    assert 0 < report.node_memory_share < 1
