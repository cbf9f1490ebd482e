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
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.examiner import Examiner
from orchestrator.train import beats, stacks
from orchestrator.train.beats import Sign
from orchestrator.train.fragment_memory import SHARE_OF_NODE, CopyServer, FragmentMemory, Held

OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")
"""Where the kernel counts the processes that it killed for want of memory: of this container, of the machine."""


Kind = Literal["arrived", "failed", "finished", "died", "slow"]
SAMPLE_S = 2.0
"""Between two looks at the machine's memory."""


@dataclass(frozen=True, kw_only=True)
class Introduction:
    devices: list[int]
    """The ids of the GPUs that Ray gave the agent; none on a CPU node."""
    memory_address: str
    """Where its memory is reached (train.fragment_memory); empty without."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a worker."""

    kind: Kind
    """arrived: it waits for a job. failed: it raised `error`. died: its process ended without a word. slow: it has
    found which ranks hold up the others."""
    group: str
    rank: int
    time: float
    """Of the report, in unix seconds."""
    node_id: str = ""
    """Where the agent stands; known to who asks it."""
    error: BaseException | None = None
    slow: dict[int, float] = field(default_factory=dict)
    """Of ranks that are slower than their peers, by how many times."""
    oom_kills: int = 0
    """By how much the kernel's count has grown in the last seconds."""
    node_memory_share: float = 0.0
    """Of the node's memory that was in use in the last seconds, at most."""


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
    """Call it from asyncio alone, as a Ray actor does.

    Args:
        token: that others must know to reach the copies of checkpoints in its memory; empty: it keeps none.
    """

    def __init__(self, token: str = "") -> None:
        self._groups: dict[str, _Group] = {}
        self._reports: list[Report] = []
        self._news = asyncio.Event()
        self._memory = FragmentMemory(int(SHARE_OF_NODE * memory_bytes())) if token else None
        self._token = token
        self._pressure: deque[Pressure] = deque([Pressure.now()], maxlen=2)
        self._sampling: asyncio.Task[None] | None = None

    # --- for the supervisor -------------------------------------------------------------------------------------------

    async def introduce(self) -> Introduction:
        """Once, before anything else."""
        import ray

        ids = [int(number) for number in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
        address = ""
        if self._memory:
            address = CopyServer(self._memory, self._token).start(ray.util.get_node_ip_address())
        return Introduction(devices=ids, memory_address=address)

    async def copies(self) -> list[Held]:
        """The files of checkpoints that are in memory here."""
        return self._memory.listing() if self._memory else []

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

    async def register(self, group: str, rank: int, pid: int) -> tuple[str, int]:
        """Watch a worker's process from now on.

        Returns:
            the folder where the worker keeps its beat, and answers for its stacks (orchestrator.train.beats, stacks);
            and the process of the agent, with which the worker ends.
        """
        found = self._group(group)
        self._sampling = self._sampling or asyncio.ensure_future(self._sample())
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._tell("died", group, rank)
            return found.folder, os.getpid()
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
                kills, share = self._pressure_before()
                self._tell("died", group, rank, oom_kills=kills, node_memory_share=share)

        asyncio.get_running_loop().add_reader(handle, ended)
        return found.folder, os.getpid()

    async def arrive(self, group: str, rank: int) -> dict[str, Any] | None:
        """Wait for the job. None: there is none, go home."""
        self._tell("arrived", group, rank)
        found = self._group(group)
        await found.go.wait()
        if found.job is None:
            found.settled.add(rank)
        return found.job

    async def failed(self, group: str, rank: int, error: BaseException) -> None:
        self._group(group).settled.add(rank)
        self._tell("failed", group, rank, error=error)

    async def finished(self, group: str, rank: int) -> None:
        self._group(group).settled.add(rank)
        self._tell("finished", group, rank)

    async def slow(self, group: str, rank: int, ratios: dict[int, float]) -> None:
        """What a rank has found of all of them."""
        self._tell("slow", group, rank, slow=ratios)

    def _group(self, name: str) -> _Group:
        return self._groups.setdefault(name, _Group())

    def _tell(self, kind: Kind, group: str, rank: int, **facts: Any) -> None:
        self._reports.append(Report(kind=kind, group=group, rank=rank, time=time.time(), **facts))
        self._news.set()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._pressure.append(Pressure.now())

    def _pressure_before(self) -> tuple[int, float]:
        """By how much the count of kills has grown of late, and how much of the memory was in use."""
        samples = [*self._pressure, Pressure.now()]
        return samples[-1].oom_kills - samples[0].oom_kills, max(sample.share for sample in samples)


@dataclass(frozen=True)
class Pressure:
    """On the memory of the machine."""

    oom_kills: int
    share: float

    @staticmethod
    def now() -> Pressure:
        return Pressure(oom_kills(), memory_share())


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
    values = _memory_info()
    return 1 - values["MemAvailable"] / values["MemTotal"] if values else 0.0


def memory_bytes() -> int:
    """Of the machine."""
    return _memory_info().get("MemTotal", 0) * 1024


def _memory_info() -> dict[str, int]:
    """KiB by name; nothing where the kernel does not tell."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0])
    return values
