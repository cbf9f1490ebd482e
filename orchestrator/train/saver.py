"""The saver of a rank: copies its fragments to host memory, and writes and commits them while training goes on.

    training thread   wait for the save before -> copy the fragments -> go on training
    saver's thread    plan, write, hash, upload; copy to the memory of nodes -> commit (rank 0) -> tell of it, delete
                      what is not kept

The ranks' threads meet on a process group of their own, so that no collective of training's waits for storage. Imports
no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from orchestrator import storage
from orchestrator.errors import UserError
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position, Retention
from orchestrator.train.fragment_files import FragmentWriter, SaveFailed
from orchestrator.train.fragment_memory import Save
from orchestrator.train.fragments import Fragment
from orchestrator.train.memory_copies import Copies
from orchestrator.train.planners import FragmentSavePlanner

log = logging.getLogger(__name__)

PEERS_TIMEOUT = timedelta(minutes=30)
"""How much longer than the first rank the last may take to write."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a save."""

    waited_s: float
    """Until the save before was committed."""
    copied_s: float
    """To copy the fragments to host memory. Training stood still for this and the wait."""
    saved_s: float = 0.0
    """From the call to the commit."""


OnCommit = Callable[[Commit, Timing], object]


class Saver:
    """One rank's saves of an attempt, one in flight at most. Every rank makes one, and saves the same steps.

    Args:
        checkpoints_uri: the run's checkpoints.
        on_commit: called on rank 0 after each commit, in the saver's thread.
        free_bytes: of the storage. Where a checkpoint would not fit, those that stand go before it, but for the newest.
        copies: where files are kept besides, as well as may be: a save does not fail for want of a copy.
    """

    def __init__(
        self,
        checkpoints_uri: str,
        attempt: int,
        retention: Retention,
        on_commit: OnCommit,
        free_bytes: Callable[[], float] = lambda: math.inf,
        copies: Copies | None = None,
    ) -> None:
        self._uri = checkpoints_uri
        self._attempt = attempt
        self._retention = retention
        self._on_commit = on_commit
        self._free_bytes = free_bytes
        self._copies = copies or Copies()
        self._group = dist.new_group(backend="gloo", timeout=PEERS_TIMEOUT) if dist.is_initialized() else None
        self._host = HostMemory()
        self._saving: futures.Future[None] | None = None

    def save(self, position: Position, fragments: list[Fragment], held_out_loss: float | None = None) -> Timing:
        """Begin to save; blocks until the save before is committed and the fragments are copied.

        Raises:
            StorageError, SaveFailed: as `poll`, for the save before.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        copies = self._host.copy(fragments)
        timing = Timing(waited_s=waited - began, copied_s=time.perf_counter() - waited)
        saving = self._saving = futures.Future()
        arguments = (saving, began, timing, position, copies, held_out_loss)
        threading.Thread(target=self._run, args=arguments, name=f"save-{position.step}", daemon=True).start()
        return timing

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written."""
        return self._saving is not None and not self._saving.done()

    def poll(self) -> None:
        """Return at once.

        Raises:
            StorageError: the save does not count: this attempt has been replaced.
            SaveFailed: it failed on some rank. Every rank raises it.
            Exception: what `on_commit` raised, or deleting what is not kept, on rank 0.
        """
        if self._saving and self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Until the save in flight, if there is one, is committed and followed up. Raises what `poll` does."""
        if self._saving:
            self._saving.result()

    def close(self) -> None:
        """Wait for the save in flight, whatever becomes of it."""
        if self._saving:
            futures.wait([self._saving])

    def _run(
        self,
        saving: futures.Future[None],
        began: float,
        timing: Timing,
        position: Position,
        fragments: list[Fragment],
        held_out_loss: float | None,
    ) -> None:
        try:
            save = Save(self._attempt, position.step)
            commit = self._write(save, position, fragments, held_out_loss)
            if commit:
                self._on_commit(commit, replace(timing, saved_s=time.perf_counter() - began))
                checkpoints.retain(self._uri, self._retention, self._attempt)
            self._copies.commit(save)
        except BaseException as error:  # handed to the training thread
            saving.set_exception(error)
        else:
            saving.set_result(None)

    def _write(
        self, save: Save, position: Position, fragments: list[Fragment], held_out_loss: float | None
    ) -> Commit | None:
        """Returns the commit on rank 0, None on the others."""
        folder = checkpoints.attempt_folder(self._attempt)
        made: list[Commit] = []

        def publish(files: dict[str, int], metadata_xxh3: str) -> None:
            commit = Commit(
                attempt=self._attempt,
                position=position,
                held_out_loss=held_out_loss,
                files={f"{folder}/{name}": size for name, size in files.items()},
                metadata_xxh3=metadata_xxh3,
            )
            made.append(checkpoints.publish(self._uri, commit))

        uri = storage.join(checkpoints.step_directory(self._uri, position.step), folder)
        if self._group is None or dist.get_rank() == 0:
            self._make_room()
        with _one_error():
            dcp.save(
                {},
                storage_writer=FragmentWriter(uri, publish, partial(self._copies.keeping, save)),
                planner=FragmentSavePlanner(fragments),
                process_group=self._group,
                no_dist=self._group is None,
            )
        return made[0] if made else None

    def _make_room(self) -> None:
        """Nobody writes before the plan that this rank has a part in. An error would leave the others waiting."""
        try:
            free, need = self._free_bytes(), checkpoints.checkpoint_bytes(self._uri)
            if free < need:
                log.warning("storage: %.2f GB left for a checkpoint of %.2f GB: older ones go", free / 1e9, need / 1e9)
                checkpoints.retain(self._uri, replace(self._retention, last=1, aside=0), self._attempt)
        except Exception as error:
            log.warning("storage: no room was made: %s", str(error) or type(error).__name__)


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """The error of the ranks that failed as one that every rank can raise."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, UserError):
            raise cause from None
        raise SaveFailed(f"rank {rank}: {cause}") from error


class HostMemory:
    """Room for the fragments of a rank that is asked for once and used again by every copy."""

    def __init__(self) -> None:
        self._room: list[torch.Tensor] = []

    def copy(self, fragments: list[Fragment]) -> list[Fragment]:
        """The fragments as they are now. They hold until the next copy, as long as the layout stays the same."""
        tensors = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
        if [(room.shape, room.dtype) for room in self._room] != [(tensor.shape, tensor.dtype) for tensor in tensors]:
            self._room = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        for room, tensor in zip(self._room, tensors, strict=True):
            room.copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        copies = iter(self._room)
        return [replace(f, tensors={kind: next(copies) for kind in f.tensors}) for f in fragments]


__all__ = ["HostMemory", "SaveFailed", "Saver", "Timing"]
