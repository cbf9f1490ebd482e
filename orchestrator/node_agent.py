"""The agent of a run on a node: it holds the node's devices, sends waiting workers off, and sees how they end.

One Ray actor a node, which outlives attempts and ends with the driver. Its workers' processes are watched by the kernel
(pidfd), so that a death is known at once; what a worker raises it tells its agent before Ray Train hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.examiner import Examiner
from orchestrator.train import beats, stacks
from orchestrator.train.beats import Sign

OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")
"""Where the kernel counts the processes that it killed for want of memory: of this container, of the machine."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a worker."""

    kind: Literal["arrived", "failed", "finished", "died"]
    """arrived: it waits for a job. failed: it raised `error`. died: its process ended without a word."""
    group: str
    rank: int
    error: BaseException | None = None
    oom_kills: int = 0
    """By how much the kernel's count has grown since the worker started."""
    node_memory_share: float = 0.0
    """Of the node's memory that was in use."""


@dataclass
class _Group:
    """The workers of an attempt on this node, from before it begins."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    job: dict[str, Any] | None = None
    pids: dict[int, int] = field(default_factory=dict)
    """Of the ranks whose process is there."""
    settled: set[int] = field(default_factory=set)
    """Ranks that have failed or finished: their process may end."""
    folder: str = ""
    """Of their beats and stacks, as long as one of the processes is there."""
    last_signs: dict[int, Sign | None] = field(default_factory=dict)
    """Of the ranks whose process is gone."""


class NodeAgent(Examiner):
    """Call it from asyncio alone, as a Ray actor does."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._reports: list[Report] = []
        self._news = asyncio.Event()

    # --- for the supervisor -------------------------------------------------------------------------------------------

    async def devices(self) -> list[int]:
        """The ids of the devices that Ray gave this agent; none on a CPU node."""
        import ray

        return [int(number) for number in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]

    async def news(self, seen: int) -> list[Report]:
        """The reports after the first `seen`; waits until there is one."""
        while len(self._reports) <= seen:
            self._news.clear()
            await self._news.wait()
        return self._reports[seen:]

    async def go(self, group: str, job: dict[str, Any] | None) -> None:
        """Send the waiting workers of a group off, and those that are still to come; without a job, home."""
        found = self._group(group)
        found.job = job
        found.go.set()

    async def end(self, group: str) -> None:
        """End what is left of a group's processes; returns when they are gone."""
        found = self._group(group)
        found.job = None
        found.go.set()
        for pid in list(found.pids.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while found.pids:
            await asyncio.sleep(0.01)

    async def signs(self, group: str) -> dict[int, Sign | None]:
        """What each rank of a group on this node last said of itself, also of those whose process is gone."""
        found = self._group(group)
        return {**found.last_signs, **{rank: beats.read(beats.path(found.folder, rank)) for rank in found.pids}}

    async def states(self, group: str) -> dict[int, str]:
        """Of the processes of a group, by rank; see orchestrator.train.stacks.state."""
        return {rank: stacks.state(pid) for rank, pid in self._group(group).pids.items()}

    async def stacks(self, group: str, timeout_s: float = 5.0) -> dict[int, str]:
        """What each rank of a group on this node is doing, thread by thread."""
        found = self._group(group)
        paths = {rank: stacks.path(found.folder, rank) for rank in found.pids}
        return await asyncio.to_thread(stacks.collect, dict(found.pids), paths, timeout_s)

    # --- for the workers ----------------------------------------------------------------------------------------------

    async def register(self, group: str, rank: int, pid: int) -> str:
        """Watch a worker's process from now on.

        Returns:
            the folder where the worker keeps its beat, and answers for its stacks (orchestrator.train.beats, stacks).
        """
        found = self._group(group)
        before = oom_kills()
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._tell(Report(kind="died", group=group, rank=rank))
            return found.folder
        if not found.pids:
            found.folder = tempfile.mkdtemp(prefix="terrane-group-")
        found.pids[rank] = pid

        def ended() -> None:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
            del found.pids[rank]
            found.last_signs[rank] = beats.read(beats.path(found.folder, rank))
            if not found.pids:
                shutil.rmtree(found.folder, ignore_errors=True)
            if rank not in found.settled:
                kills, share = oom_kills() - before, memory_share()
                self._tell(
                    Report(kind="died", group=group, rank=rank, oom_kills=kills, node_memory_share=share),
                )

        asyncio.get_running_loop().add_reader(handle, ended)
        return found.folder

    async def arrive(self, group: str, rank: int) -> dict[str, Any] | None:
        """Wait for the job. None: there is none, go home."""
        self._tell(Report(kind="arrived", group=group, rank=rank))
        found = self._group(group)
        await found.go.wait()
        if found.job is None:
            found.settled.add(rank)
        return found.job

    async def failed(self, group: str, rank: int, error: BaseException) -> None:
        self._group(group).settled.add(rank)
        self._tell(Report(kind="failed", group=group, rank=rank, error=error))

    async def finished(self, group: str, rank: int) -> None:
        self._group(group).settled.add(rank)
        self._tell(Report(kind="finished", group=group, rank=rank))

    def _group(self, name: str) -> _Group:
        return self._groups.setdefault(name, _Group())

    def _tell(self, report: Report) -> None:
        self._reports.append(report)
        self._news.set()


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, as far as this container can see."""
    for path in OOM_COUNTERS:
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def memory_share() -> float:
    """Of the machine's memory that is in use."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0])
    if not values.get("MemTotal"):
        return 0.0
    return 1 - values["MemAvailable"] / values["MemTotal"]
