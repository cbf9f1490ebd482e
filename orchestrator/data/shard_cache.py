"""Shards of s3:// corpora as local files: one cache a node, shared by all of its processes, bounded in bytes.

The folder holds

    <xxh3>.arrow          a shard, verified when it came; its time of access is its last use, and its time of
                          modification tells a reader that mapped it whether it is still as it came
    <xxh3>.<bytes>.part/  a download in progress: the room it has reserved, and its temporary files
    <xxh3>.lock           held while a shard is downloaded, from before its .part to after it
    folder.lock           held while room is made and while a shard is published

A lock is a flock, which the kernel releases however its holder ends: a .part whose lock is free was left by a killed
process. A shard's lock is taken before the folder's; the holder of the folder's lock only tries those of shards, and
the owner of a .part waits for nobody, so no circle of processes can wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import storage
from orchestrator.errors import LastingStorageError, ShardLost, StorageError

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "TERRANE_CACHE_DIR"
BOUND_VARIABLE = "TERRANE_CACHE_GIB"
DEFAULT_GIB = 16.0
LOST_HINT = "restore it and run the same command, or let training go on without it (train.max_lost_shards=1)"

_PAUSES_S = (0.5, 2.0)
"""Between the attempts to download a shard, which are one more."""
_POLL_S = 0.05
"""How often a process looks whether downloads of others have left it room."""
_FOLDER = "folder"
"""Name of the lock of the folder."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Names of other shapes are not the cache's: it must never delete what a user keeps in the same folder.
_SHARD = re.compile(r"[0-9a-f]{32}\.arrow")
_UNFINISHED = re.compile(r"([0-9a-f]{32})\.(?:lock|\d+\.part)")


def node_cache() -> ShardCache:
    """The cache of this node: in $TERRANE_CACHE_DIR, or terrane-cache-<uid> in the directory for temporary files.

    It is bounded to $TERRANE_CACHE_GIB, 16 unless told, and never takes more than half of the disk's free space, in
    which what the cache holds already counts as free.

    Raises:
        StorageError: the folder cannot be made, or the bound is no positive number.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(storage.absolute(chosen)) if chosen else Path(tempfile.gettempdir(), f"terrane-cache-{os.getuid()}")
    if chosen and storage.is_s3(chosen):
        raise LastingStorageError(
            f"{FOLDER_VARIABLE}={chosen} is no folder", "set it to a folder on a disk of this node"
        )
    with _folder_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(folder).free + sum(file.bytes for file in _shard_files(folder))
    return ShardCache(folder, int(min(_gib_asked() * 2**30, disk / 2)))


class ShardCache:
    """Shards by their content. Any number of processes and threads may share the folder, each with its own object.

    Args:
        folder: on a disk of this node; made when it is first needed.
        max_bytes: of finished shards and of downloads in progress together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def fetch(self, uri: str, size: int, xxh3: str) -> Path:
        """A local file with the content of uri, whose xxh3-128 hex digest is xxh3.

        Content was verified when it was downloaded, and not since: the caller hashes a file that it maps, and discards
        one that is damaged. The file may be deleted for another shard's sake as soon as it is returned; a mapping
        outlives that, and who finds no file to map fetches it again.

        Raises:
            ShardLost: the shard is missing, or remains damaged after the retries.
            StorageError: storage cannot be read; the disk is full; the folder cannot be written; the shard is larger
                than the cache.
        """
        path = self._path(xxh3)
        if _used(path, size):
            return path
        if size > self._max_bytes:
            raise LastingStorageError(
                f"shard {uri} has {_gib(size)}, and the shard cache {self._folder} may hold {_gib(self._max_bytes)}",
                f"raise {BOUND_VARIABLE}, or set {FOLDER_VARIABLE} to a folder on a larger disk",
            )
        with _folder_named(self._folder):
            try:
                self._obtain(uri, size, xxh3)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                log.warning("the disk of the shard cache %s is full; deleting shards to hold %s", self._folder, uri)
                with self._locked(_FOLDER):
                    self._evict(size)
                self._obtain(uri, size, xxh3)
        return path

    def discard(self, xxh3: str) -> None:
        """Forget a shard whose file is damaged, so that the next fetch downloads it."""
        with _folder_named(self._folder):
            self._path(xxh3).unlink(missing_ok=True)

    def _path(self, xxh3: str) -> Path:
        return self._folder / f"{xxh3}.arrow"

    def _obtain(self, uri: str, size: int, xxh3: str) -> None:
        """Download the shard, or wait for the process that does."""
        path = self._path(xxh3)
        with self._locked(xxh3):
            if _used(path, size):
                return
            path.unlink(missing_ok=True)  # of another size
            self._delete_parts(xxh3)  # a killed process left them, or its lock were not ours
            part = self._reserve(size, xxh3)
            try:
                _download(uri, part / "shard", size, xxh3)
                with self._locked(_FOLDER):  # who counts meanwhile must find it as a .part or as a shard, once
                    # Not synced: a crash of the machine may leave zeros here, which the caller's own hash finds.
                    (part / "shard").replace(path)
                    part.rmdir()
            finally:
                shutil.rmtree(part, ignore_errors=True)

    def _reserve(self, size: int, xxh3: str) -> Path:
        """The directory to download a shard to; while it is there, it counts as size bytes. The shard's lock is ours.

        Waits while others download so much that the bound has no room left.
        """
        part = self._folder / f"{xxh3}.{size}.part"
        while True:
            with self._locked(_FOLDER):
                room = self._max_bytes - self._reserved()
                if size <= room:
                    held = sum(file.bytes for file in _shard_files(self._folder))
                    self._evict(held + size - room)
                    part.mkdir()
                    return part
            time.sleep(_POLL_S)

    def _reserved(self) -> int:
        """Bytes of the downloads in progress. What killed processes left is deleted on the way."""
        found = (_UNFINISHED.fullmatch(path.name) for path in self._folder.iterdir())
        reserved = 0
        for xxh3 in {match[1] for match in found if match}:
            with self._locked(xxh3, wait=False) as abandoned:
                if abandoned:
                    self._delete_parts(xxh3)
                else:
                    reserved += sum(int(part.name.split(".")[1]) for part in self._parts(xxh3))
        return reserved

    def _evict(self, excess: int) -> None:
        """Delete the least recently used shards until so many bytes are gone. The folder's lock is ours."""
        for file in sorted(_shard_files(self._folder), key=lambda file: file.used_ns):
            if excess <= 0:
                return
            file.path.unlink(missing_ok=True)
            excess -= file.bytes

    def _parts(self, xxh3: str) -> list[Path]:
        return list(self._folder.glob(f"{xxh3}.*.part"))

    def _delete_parts(self, xxh3: str) -> None:
        for part in self._parts(xxh3):
            shutil.rmtree(part)

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock of the folder; yields False if another holds it and we do not wait."""
        path = self._folder / f"{name}.lock"
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
                if not _is_open(path, file.fileno()):
                    continue  # its last holder deleted it while we waited
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                    # Closing is not enough where a child that was forked meanwhile has the file open too.
                    fcntl.flock(file, fcntl.LOCK_UN)
                return


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    bytes: int
    used_ns: int


def _shard_files(folder: Path) -> list[_File]:
    """The finished shards; one that vanishes meanwhile is passed over."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if _SHARD.fullmatch(path.name):
                stat = path.stat()
                files.append(_File(path=path, bytes=stat.st_size, used_ns=stat.st_atime_ns))
    return files


