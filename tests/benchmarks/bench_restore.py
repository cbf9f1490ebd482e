"""What a restart gains by copies of the checkpoint in the memory of a node, and what they cost a save.

29 million parameters with their moments (350 MB), by one rank, copied to two nodes' memories in processes of their own:
a load from memory, from storage that is in the page cache and from storage that is not; a save with copies and without.
Seconds of wall time, and of CPU of the rank and of the nodes' processes. BENCH_ROUNDS sets how often. Writes
results/restore.json.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from orchestrator.train import checkpoints, memory_copies
from orchestrator.train.checkpoints import Commit, Position, Retention
from orchestrator.train.fragment_memory import CopyServer, FragmentMemory, new_token
from orchestrator.train.fragments import MOMENTS, PARAM, Box, Fragment
from orchestrator.train.memory_copies import Copies, Holder, Places
from orchestrator.train.saver import Saver
from tests.benchmarks.measuring import save

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
LAYERS, SHAPE = 28, (1024, 1024)
TOKEN = new_token()


def hold(pipe: Connection, token: str) -> None:
    """A node's memory, until the other end of the pipe is closed."""
    server = CopyServer(FragmentMemory(2 * 10**9), token)
    pipe.send(server.start("127.0.0.1"))
    with contextlib.suppress(EOFError):
        pipe.recv()
    server.close()


class Nodes:
    def __init__(self, count: int) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[psutil.Process] = []
        self.addresses: list[str] = []
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=hold, args=(theirs, TOKEN))
        process.start()
        theirs.close()
        self.addresses.append(mine.recv())
        self._pipes.append(mine)
        self._processes.append(psutil.Process(process.pid))

    def cpu_s(self) -> float:
        return sum(map(cpu_s, self._processes))

    def copies(self, commit: Commit | None = None) -> Copies:
        """Of a rank on the first node."""
        listings = {address: Holder(address, TOKEN).listing() for address in self.addresses}
        found = memory_copies.found(listings, commit) if commit else {}
        ring = {str(number): address for number, address in enumerate(self.addresses)}
        return Copies.of(Places(token=TOKEN, ring=ring, found=found).as_json(), "0")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        psutil.wait_procs(self._processes, timeout=60)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def timed(nodes: Nodes, work: Callable[[], object]) -> dict[str, float]:
    rank, own, theirs, before = psutil.Process(), cpu_s(psutil.Process()), nodes.cpu_s(), time.perf_counter()
    work()
    took = time.perf_counter() - before
    return {"seconds": took, "CPU rank": cpu_s(rank) - own, "CPU nodes": nodes.cpu_s() - theirs}


def state(seed: int) -> list[Fragment]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Fragment(
            f"layers.{layer}.weight",
            SHAPE,
            Box.whole(SHAPE),
            {kind: torch.rand(SHAPE, generator=generator) for kind in (PARAM, *MOMENTS)},
        )
        for layer in range(LAYERS)
    ]


class Saves:
    """Of one state, in two ways that take turns."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self._state = state(1)
        self.commits: list[Commit] = []
        self._savers = {
            way: Saver(
                str(folder / way),
                1,
                Retention(last=1),
                lambda commit, timing: self.commits.append(commit),
                copies=copies,
            )
            for way, copies in {"without copies": None, "with copies": nodes.copies()}.items()
        }

    def save(self, way: str, step: int) -> None:
        self._savers[way].save(Position(step=step, updates=step, past={}), self._state)
        self._savers[way].wait()

    def is_in(self, fragments: list[Fragment]) -> bool:
        pairs = zip(fragments, self._state, strict=True)
        return all(torch.equal(one.tensors[kind], other.tensors[kind]) for one, other in pairs for kind in one.tensors)


def forget(uri: str) -> None:
    """Storage's files leave the page cache."""
    for file in Path(uri).rglob("*.distcp"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_restore(tmp_path: Path) -> None:
    nodes, uri = Nodes(2), str(tmp_path / "with copies")
    rows: dict[str, list[dict[str, float]]] = {}
    try:
        saves, into = Saves(tmp_path, nodes), state(2)
        for step in range(1, ROUNDS + 2):  # the first makes room
            for way in ("without copies", "with copies"):
                used = timed(nodes, lambda way=way, step=step: saves.save(way, step))  # type: ignore[misc]
                rows.setdefault(f"save {way}", []).append(used)
        commit = saves.commits[-1]
        for origin, copies in {"memory": nodes.copies(commit), "page cache": None, "disk": None}.items():
            for _ in range(ROUNDS):
                if origin == "disk":
                    forget(uri)
                into[0].tensors[PARAM].zero_()
                used = timed(nodes, lambda copies=copies: checkpoints.load(uri, commit, into, copies))  # type: ignore[misc]
                rows.setdefault(f"load from {origin}", []).append(used)
                assert saves.is_in(into), "what is loaded is what was saved"
    finally:
        nodes.close()
    print(f"\n{commit.bytes / 1e6:.0f} MB, {ROUNDS} rounds; median (least to most)")
    for name, values in rows.items():
        of_rounds = values[-ROUNDS:]
        print(f"{name:24}", *(f"{key} {_row([value[key] for value in of_rounds])}  " for key in of_rounds[0]))
    save("restore", {"bytes": commit.bytes, "rows": rows})


def _row(values: list[float]) -> str:
    return f"{statistics.median(values):6.3f} ({min(values):.3f} to {max(values):.3f})"
