"""The cache of shards on a node, with real processes, real kills and a real S3 server on loopback."""

from __future__ import annotations

import errno
import logging
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from orchestrator import storage
from orchestrator.data import shard_cache
from orchestrator.data.shard_cache import ShardCache, node_cache
from orchestrator.errors import StorageError

SPAWN = multiprocessing.get_context("spawn")
ENOUGH = 2**40
ABSENT = "0" * 32

Stored = tuple[str, int, str]
"""What fetch takes: uri, size, hash."""


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def put(folder: str, name: str, data: bytes) -> Stored:
    uri = storage.join(folder, name)
    storage.write(uri, data)
    return uri, len(data), digest(data)


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names(*shards: Stored) -> set[str]:
    return {f"{xxh3}.arrow" for _, _, xxh3 in shards}


def age(path: Path, seconds: float) -> None:
    """Make a shard as if it had last been used so long ago."""
    os.utime(path, (time.time() - seconds,) * 2)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited two minutes in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_PAUSES_S", (0.0, 0.0))


@pytest.fixture
def gets(bucket: str, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], Counter[str]]]:
    """How often the objects of the bucket were asked for until now, by key: from the log of the server."""
    pattern = re.compile(rf"GET /{bucket.removeprefix('s3://')}/(\S+) HTTP")
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        yield lambda: Counter(match[1] for record in caplog.records if (match := pattern.search(record.getMessage())))


def test_a_shard_is_fetched_and_then_found(anywhere: str, tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", ENOUGH), put(anywhere, "a", content(5000))
    path = cache.fetch(*shard)
    assert path.read_bytes() == content(5000)
    storage.delete(shard[0])
    age(path, 1000)
    assert cache.fetch(*shard) == path
    assert time.time() - path.stat().st_atime < 500, "a hit is a use"
    assert held(tmp_path / "cache") == names(shard)


def test_runs_share_what_has_the_same_content(bucket: str, tmp_path: Path, gets: Callable[[], Counter[str]]) -> None:
    shards = [put(bucket, name, content(100)) for name in ("run-1/a", "run-2/a")]
    assert len({ShardCache(tmp_path, ENOUGH).fetch(*shard) for shard in shards}) == 1
    assert gets() == {"run-1/a": 1}


def test_a_hit_asks_nothing_of_a_file_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, shard = ShardCache(tmp_path / "cache", ENOUGH), put(str(tmp_path), "a", content(10))
    path = cache.fetch(*shard)
    storage.delete(shard[0])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.fetch(*shard) == path


_together: Any = None


def _begin_together(barrier: Any) -> None:
    global _together
    _together = barrier


def _read_all(folder: Path, max_bytes: int, shards: list[Stored], seed: int) -> int:
    """Fetch every shard and read it, in an order of one's own; returns how many vanished before they were read."""
    cache, vanished = ShardCache(folder, max_bytes), 0
    _together.wait(120)
    todo = random.Random(seed).sample(shards, len(shards))
    while todo:
        try:
            data = cache.fetch(*todo[-1]).read_bytes()
        except FileNotFoundError:
            vanished += 1
            continue
        assert digest(data) == todo.pop()[2]
    return vanished


def in_processes(count: int, folder: Path, max_bytes: int, shards: list[Stored]) -> list[Future[int]]:
    barrier = SPAWN.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=SPAWN, initializer=_begin_together, initargs=(barrier,)) as pool:
        return [pool.submit(_read_all, folder, max_bytes, shards, seed) for seed in range(count)]


def test_processes_that_want_the_same_shards_download_each_once(
    bucket: str, tmp_path: Path, gets: Callable[[], Counter[str]]
) -> None:
    shards = [put(bucket, f"shards/{n}", content(200_000 + n, n)) for n in range(6)]
    done = in_processes(5, tmp_path, ENOUGH, shards)
    assert [future.result() for future in done] == [0] * 5
    assert gets() == {f"shards/{n}": 1 for n in range(6)}
    assert held(tmp_path) == names(*shards)