def _used(path: Path, size: int) -> bool:
    """Whether a shard is there in its size; it then counts as used now."""
    try:
        stat = path.stat()
        if stat.st_size != size:
            return False
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a shard that we may only read is as good
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and os.access(path, os.R_OK)
    return True


def _is_open(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _download(uri: str, local: Path, size: int, xxh3: str) -> None:
    """Download and verify a shard; nothing is left at local if that fails.

    Raises:
        OSError: the disk is full.
        StorageError: what was wrong with the shard each time.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            # Before its bytes: a wrong object may be of any size, and there is room for the right one only.
            _check(storage.size(uri) == size, uri, f"its size is not the manifest's {size}")
            storage.download(uri, local)
            _check(local.stat().st_size == size, uri, f"not all of its {size} bytes arrived")
            _check(_hash(local) == xxh3, uri, f"its hash is not the manifest's {xxh3}")
            return
        except Exception as error:  # boto3 raises a dozen unrelated classes
            local.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise
            told = _explained(error, uri)
            if pause_s is None:
                raise told from error
            log.warning("%s; trying again in %s s", told, pause_s)
            time.sleep(pause_s)


def _check(right: bool, uri: str, what: str) -> None:
    if not right:
        raise ShardLost(f"shard {uri} is damaged: {what}", LOST_HINT)


def _explained(error: Exception, uri: str) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, FileNotFoundError):  # retried like the others: what was just written may show late
        return ShardLost(f"shard {uri} is missing", LOST_HINT)
    hint = "check the bucket, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
    return StorageError(f"shard {uri} cannot be read: {error}", hint)


def _hash(path: Path) -> str:
    import xxhash

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextlib.contextmanager
def _folder_named(folder: Path) -> Iterator[None]:
    """Errors of the file system become errors that name the cache."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            hint = f"free some space, or set {FOLDER_VARIABLE} to a folder on a larger disk"
            raise StorageError(f"the disk of the shard cache {folder} is full: {error.strerror}", hint) from error
        message = f"cannot use the shard cache {folder}: {error.strerror or error}"
        raise StorageError(message, f"set {FOLDER_VARIABLE} to a folder on this node that can be written") from error


def _gib_asked() -> float:
    text = os.environ.get(BOUND_VARIABLE) or str(DEFAULT_GIB)
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise LastingStorageError(
        f"{BOUND_VARIABLE}={text!r} is no positive number", "set it to the GiB that shards may take"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
