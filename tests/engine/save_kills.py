"""Two ranks that save, one of which ends itself at the n-th call of its save that changes a file system, or asks S3.

Between two such calls a rank changes nothing, so these are all the points at which its end can make a difference.
The ranks are forked from a server that has torch imported, since there are many.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator import storage
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position, Retention
from orchestrator.train.fragments import MOMENTS, PARAM, Box, Fragment
from orchestrator.train.memory_copies import Copies
from orchestrator.train.saver import Saver

WORLD, DEADLINE_S = 2, 120
SHAPES = {"wide": (6, 4000), "odd": (3, 5)}
"""The first is larger than the buffer of a file, the second is not."""
BEFORE, SAVED, AFTER = 1, 2, 3
"""Steps: of the checkpoint that stands, of the save that is killed, of the attempt after it."""

CHANGES = {
    *("open", "replace", "link", "unlink", "rmdir", "fsync"),
    *(f"BufferedWriter.{name}" for name in ("write", "flush", "__exit__")),
}
"""What a save changes a file system by, as Python calls it. A directory counts for nothing until it holds a file."""


@dataclass(frozen=True)
class Kill:
    rank: int
    call: int


def value(name: str, kind: str, step: int) -> torch.Tensor:
    """What a tensor of the checkpoint of a step holds."""
    seed = f"{name}/{kind}/{step}"
    return torch.rand(SHAPES[name], generator=torch.Generator().manual_seed(sum(seed.encode()) + 1000 * step))


def fragments(step: int, rank: int = 0, world: int = 1) -> list[Fragment]:
    """The rows that a rank has."""
    found = []
    for name, shape in SHAPES.items():
        first, end = shape[0] * rank // world, shape[0] * (rank + 1) // world
        tensors = {kind: value(name, kind, step)[first:end].clone() for kind in (PARAM, *MOMENTS)}
        found.append(Fragment(name, shape, Box((first, 0), (end - first, shape[1])), tensors))
    return found


def position(step: int) -> Position:
    return Position(step=step, updates=step, past={"until": step})


def saver(uri: str, attempt: int, keep: int = 1, copies: Copies | None = None) -> Saver:
    return Saver(uri, attempt, Retention(last=keep), lambda commit, timing: None, copies=copies)


def loaded(uri: str, commit: Commit, copies: Copies | None = None, rank: int = 0, world: int = 1) -> bool:
    """Whether a checkpoint loads, and holds what was saved."""
    found = fragments(0, rank, world)
    checkpoints.load(uri, commit, found, copies)
    return commit.position == position(commit.step) and all(
        torch.equal(tensor, value(fragment.name, kind, commit.step)[fragment.box.slices])
        for fragment in found
        for kind, tensor in fragment.tensors.items()
    )


# --- the ranks --------------------------------------------------------------------------------------------------------


def saves(
    uri: str, folder: Path, kill: Kill | None, keep: int = 1, places: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Two ranks save step SAVED over a checkpoint of step BEFORE.

    Args:
        places: where copies are kept in memory; rank 0 is on node "0", rank 1 on node "1".

    Returns:
        Of each rank: its calls, and the error that it ended with; nothing of a rank that was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder.mkdir()
    processes = [
        context.Process(target=_rank, args=(rank, uri, folder, kill, keep, places, dict(os.environ)))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode is not None, "a rank waits for its peer for ever"
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def _rank(
    rank: int,
    uri: str,
    folder: Path,
    kill: Kill | None,
    keep: int,
    places: dict[str, Any] | None,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=30), WORLD, rank)
    calls = Calls(kill.call if kill and kill.rank == rank else None, on_s3=storage.is_s3(uri))
    mine = saver(uri, 1, keep, Copies.of(places, str(rank)))
    error = None
    calls.watch()
    try:
        mine.save(position(SAVED), fragments(SAVED, rank, WORLD))
        mine.wait()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    (folder / f"{rank}.json").write_text(json.dumps({"calls": calls.names, "error": error}))
    os._exit(0)


class Calls:
    """Counts the calls of the threads that start from now on, and ends the process before one of them.

    Args:
        last: the number of the call that is not made.
    """

    def __init__(self, last: int | None, on_s3: bool) -> None:
        self.names: list[str] = []
        self._last = last
        self._on_s3 = on_s3

    def watch(self) -> None:
        if self._on_s3:
            storage._s3().meta.events.register("before-call.s3", lambda model, **_: self._count(model.name))
        else:
            threading.setprofile(self._profile)

    def _profile(self, frame: Any, event: str, called: Callable[..., Any]) -> None:
        if event == "c_call" and called.__qualname__ in CHANGES:
            self._count(called.__qualname__)

    def _count(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def spread(names: list[str], most: int = 5) -> list[int]:
    """The numbers of some calls: of every run of the same call the first, the last, and a few in between. A file is
    written in hundreds of pieces."""
    chosen: list[int] = []
    for _, run in groupby(range(len(names)), key=names.__getitem__):
        calls = list(run)
        chosen += sorted({calls[round(part * (len(calls) - 1) / (most - 1))] for part in range(most)})
    return chosen
