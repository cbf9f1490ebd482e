"""Ranks that hang, each in its own way, for the tests of their stacks.

python hanging_ranks.py FOLDER

Prints their pids, as JSON by way, once all hang; ends them, and itself, when its input ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.train import stacks

FOLDER = Path(sys.argv[1])


def spins_in_python() -> None:
    while True:
        pass


def keeps_the_interpreter_lock() -> None:
    sum(iter(int, 1))  # in C, without end


def waits_for_a_peer_in_gloo() -> None:
    process_group(0)
    dist.all_reduce(torch.zeros(1))


def waits_for_data() -> None:
    process_group(1)  # the peer that the one above waits for
    with Path(FOLDER, "shard").open("rb") as shard:
        shard.read()


def stands_still() -> None:
    """Until it is stopped."""
    threading.Event().wait()


def trains_in_a_thread() -> None:
    """As Ray Train has it."""
    thread = threading.Thread(target=stands_still)
    thread.start()
    thread.join()


def has_no_handler() -> None:
    signal.pause()


WAYS: list[Callable[[], None]] = [
    spins_in_python,
    keeps_the_interpreter_lock,
    waits_for_a_peer_in_gloo,
    waits_for_data,
    stands_still,
    trains_in_a_thread,
    has_no_handler,
]


def process_group(rank: int) -> None:
    address = f"file://{FOLDER}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=10))


def started(rank: int, way: Callable[[], None], ready: int) -> int:
    pid = os.fork()
    if pid == 0:
        if way is not has_no_handler:
            stacks.install(stacks.path(FOLDER, rank))
        os.write(ready, b".")
        way()
    return pid


def main() -> None:
    os.mkfifo(FOLDER / "shard")
    torch.set_num_threads(1)
    told, ready = os.pipe()
    pids = {way.__name__: started(rank, way, ready) for rank, way in enumerate(WAYS)}
    try:
        for _ in WAYS:
            os.read(told, 1)
        with Path(FOLDER, "shard").open("wb"):  # returns when the reader is there, so that the process group stands
            os.kill(pids["stands_still"], signal.SIGSTOP)
            print(json.dumps(pids), flush=True)
            sys.stdin.read()
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