def bytes_on_disk(folder: Path) -> int:
    """Of finished and temporary files. One that is renamed meanwhile has two names and one inode."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def test_the_bound_holds_at_every_moment(bucket: str, tmp_path: Path) -> None:
    """With no tolerance: shards come and go under the folder's lock only, so that a count under it is exact."""
    shards = [put(bucket, f"{n}", content(100_000 + 1000 * n, n)) for n in range(6)]
    bound, seen, finished = 250_000, [], threading.Event()

    def look() -> None:
        with ShardCache(tmp_path, bound)._locked("folder"):
            seen.append(bytes_on_disk(tmp_path))

    def watch() -> None:
        while not finished.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = in_processes(4, tmp_path, bound, shards)
    finally:
        finished.set()
        watcher.join()
    for future in done:
        future.result()
    look()
    assert 200_000 < max(seen) <= bound
    assert len(held(tmp_path)) == 2
    assert held(tmp_path) < names(*shards)


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 350)
    a, b, c, d, e = (put(str(tmp_path), name, content(100, ord(name))) for name in "abcde")
    for seconds, shard in ((300, a), (200, b), (100, c)):
        age(cache.fetch(*shard), seconds)
    cache.fetch(*a)
    cache.fetch(*d)
    assert held(folder) == names(a, c, d)
    big = put(str(tmp_path), "big", content(250))
    cache.fetch(*e)
    assert held(folder) == names(a, d, e)
    age(cache.fetch(*d), 50)
    age(cache.fetch(*a), 100)
    cache.fetch(*big)
    assert held(folder) == names(e, big)


def test_what_is_mapped_may_be_deleted_and_what_is_not_the_caches_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 100)
    a, b = (put(str(tmp_path), name, content(100, ord(name))) for name in "ab")
    with cache.fetch(*a).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for name in ("theirs.arrow", "theirs.lock", "theirs.1.part"):
            (folder / name).write_bytes(content(1000))
        cache.fetch(*b)
        assert mapped[:] == content(100, ord("a"))
    assert held(folder) == names(b) | {"theirs.arrow", "theirs.lock", "theirs.1.part"}


