"""Room on storage: a person is told before it is full, and older checkpoints go before a save that would not fit."""

from __future__ import annotations

import logging
import math
import os

from orchestrator import storage
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints

log = logging.getLogger(__name__)

WANTED = 3
"""Checkpoints that there should be room for."""
POLL_S = 60.0
INODES = 1000
"""With fewer left a file system counts as full."""


def free_bytes(uri: str, quota_gib: float | None) -> float:
    """Bytes that may still be stored below a directory: what its quota leaves, and its file system has.

    Infinite on S3 without a quota. With one, everything below the directory is listed.
    """
    left = math.inf
    if quota_gib is not None:
        left = quota_gib * 2**30 - sum(entry.bytes for entry in storage.list_entries(uri))
    if storage.is_s3(uri):
        return max(left, 0.0)
    disk = os.statvfs(uri)
    full = disk.f_files and disk.f_favail < INODES
    return max(min(left, 0 if full else disk.f_bavail * disk.f_frsize), 0.0)


class StorageWatch:
    """Says once that a run's storage is about to be full, and again after it has had room meanwhile."""

    def __init__(self, run: RunDir, quota_gib: float | None) -> None:
        self._run = run
        self._quota_gib = quota_gib
        self._next_s = -math.inf
        self._low = False

    def poll(self, now_s: float) -> None:
        """Look, if it is time to. Raises nothing: a storage that cannot be asked is told of by who writes to it.

        Args:
            now_s: by a clock that only goes forward.
        """
        if now_s < self._next_s or (storage.is_s3(self._run.uri) and self._quota_gib is None):
            return
        self._next_s = now_s + POLL_S
        try:
            self._look()
        except Exception as error:
            log.warning("cannot tell how much room %s has: %s", self._run.uri, str(error) or type(error).__name__)

    def _look(self) -> None:
        free, need = (
            free_bytes(self._run.uri, self._quota_gib),
            WANTED * checkpoints.checkpoint_bytes(self._run.checkpoints),
        )
        low = free < need
        if low and not self._low:
            log.warning("storage: %.2f GB left, and %d checkpoints take %.2f GB", free / 1e9, WANTED, need / 1e9)
            self._run.log_event("storage_low", free_bytes=int(free), need_bytes=need)
        self._low = low
