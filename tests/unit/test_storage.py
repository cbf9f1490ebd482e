from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.errors import StorageError


def test_what_was_written_is_read(anywhere: str) -> None:
    uri = storage.join(anywhere, "a", "b.bin")
    storage.write(uri, b"one")
    storage.write(uri, b"two")
    assert storage.read(uri) == b"two"
    assert storage.size(uri) == 3
    assert storage.exists(uri)


def test_nothing_there_is_file_not_found(anywhere: str) -> None:
    uri = storage.join(anywhere, "none")
    assert not storage.exists(uri)
    assert storage.list_files(anywhere) == []
    for call in (storage.read, storage.size):
        with pytest.raises(FileNotFoundError):
            call(uri)


def test_a_create_has_one_winner(anywhere: str) -> None:
    for uri in (storage.join(anywhere, f"claim-{n}") for n in range(5)):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(functools.partial(_claim, uri), range(8)))
        assert won.count(True) == 1
        assert storage.read(uri) == f"writer {won.index(True)}".encode()


def _claim(uri: str, writer: int) -> bool:
    return storage.create(uri, f"writer {writer}".encode())


def test_names_are_listed_below_a_directory_only(anywhere: str) -> None:
    for name in ("d/x", "d/e/y", "dd/z"):
        storage.write(storage.join(anywhere, name), b"")
    assert storage.list_files(storage.join(anywhere, "d")) == ["e/y", "x"]


def test_delete_takes_a_directory_and_leaves_its_neighbours(anywhere: str) -> None:
    for name in ("d/x", "d/e/y", "dd/z"):
        storage.write(storage.join(anywhere, name), b"")
    storage.delete(storage.join(anywhere, "d"))
    storage.delete(storage.join(anywhere, "never there"))
    assert storage.list_files(anywhere) == ["dd/z"]


def test_directories_are_copied_both_ways(anywhere: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "f").write_bytes(b"x" * 100)
    storage.upload_directory(tmp_path / "in", storage.join(anywhere, "d"))
    storage.download_directory(storage.join(anywhere, "d"), tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "f").read_bytes() == b"x" * 100


def test_a_local_directory_of_anything_can_be_had(anywhere: str) -> None:
    storage.write(storage.join(anywhere, "d", "f"), b"x")
    with storage.local_directory(storage.join(anywhere, "d")) as folder:
        assert (folder / "f").read_bytes() == b"x"
    assert folder.exists() == (not storage.is_s3(anywhere))


def test_lines_are_appended(anywhere: str) -> None:
    uri = storage.join(anywhere, "log")
    out = storage.Appender(uri, interval_s=0)
    out.append("one")
    assert storage.read(uri) == b"one\n"
    out.append("two")
    out.close()
    assert storage.read(uri) == b"one\ntwo\n"


def test_writable_storage_passes_and_keeps_no_trace(anywhere: str) -> None:
    storage.check_writable(anywhere)
    assert storage.list_files(anywhere) == []


def test_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        storage.check_writable(str(tmp_path / "file" / "below"))


def test_a_missing_bucket_is_named(s3_endpoint: str) -> None:
    storage._s3.cache_clear()
    with pytest.raises(StorageError, match="no-such-bucket-here"):
        storage.check_writable("s3://no-such-bucket-here/runs")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x"])
def test_an_unknown_scheme_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="unknown scheme"):
        storage.absolute(uri)


def test_a_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "f")
    storage.write(uri, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write(uri, b"new")
    assert storage.read(uri) == b"old"
    assert storage.list_files(str(tmp_path)) == ["f"]


def test_a_file_is_read_in_pieces_from_anywhere(anywhere: str) -> None:
    uri = f"{anywhere}/a.bin"
    data = bytes(range(256)) * 100
    storage.write(uri, data)
    assert storage.read_range(uri, 10, 5) == data[10:15]
    assert storage.read_range(uri, len(data) - 2, 10) == data[-2:]
    assert storage.read_range(uri, 5, 0) == b""
    with storage.reading(uri) as stream:
        stream.seek(100)
        assert stream.read(10) == data[100:110]
        assert stream.read() == data[110:]
        assert stream.read(1) == b""
    with pytest.raises(FileNotFoundError), storage.reading(f"{anywhere}/none"):
        pass


def test_a_read_from_s3_is_tried_twice(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(f"{bucket}/a.bin", b"content")
    read_range, failures = storage.read_range, [ConnectionError("broke off")]

    def unsteady(*args: object) -> bytes:
        if failures:
            raise failures.pop()
        return read_range(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "read_range", unsteady)
    with storage.reading(f"{bucket}/a.bin") as stream:
        assert stream.read() == b"content"
    failures += [ConnectionError("broke off")] * 2
    with storage.reading(f"{bucket}/a.bin") as stream, pytest.raises(OSError, match="broke off"):
        stream.read()


def test_a_listing_shows_sizes_and_versions(anywhere: str) -> None:
    for name, data in (("a", b"1"), ("sub/b", b"22"), ("sub-c", b"333")):
        storage.write(f"{anywhere}/in/{name}", data)
    before = {entry.name: entry for entry in storage.list_entries(f"{anywhere}/in")}
    assert {name: entry.bytes for name, entry in before.items()} == {"a": 1, "sub/b": 2, "sub-c": 3}
    assert [entry.name for entry in storage.list_entries(f"{anywhere}/in/sub")] == ["b"]
    assert [entry.name for entry in storage.list_entries(f"{anywhere}/in/a")] == ["a"]
    assert storage.list_entries(f"{anywhere}/none") == []
    storage.write(f"{anywhere}/in/a", b"2")
    after = {entry.name: entry for entry in storage.list_entries(f"{anywhere}/in")}
    assert [name for name in after if after[name] != before[name]] == ["a"]


def test_a_file_of_any_size_is_published_whole(anywhere: str) -> None:
    with storage.writing(f"{anywhere}/a") as path:
        path.write_bytes(b"whole")
    assert storage.read(f"{anywhere}/a") == b"whole"
    with pytest.raises(KeyError), storage.writing(f"{anywhere}/b") as path:
        path.write_bytes(b"half")
        raise KeyError
    assert not storage.exists(f"{anywhere}/b")


def test_what_killed_processes_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    import os

    for name in (".tmp-terrane-old", ".tmp-terrane-new", "kept"):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / ".tmp-terrane-old", (0, 0))
    storage.delete_abandoned(str(tmp_path), 3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-terrane-new", "kept"]