def test_a_shard_that_can_never_fit_is_refused(tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", 99), put(str(tmp_path), "a", content(100))
    with pytest.raises(StorageError, match=f"shard {shard[0]} has") as caught:
        cache.fetch(*shard)
    assert "raise TERRANE_CACHE_GIB" in caught.value.hint


class SlowS3(ThreadingHTTPServer):
    """One object under every name, whose body stops in the middle until go_on is set."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), SlowAnswer)
        self.data = data
        self.in_the_middle = threading.Event()
        self.go_on = threading.Event()
        self.gets = 0


class SlowAnswer(BaseHTTPRequestHandler):
    server: SlowS3

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.send_header("ETag", '"one"')
        self.end_headers()

    def do_GET(self) -> None:
        self.server.gets += 1
        self.do_HEAD()
        half = len(self.server.data) // 2
        try:
            self.wfile.write(self.server.data[:half])
            self.server.in_the_middle.set()
            self.server.go_on.wait()
            self.wfile.write(self.server.data[half:])
        except ConnectionError:  # the reader was killed
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowS3]:
    server = SlowS3(content(2_000_000))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage._s3.cache_clear()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()
    storage._s3.cache_clear()


def _fetch(folder: Path, max_bytes: int, shard: Stored) -> None:
    ShardCache(folder, max_bytes).fetch(*shard)


def killed_in_the_middle(slow_s3: SlowS3, folder: Path, max_bytes: int, shard: Stored) -> None:
    process = SPAWN.Process(target=_fetch, args=(folder, max_bytes, shard))
    process.start()
    try:
        wait_until(lambda: slow_s3.in_the_middle.is_set() and folder.is_dir() and bytes_on_disk(folder) > 0)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_download_leaves_nothing_wrong(slow_s3: SlowS3, tmp_path: Path) -> None:
    folder, data = tmp_path / "cache", slow_s3.data
    shard = ("s3://bucket/a", len(data), digest(data))
    killed_in_the_middle(slow_s3, folder, len(data), shard)
    assert held(folder) == {f"{shard[2]}.{len(data)}.part", f"{shard[2]}.lock"}
    slow_s3.go_on.set()
    assert ShardCache(folder, len(data)).fetch(*shard).read_bytes() == data
    assert held(folder) == names(shard)
    assert slow_s3.gets == 2


def test_the_room_of_a_killed_download_is_free_for_other_shards(slow_s3: SlowS3, tmp_path: Path) -> None:
    folder, size = tmp_path / "cache", len(slow_s3.data)
    killed_in_the_middle(slow_s3, folder, size, ("s3://bucket/a", size, digest(slow_s3.data)))
    other = put(str(tmp_path), "other", content(size, 1))
    ShardCache(folder, size).fetch(*other)
    assert held(folder) == names(other)


def test_who_waits_for_a_download_that_is_killed_takes_it_over(slow_s3: SlowS3, tmp_path: Path) -> None:
    folder, data = tmp_path / "cache", slow_s3.data
    shard = ("s3://bucket/a", len(data), digest(data))
    with ThreadPoolExecutor(2) as pool:
        process = SPAWN.Process(target=_fetch, args=(folder, len(data), shard))
        process.start()
        try:
            wait_until(slow_s3.in_the_middle.is_set)
            waiting = [pool.submit(ShardCache(folder, len(data)).fetch, *shard) for _ in range(2)]
        finally:
            process.kill()
            process.join()
            slow_s3.go_on.set()
        assert [future.result().read_bytes() for future in waiting] == [data] * 2
    assert slow_s3.gets == 2
    assert held(folder) == names(shard)


def test_a_download_waits_until_others_leave_it_room(
    slow_s3: SlowS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, size = tmp_path / "cache", len(slow_s3.data)
    first, second = ("s3://bucket/a", size, digest(slow_s3.data)), put(str(tmp_path), "b", content(1000, 1))
    cache, waits = ShardCache(folder, size + 999), []
    with ThreadPoolExecutor(1) as pool:
        downloading = pool.submit(cache.fetch, *first)
        assert slow_s3.in_the_middle.wait(120)

        def finish_the_other(seconds: float) -> None:
            waits.append(held(folder))
            slow_s3.go_on.set()
            downloading.result()

        monkeypatch.setattr(shard_cache, "time", SimpleNamespace(sleep=finish_the_other))
        cache.fetch(*second)
    assert len(waits) == 1
    assert f"{second[2]}.1000.part" not in waits[0]
    assert held(folder) == names(second)


def _die_before(step: int) -> None:
    """Kill this process when it is about to call the file system for the step-th time."""
    calls = iter(range(step + 1))

    def count(event: str, _: object) -> None:
        if event == "open" or event.startswith(("os.", "fcntl.", "shutil.")):
            try:
                next(calls)
            except StopIteration:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(count)


def _killed_before_step(step: int, folder: Path, max_bytes: int, shard: Stored) -> bool:
    """Whether a process that fetches the shard was killed, as it was not where it has fewer steps."""
    pid = os.fork()
    if not pid:
        try:
            _die_before(step)
            ShardCache(folder, max_bytes).fetch(*shard)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_before_every_step(root: Path) -> int:
    """Fetch a shard, where a damaged one stands and one must make room, killed before each of the steps in turn."""
    old, shard, other = (put(str(root), f"{size}", content(size)) for size in (200, 1000, 100))
    folder, step, killed = root / "cache", 0, True
    while killed:
        shutil.rmtree(folder, ignore_errors=True)
        cache = ShardCache(folder, 1100)
        age(cache.fetch(*old), 1000)
        path = folder / f"{shard[2]}.arrow"
        path.write_bytes(b"too short")
        killed = _killed_before_step(step, folder, 1100, shard)
        assert not path.exists() or path.read_bytes() in (b"too short", content(1000)), step
        assert cache.fetch(*shard).read_bytes() == content(1000), step
        cache.fetch(*other)
        assert held(folder) == names(shard, other), step
        step += 1
    return step


def test_a_process_may_be_killed_before_any_of_its_steps(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:  # pytest's own process has threads: it must not fork
        assert pool.submit(_kill_before_every_step, tmp_path).result() > 20


def test_damage_on_the_server_is_named_after_the_retries(
    bucket: str, tmp_path: Path, gets: Callable[[], Counter[str]]
) -> None:
    uri, size, _ = put(bucket, "a", content(1000))
    with pytest.raises(StorageError, match=f"{uri} is damaged: its hash"):
        ShardCache(tmp_path, ENOUGH).fetch(uri, size, ABSENT)
    assert gets() == {"a": 3}
    assert held(tmp_path) == set()


def test_an_object_of_another_size_is_not_even_downloaded(
    bucket: str, tmp_path: Path, gets: Callable[[], Counter[str]]
) -> None:
    uri, size, xxh3 = put(bucket, "a", content(1000))
    with pytest.raises(StorageError, match=f"{uri} is damaged: its size"):
        ShardCache(tmp_path, ENOUGH).fetch(uri, size - 1, xxh3)
    assert gets() == {}
    assert held(tmp_path) == set()


def test_a_missing_shard_is_named(anywhere: str, tmp_path: Path) -> None:
    uri = storage.join(anywhere, "none")
    with pytest.raises(StorageError, match=f"shard {uri} is missing"):
        ShardCache(tmp_path / "cache", ENOUGH).fetch(uri, 10, ABSENT)
    assert held(tmp_path / "cache") == set()


def test_storage_that_does_not_answer_is_named(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object) -> None:
        raise ConnectionError("broke off")

    shard = put(bucket, "a", content(10))
    monkeypatch.setattr(storage, "download", break_off)
    with pytest.raises(StorageError, match=f"{shard[0]} cannot be read: broke off") as caught:
        ShardCache(tmp_path, ENOUGH).fetch(*shard)
    assert "AWS_ENDPOINT_URL" in caught.value.hint


def half(uri: str, local: Path) -> None:
    local.write_bytes(storage.read_range(uri, 0, storage.size(uri) // 2))


def flipped(uri: str, local: Path) -> None:
    data = bytearray(storage.read(uri))
    data[7] ^= 1
    local.write_bytes(data)


def late(uri: str, local: Path) -> None:
    raise FileNotFoundError(uri)


def broken_off(uri: str, local: Path) -> None:
    half(uri, local)
    raise ConnectionError("broke off")


@pytest.mark.parametrize("hiccups", [[half, flipped], [late, late], [broken_off], [flipped, late]])
def test_what_goes_wrong_twice_is_tried_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hiccups: list[Callable[[str, Path], None]]
) -> None:
    shard, download, left = put(bucket, "a", content(1000)), storage.download, list(hiccups)

    def unsteady(uri: str, local: Path) -> None:
        assert not local.exists(), "there is room for one copy"
        (left.pop(0) if left else download)(uri, local)

    monkeypatch.setattr(storage, "download", unsteady)
    assert ShardCache(tmp_path, 1000).fetch(*shard).read_bytes() == content(1000)
    assert held(tmp_path) == names(shard)


def test_a_damaged_file_heals(bucket: str, tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path, ENOUGH), put(bucket, "a", content(1000))
    path = cache.fetch(*shard)
    path.write_bytes(content(999))
    assert cache.fetch(*shard).read_bytes() == content(1000), "one of another size by itself"
    path.write_bytes(content(1000, 1))
    cache.discard(shard[2])
    assert cache.fetch(*shard).read_bytes() == content(1000)
    cache.discard(ABSENT)


def test_a_full_disk_takes_from_the_cache_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, ENOUGH)
    a, b, c = (put(str(tmp_path), name, content(1000, ord(name))) for name in "abc")
    big = put(str(tmp_path), "big", content(3000))
    age(cache.fetch(*a), 200)
    age(cache.fetch(*b), 100)

    def onto_a_small_disk(uri: str, local: Path) -> None:
        data = storage.read(uri)
        local.write_bytes(data[: 2500 - bytes_on_disk(folder)])
        if local.stat().st_size < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(local))

    monkeypatch.setattr(storage, "download", onto_a_small_disk)
    assert cache.fetch(*c).read_bytes() == content(1000, ord("c"))
    assert held(folder) == names(b, c)
    with pytest.raises(StorageError, match=f"{folder} is full: No space left") as caught:
        cache.fetch(*big)
    assert "TERRANE_CACHE_DIR" in caught.value.hint
    assert held(folder) == set()


@pytest.mark.parametrize("folder", ["file/below", "/proc/terrane-cache", "/sys"])
def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / folder
    with pytest.raises(StorageError, match=f"cannot use the shard cache {path}") as caught:
        ShardCache(path, ENOUGH).fetch(*put(str(tmp_path), "a", content(10)))
    assert "TERRANE_CACHE_DIR" in caught.value.hint


def test_a_folder_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "deep" / "cache", ENOUGH), put(str(tmp_path), "a", content(10))
    cache.fetch(*shard)
    shutil.rmtree(tmp_path / "deep")
    assert cache.fetch(*shard).read_bytes() == content(10)


@pytest.mark.parametrize(
    ("gib", "free_gib", "bound_gib"),
    [(None, 100, 16), ("0.5", 100, 0.5), ("64", 10, 5), ("inf", 10, 5), (None, 1, 0.5)],
)
def test_the_cache_of_a_node_is_bounded_by_choice_and_by_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: str | None, free_gib: int, bound_gib: float
) -> None:
    monkeypatch.delenv("TERRANE_CACHE_GIB", raising=False)
    if gib:
        monkeypatch.setenv("TERRANE_CACHE_GIB", gib)
    monkeypatch.setenv("TERRANE_CACHE_DIR", str(tmp_path / "mine"))
    shard = put(str(tmp_path), "a", content(2000))
    ShardCache(tmp_path / "mine", ENOUGH).fetch(*shard)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * 2**30 - 2000))
    cache = node_cache()
    assert cache._max_bytes == bound_gib * 2**30
    assert cache.fetch(*shard).parent == tmp_path / "mine"


def test_the_cache_of_a_node_is_a_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERRANE_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = node_cache().fetch(*put(str(tmp_path), "a", content(10)))
    assert path.parent == tmp_path / f"terrane-cache-{os.getuid()}"


@pytest.mark.parametrize("gib", ["lots", "0", "-1", "nan"])
def test_a_bound_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: str) -> None:
    monkeypatch.setenv("TERRANE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TERRANE_CACHE_GIB", gib)
    with pytest.raises(StorageError, match="TERRANE_CACHE_GIB"):
        node_cache()


def test_a_node_without_a_place_for_its_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERRANE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot use the shard cache"):
        node_cache()
