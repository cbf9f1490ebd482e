"""Room on storage: when it is told of, and what goes before a save that would not fit."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest

from orchestrator import quota, storage
from orchestrator.quota import POLL_S, StorageWatch, free_bytes
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints
from tests.zombie import save, state

GIB = 2**30
CHECKPOINT = len(state(1, 10))


@pytest.fixture
def run(anywhere: str) -> RunDir:
    return RunDir(storage.join(anywhere, "r"))


def told(run: RunDir) -> list[tuple[int, int]]:
    return [(e["free_bytes"], e["need_bytes"]) for e in run.events() if e["event"] == "storage_low"]


def test_a_quota_leaves_what_the_run_has_not_stored(run: RunDir) -> None:
    storage.write(run.path("events", "x"), bytes(1000))
    storage.write(run.path("checkpoints", "y"), bytes(24))
    assert free_bytes(run.uri, 2048 / GIB) == 1024
    assert free_bytes(run.uri, 512 / GIB) == 0


def test_without_a_quota_a_file_system_has_an_end_and_s3_has_none(run: RunDir) -> None:
    storage.write(run.path("x"), b"x")
    assert math.isinf(free_bytes(run.uri, None)) == storage.is_s3(run.uri)


def test_a_file_system_without_inodes_is_full(run_locally: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for inodes, free in ((9, 0), (10**6, 4096)):
        disk = SimpleNamespace(f_files=10**7, f_favail=inodes, f_bavail=1, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda uri, disk=disk: disk)
        assert free_bytes(run_locally.uri, None) == free


@pytest.fixture
def run_locally(tmp_path: object) -> RunDir:
    return RunDir(str(tmp_path))


def test_little_room_is_told_once_until_there_was_room(run_locally: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_locally
    watch, free = StorageWatch(run, None), math.inf
    monkeypatch.setattr(quota, "free_bytes", lambda uri, quota_gib: free)
    polls = iter(range(100))

    def poll(bytes_: float) -> int:
        nonlocal free
        free = bytes_
        watch.poll(next(polls) * POLL_S)
        return len(told(run))

    assert poll(0) == 0, "no checkpoint says yet how large one is"
    save(run.checkpoints, 1, 10)
    assert poll(3 * CHECKPOINT) == 0
    assert poll(3 * CHECKPOINT - 1) == 1
    assert poll(1) == 1
    assert poll(1e9) == 1
    assert poll(1) == 2
    assert told(run)[0] == (3 * CHECKPOINT - 1, 3 * CHECKPOINT)


def test_a_look_is_taken_once_a_minute_and_never_fails(
    run_locally: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def broken(uri: str, quota_gib: float | None) -> float:
        looks.append(uri)
        raise OSError("no answer")

    monkeypatch.setattr(quota, "free_bytes", broken)
    watch = StorageWatch(run_locally, None)
    for now_s in (5, 6, 64, 65):
        watch.poll(now_s)
    assert len(looks) == 2
    assert "no answer" in caplog.text


def test_nothing_is_kept_of_what_was_set_aside_when_room_is_short(anywhere: str) -> None:
    checkpoints.begin(anywhere, 1)
    for step in (5, 10, 15, 20):
        save(anywhere, 1, step, keep=9)
    checkpoints.go_back(anywhere, 1, 10)
    checkpoints.begin(anywhere, 2)
    checkpoints.retain(anywhere, checkpoints.Retention(last=1, every=5, aside=0), attempt=2)
    folders = {name.split("/")[0] for name in storage.list_files(anywhere) if name.startswith("step-")}
    assert folders == {"step-00000005", "step-00000010"}, "what is kept for good, and the newest that counts"
