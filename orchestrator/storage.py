"""Bytes on storage: one set of functions for local paths and s3:// URIs, and the only import of boto3.

A `write` is atomic: readers see the old object or the new one. A `create` succeeds for exactly one of many writers
(O_EXCL through a hard link locally, If-None-Match on S3); every claim and every commit of a run rests on it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from orchestrator.errors import LastingStorageError, StorageError

log = logging.getLogger(__name__)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """The URI as other nodes and other working directories can use it."""
    if "://" in uri and not is_s3(uri):
        raise LastingStorageError(f"storage {uri!r} has an unknown scheme", "use a local path or s3://bucket/prefix")
    try:
        return uri.rstrip("/") if is_s3(uri) else str(Path(uri).expanduser().resolve())
    except (RuntimeError, ValueError, OSError) as error:
        raise StorageError(f"{uri!r} is no path: {error}") from None


def read(uri: str) -> bytes:
    """
    Raises:
        FileNotFoundError: nothing is stored there.
    """
    if not is_s3(uri):
        try:
            return Path(uri).read_bytes()
        except (NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(uri) from None
    with _missing_as_file_not_found(uri):
        bucket, key = _split(uri)
        return bytes(_s3().get_object(Bucket=bucket, Key=key)["Body"].read())


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start` on, fewer where the object ends before that."""
    if not length:
        return b""
    if not is_s3(uri):
        with Path(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)
    with _missing_as_file_not_found(uri):
        bucket, key = _split(uri)
        answer = _s3().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
        return bytes(answer["Body"].read())


def read_json(uri: str) -> Any:
    """
    Raises:
        FileNotFoundError: nothing is stored there.
        StorageError: what is stored is not JSON.
    """
    try:
        return json.loads(read(uri))
    except (ValueError, RecursionError) as error:
        raise LastingStorageError(f"{uri} is damaged: {error}", "restore it, or delete what it describes") from None


def write(uri: str, data: bytes) -> None:
    """Put data at uri, whole or not at all."""
    if is_s3(uri):
        bucket, key = _split(uri)
        _s3().put_object(Bucket=bucket, Key=key, Body=data)
        return
    with _published(Path(uri)) as temporary:
        _write_synced(temporary, data)
        temporary.replace(uri)


def create(uri: str, data: bytes) -> bool:
    """Put data at uri unless something is there; True for the one writer that did.

    Writers that race must write different bytes (a name, a time, a random number): S3 clients repeat a request whose
    answer was lost, and a writer then knows its own object by its bytes.
    """
    if is_s3(uri):
        return _create_s3(uri, data)
    with _published(Path(uri)) as temporary:
        _write_synced(temporary, data)
        try:
            os.link(temporary, uri)
        except FileExistsError:
            return False
    return True


def exists(uri: str) -> bool:
    """Whether an object (not a directory) is stored at uri."""
    if not is_s3(uri):
        return Path(uri).is_file()
    try:
        with _missing_as_file_not_found(uri):
            bucket, key = _split(uri)
            _s3().head_object(Bucket=bucket, Key=key)
            return True
    except FileNotFoundError:
        return False


