"""What a restart gains by copies of the checkpoint in the memory of a node, and what they cost a save.

29 million parameters with their moments (350 MB), by one rank, copied to two nodes' memories in processes of their own:
seconds to load from memory, from storage that is in the page cache and from storage that is not; CPU-seconds and
seconds of a save with copies and without. BENCH_ROUNDS sets how often. Writes results/restore.json.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
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


@contextlib.contextmanager
def nodes(count: int) -> Iterator[dict[str, psutil.Process]]:
    """Their processes by address."""
    context = multiprocessing.get_context("spawn")
    pipes, found, started = [], {}, []
    for _ in range(count):
        mine, theirs = context.Pipe()
        process = context.Process(target=hold, args=(theirs, TOKEN))
        process.start()
        theirs.close()
        found[mine.recv()] = psutil.Process(process.pid)
        pipes.append(mine)
        started.append(process)
    try:
        yield found
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join(60)


def fragments(step: int) -> list[Fragment]:
    generator = torch.Generator().manual_seed(step)
    return [
        Fragment(
            f"layers.{layer}.weight",
            SHAPE,
            Box.whole(SHAPE),
            {kind: torch.rand(SHAPE, generator=generator) for kind in (PARAM, *MOMENTS)},
        )
        for layer in range(LAYERS)
    ]


def cpu_s(*processes: psutil.Process) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def saved(uri: str, step: int, copies: Copies | None, holders: list[psutil.Process]) -> tuple[dict[str, float], Commit]:
    state, made, timings = fragments(step), [], []
    saver = Saver(
        uri, 1, Retention(last=1), lambda commit, timing: (made.append(commit), timings.append(timing)), copies
    )
    saver.save(Position(step=step, updates=step, past={}), state)  # also makes the room
    saver.wait()
    own, theirs = cpu_s(psutil.Process()), cpu_s(*holders)
    saver.save(Position(step=step + 1, updates=step, past={}), state)
    saver.wait()
    used = {"rank_cpu_s": cpu_s(psutil.Process()) - own, "nodes_cpu_s": cpu_s(*holders) - theirs}
    return used | {"saved_s": timings[1].saved_s}, made[1]


def load_s(uri: str, commit: Commit, into: list[Fragment], copies: Copies | None = None) -> float:
    before = time.perf_counter()
    checkpoints.load(uri, commit, into, copies)
    return time.perf_counter() - before


def forget(uri: str) -> None:
    """Storage's files leave the page cache."""
    for file in Path(uri).rglob("*.distcp"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_restore(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    loads: dict[str, list[float]] = {"memory": [], "page cache": [], "disk": []}
    with nodes(2) as holders:
        ring = {str(number): address for number, address in enumerate(holders)}
        keeping = Copies.of(Places(token=TOKEN, ring=ring).as_json(), "0")
        for round_ in range(ROUNDS):
            for number, (way, copies) in enumerate({"without": None, "with": keeping}.items()):
                uri = str(tmp_path / f"{way}-{round_}")
                used, commit = saved(uri, 1000 * round_ + 10 * number + 1, copies, list(holders.values()))
                found[way].append(used)
            listings = {address: Holder(address, TOKEN).listing() for address in holders}
            places = Places(token=TOKEN, ring=ring, found=memory_copies.found(listings, commit))
            into = fragments(0)
            loads["page cache"].append(load_s(uri, commit, into))
            forget(uri)
            loads["disk"].append(load_s(uri, commit, into))
            for file in Path(uri).rglob("*.distcp"):
                file.unlink()
            loads["memory"].append(load_s(uri, commit, into, Copies.of(places.as_json(), "0")))
            assert all(
                torch.equal(one.tensors[kind], other.tensors[kind])
                for one, other in zip(into, fragments(commit.step - 1), strict=True)
                for kind in one.tensors
            ), "what is loaded is what was saved"
    print(f"\n{commit.bytes / 1e6:.0f} MB, {ROUNDS} rounds; median (least to most)")
    for origin, seconds in loads.items():
        print(f"load from {origin:28} {_row(seconds)} s")
    for way, rows in found.items():
        for key in rows[0]:
            print(f"save {way:8} copies, {key:16} {_row([row[key] for row in rows])} s")
    save("restore", {"bytes": commit.bytes, "load_s": loads, "saves": found})
    assert statistics.median(loads["memory"]) < 2 * statistics.median(loads["page cache"]) + 0.2


def _row(values: list[float]) -> str:
    return f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"