def list_files(uri: str) -> list[str]:
    """Names below a directory, relative to it, recursive and sorted; empty where there is none."""
    if is_s3(uri):
        bucket, prefix = _split(uri.rstrip("/") + "/")
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(item["Key"][len(prefix) :] for page in pages for item in page.get("Contents", []))
    root = Path(uri)
    return sorted(
        str(Path(folder, name).relative_to(root))
        for folder, names in _walk(root)
        for name in names
        if not name.startswith(_TEMPORARY)
    )


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(directory, names of its files), links to directories followed, every directory once."""

    def tell(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("cannot list %s: %s; its files are passed over", error.filename, error.strerror)

    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=tell):
        try:
            stat = Path(folder).stat()
        except FileNotFoundError:
            continue  # deleted since it was listed
        if (stat.st_dev, stat.st_ino) in seen:
            inner.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield folder, names


def delete_abandoned(uri: str, age_s: float) -> None:
    """Delete the temporary files that killed processes left below a local directory, if they are so old."""
    if is_s3(uri):
        return
    for folder, names in _walk(Path(uri)):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                if name.startswith(_TEMPORARY) and time.time() - path.stat().st_mtime > age_s:
                    path.unlink()


def size(uri: str) -> int:
    """Bytes stored at uri."""
    if not is_s3(uri):
        return Path(uri).stat().st_size
    with _missing_as_file_not_found(uri):
        bucket, key = _split(uri)
        return int(_s3().head_object(Bucket=bucket, Key=key)["ContentLength"])


@dataclass(frozen=True)
class Entry:
    """A stored file as a listing shows it."""

    name: str
    bytes: int
    version: str
    """Changes when the content does: the ETag on S3, the time of modification locally."""


def list_entries(uri: str) -> list[Entry]:
    """Every file below a directory, sorted by name; or the file at uri itself, under its own name."""
    if not is_s3(uri):
        root = Path(uri)
        names = [""] if root.is_file() else list_files(uri)
        return [entry for name in names if (entry := _local_entry(root, name))]
    bucket, prefix = _split(uri.rstrip("/"))
    pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [item for page in pages for item in page.get("Contents", [])]
    below = prefix + "/" if prefix else ""
    entries = {item["Key"]: (int(item["Size"]), item["ETag"].strip('"')) for item in found}
    if prefix in entries:
        return [Entry(prefix.rpartition("/")[2], *entries[prefix])]
    return sorted(
        (Entry(key[len(below) :], *facts) for key, facts in entries.items() if key.startswith(below) and key != below),
        key=lambda entry: entry.name,
    )


def _local_entry(root: Path, name: str) -> Entry | None:
    """None for what cannot be read as a file: a dangling link, a pipe."""
    path = root / name if name else root
    try:
        stat = path.stat()
    except OSError:
        return None
    return Entry(name or path.name, stat.st_size, str(stat.st_mtime_ns)) if S_ISREG(stat.st_mode) else None


@contextlib.contextmanager
def reading(uri: str) -> Iterator[IO[bytes]]:
    """A seekable stream of the bytes at uri that holds a few MiB at a time.

    Raises:
        FileNotFoundError: nothing is stored there.
        OSError: a block could not be read, tried twice.
    """
    if is_s3(uri):
        with io.BufferedReader(_S3Blocks(uri), _BLOCK) as stream:
            yield stream
    else:
        with Path(uri).open("rb") as stream:
            yield stream


_BLOCK = 8 * 2**20


class _S3Blocks(io.RawIOBase):
    """An S3 object as a raw stream: each read is one ranged request, made twice before it fails."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        self._position = 0
        with _missing_as_file_not_found(uri):
            bucket, key = _split(uri)
            self._size = int(_s3().head_object(Bucket=bucket, Key=key)["ContentLength"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        try:
            data = read_range(self._uri, self._position, wanted)
        except Exception:  # boto3 has retried what it knows; a body that breaks off is ours to ask for again
            try:
                data = read_range(self._uri, self._position, wanted)
            except Exception as error:
                raise OSError(errno.EIO, str(error), self._uri) from None
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A local path to write a file of any size to; it is published at uri when the block ends without an error."""
    if is_s3(uri):
        with tempfile.TemporaryDirectory(prefix="terrane-") as folder:
            path = Path(folder, "file")
            yield path
            upload(path, uri)
        return
    with _published(Path(uri)) as temporary:
        yield temporary
        temporary.replace(uri)


def upload(local: Path, uri: str) -> None:
    """Copy a local file to uri, streamed, whole or not at all."""
    if is_s3(uri):
        bucket, key = _split(uri)
        _s3().upload_file(str(local), bucket, key)
        return
    with _published(Path(uri)) as temporary:
        shutil.copyfile(local, temporary)
        temporary.replace(uri)


def download(uri: str, local: Path) -> None:
    """Copy the object at uri to a local file, streamed, whole or not at all."""
    with _published(local) as temporary:
        if is_s3(uri):
            with _missing_as_file_not_found(uri):
                bucket, key = _split(uri)
                _s3().download_file(bucket, key, str(temporary))
        else:
            shutil.copyfile(uri, temporary)
        temporary.replace(local)


def upload_directory(local: Path, uri: str) -> None:
    for name in list_files(str(local)):
        upload(local / name, join(uri, name))


def download_directory(uri: str, local: Path) -> None:
    for name in list_files(uri):
        download(join(uri, name), local / name)


def delete(uri: str) -> None:
    """Delete the object or the directory at uri; nothing there is fine."""
    if is_s3(uri):
        bucket, key = _split(uri)
        client = _s3()
        client.delete_object(Bucket=bucket, Key=key)
        for name in list_files(uri):
            client.delete_object(Bucket=bucket, Key=join(key, name))
    elif Path(uri).is_dir():
        shutil.rmtree(uri, ignore_errors=True)
    else:
        Path(uri).unlink(missing_ok=True)


def delete_empty(uri: str) -> None:
    """Delete a local directory if nothing is left in it; on S3 such a directory is not there."""
    if not is_s3(uri):
        with contextlib.suppress(OSError):
            Path(uri).rmdir()


@contextlib.contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """A local directory with the content of uri: itself, or a copy that is deleted afterwards."""
    if not is_s3(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="terrane-") as folder:
        download_directory(uri, Path(folder))
        yield Path(folder)


def check_writable(uri: str) -> None:
    """
    Raises:
        StorageError: nothing can be written below uri; says why.
    """
    probe = join(uri, f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        if not is_s3(uri):
            Path(uri).mkdir(parents=True, exist_ok=True)
            Path(probe).write_bytes(b"")
        else:
            write(probe, b"")
        delete(probe)
    except OSError as error:
        raise StorageError(
            f"cannot write to {uri}: {error.strerror or error}", "check the path and its owner"
        ) from None
    except Exception as error:  # boto3 raises a dozen unrelated classes: credentials, endpoint, bucket, permission
        if not is_s3(uri):
            raise
        hint = "check the bucket, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
        raise StorageError(f"cannot write to {uri}: {error}", hint) from None


def probe(uri: str, size: int) -> float:
    """Write a file of so many bytes below uri, read it back and delete it; returns the seconds that the write took.

    Raises:
        StorageError: one of it fails, or something else comes back; says why.
    """
    target, data = join(uri, f"{_TEMPORARY}{uuid.uuid4().hex}"), os.urandom(size)
    try:
        began = time.monotonic()
        write(target, data)
        took = time.monotonic() - began
        same = read(target) == data
        delete(target)
    except Exception as error:  # boto3 raises a dozen unrelated classes
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write to {uri}: {reason}", "check the path or bucket, and its owner") from None
    if not same:
        raise StorageError(f"what was written to {uri} came back as something else", "check the disk or the service")
    return took


_TEMPORARY = ".tmp-terrane-"


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, gone afterwards whether or not it was moved there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def _s3() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": 8}, connect_timeout=10))


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise LastingStorageError(f"{uri!r} names no bucket", "write it as s3://bucket/prefix")
    return bucket, key


def _create_s3(uri: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    bucket, key = _split(uri)
    try:
        _s3().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code == "ConditionalRequestConflict":  # another writer is in the middle of it: ask again
            return _create_s3(uri, data)
        if code == "PreconditionFailed":
            # boto3 retries a lost answer, and the retry then meets our own object: ours if it holds our bytes.
            return read(uri) == data
        raise
    return True


@contextlib.contextmanager
def _missing_as_file_not_found(uri: str) -> Iterator[None]:
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NotFound"):
            raise FileNotFoundError(uri) from None
        raise


class Appender:
    """A text file that grows line by line. S3 objects cannot grow, so there the whole text is put again, now and then.

    Args:
        interval_s: at most this much text is lost on S3 when the process dies; a local file loses none.
    """

    def __init__(self, uri: str, interval_s: float = 5.0) -> None:
        self._uri = uri
        self._interval_s = interval_s
        self._lines: list[str] = []
        self._put_at = time.monotonic()
        self._putting = threading.Lock()
        if not is_s3(uri):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
        self._file = None if is_s3(uri) else Path(uri).open("a", encoding="utf-8")  # noqa: SIM115

    def append(self, line: str) -> None:
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._put_at >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        """Put what was appended on storage. From any thread."""
        if not self._file:
            with self._putting:
                began = time.monotonic()
                write(self._uri, "".join(line + "\n" for line in self._lines).encode())
                self._put_at = time.monotonic()
                self._interval_s = max(self._interval_s, 20 * (self._put_at - began))  # S3 takes the whole text anew

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
