"""The saver in one process, and what its files are worth: every bit counts."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp

from orchestrator import storage
from orchestrator.errors import CheckpointDamaged, RunFailed, StorageError
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Retention
from orchestrator.train.fragments import MOMENTS, PARAM, Box, Fragment
from orchestrator.train.saver import HostMemory, SaveFailed, Saver, Timing
from tests.engine import save_kills
from tests.engine.save_kills import SHAPES, WORLD, fragments, loaded, position, value


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoints of steps 1 and 2, by two ranks the second."""
    root = tmp_path_factory.mktemp("two")
    uri = str(root / "storage")
    saver = Saver(uri, 1, Retention(last=9), lambda commit, timing: None)
    saver.save(position(1), fragments(1))
    saver.wait()
    assert [rank["error"] for rank in save_kills.saves(uri, root / "ranks", None, keep=9)] == [None] * WORLD
    return uri


def newest(uri: str) -> Commit:
    found = checkpoints.newest(uri)
    assert found is not None
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def refused(uri: str) -> bool:
    """Whether the newest checkpoint is seen to be damaged, by whoever looks first, and the one before is used."""
    seen: list[int] = []
    commit = checkpoints.newest(uri, lambda step, what: seen.append(step))
    assert commit is not None
    if not seen:
        with contextlib.suppress(CheckpointDamaged):
            checkpoints.load(uri, commit, fragments(0))
            return False
        checkpoints.set_aside(uri, commit.step, "damaged")
    return newest(uri).step == 1 and loaded(uri, newest(uri))


@contextlib.contextmanager
def changed(uri: str, file: Path, data: bytes | None) -> Iterator[None]:
    """A file of the newest checkpoint that holds something else, or is not there."""
    marker = Path(checkpoints.marker(uri, 2, attempt=1))
    before = {path: path.read_bytes() for path in (marker, file)}
    file.unlink() if data is None else file.write_bytes(data)
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)
        marker.with_name("COMMITTED.damaged").unlink(missing_ok=True)


def files_of(uri: str) -> list[Path]:
    found = [path for path in Path(checkpoints.step_directory(uri, 2)).rglob("*") if path.is_file()]
    found.sort(key=lambda path: (path.name != checkpoints.COMMITTED, path.name))
    assert [path.name for path in found] == ["COMMITTED", ".metadata", "__0_0.distcp", "__1_0.distcp"]
    return found


def flip_any_bit(uri: str, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of(uri)))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with changed(uri, file, bytes(content)):
        assert refused(uri), f"{file.name}, byte {place}"


@given(st.data())
@settings(max_examples=150)
def test_any_flipped_bit_is_refused_and_the_checkpoint_before_is_used(two: str, data: st.DataObject) -> None:
    flip_any_bit(two, data)


@pytest.mark.soak
@given(st.data())
@settings(max_examples=20_000)
def test_any_flipped_bit_is_refused_20000_times(two: str, data: st.DataObject) -> None:
    flip_any_bit(two, data)


def test_every_bit_of_a_commit_counts(two: str) -> None:
    marker = files_of(two)[0]
    whole = marker.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with changed(two, marker, bytes(content)), pytest.raises(CheckpointDamaged):
            checkpoints.read_commit(two, 2)


def test_a_file_that_is_missing_or_cut_short_is_refused(two: str) -> None:
    for file in files_of(two)[1:]:
        for data in (None, file.read_bytes()[:-1], b""):
            with changed(two, file, data):
                assert refused(two), file


def test_damage_that_comes_while_a_checkpoint_is_read_is_refused(two: str) -> None:
    """The driver has seen all files; a rank finds one missing, or short."""
    commit = newest(two)
    for file in files_of(two)[1:]:
        for data in (None, file.read_bytes()[:-1]):
            with changed(two, file, data), pytest.raises(CheckpointDamaged) as damage:
                checkpoints.load(two, commit, fragments(0))
            assert damage.value.step == commit.step


def test_a_rank_reads_what_it_needs_and_no_more(two: str) -> None:
    commit = newest(two)
    mine = fragments(0, rank=0, world=WORLD)
    with changed(two, files_of(two)[-1], None):
        checkpoints.load(two, commit, mine)
    assert all(
        torch.equal(tensor, value(fragment.name, kind, commit.step)[fragment.box.slices])
        for fragment in mine
        for kind, tensor in fragment.tensors.items()
    )


def test_a_checkpoint_of_another_model_is_refused(two: str) -> None:
    other = Fragment("wide", (6, 4001), Box.whole((6, 4001)), {PARAM: torch.zeros(6, 4001)})
    with pytest.raises(RunFailed, match=r"\[6, 4000\], the model's \[6, 4001\]"):
        checkpoints.load(two, newest(two), [other])


def test_torch_reads_the_files_with_its_own_reader(two: str) -> None:
    state = {f"{kind}/{name}": torch.zeros(shape) for name, shape in SHAPES.items() for kind in (PARAM, *MOMENTS)}
    folder = storage.join(checkpoints.step_directory(two, 2), newest(two).folder)
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
    for name in SHAPES:
        for kind in (PARAM, *MOMENTS):
            assert torch.equal(state[f"{kind}/{name}"], value(name, kind, 2))


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Storage that takes no file before this is set."""
    event, writing = threading.Event(), storage.writing

    @contextlib.contextmanager
    def gated(uri: str) -> Iterator[Path]:
        assert event.wait(60)
        with writing(uri) as path:
            yield path

    monkeypatch.setattr(storage, "writing", gated)
    return event


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, gate: threading.Event) -> None:
    uri, live = str(tmp_path), fragments(1)
    saver = Saver(uri, 1, Retention(last=1), lambda commit, timing: None)
    saver.save(position(1), live)
    saver.poll()
    for fragment in live:
        for tensor in fragment.tensors.values():
            tensor.zero_()
    assert checkpoints.newest(uri) is None
    gate.set()
    saver.wait()
    assert loaded(uri, newest(uri)), "it holds what was there when it was asked for"


def test_a_save_waits_for_the_one_before_and_says_how_long(tmp_path: Path, gate: threading.Event) -> None:
    told: list[tuple[int, int | None, Timing]] = []
    saver = Saver(
        str(tmp_path), 1, Retention(last=2), lambda commit, timing: told.append((commit.step, commit.parent, timing))
    )
    saver.save(position(1), fragments(1))
    threading.Timer(0.3, gate.set).start()
    timing = saver.save(position(2), fragments(2))
    assert checkpoints.committed_steps(str(tmp_path))[0] == 1, "one is in flight at most"
    assert timing.waited_s > 0.1
    saver.wait()
    assert [(step, parent) for step, parent, _ in told] == [(1, None), (2, 1)]
    assert told[1][2].waited_s == timing.waited_s
    assert all(timing.saved_s >= timing.waited_s + timing.copied_s for _, _, timing in told)


def test_a_save_that_fails_is_told_at_the_next_poll_and_at_the_next_save(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), 1, Retention(last=1), lambda commit, timing: None)
    saver.poll()
    saver.wait()
    for step in (2, 1):
        saver.save(position(step), fragments(step))
        saver.close()
    for call in (saver.poll, saver.wait, lambda: saver.save(position(3), fragments(3))):
        with pytest.raises(StorageError, match="has been replaced"):
            call()
    assert checkpoints.committed_steps(str(tmp_path)) == [2]


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(io.BytesIO):
        """With room for what is small."""

        def write(self, data: Any) -> int:
            if len(data) > 2**16:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    path = SimpleNamespace(open=lambda mode: Disk())
    monkeypatch.setattr(storage, "writing", lambda uri: contextlib.nullcontext(path))
    saver = Saver(str(tmp_path), 1, Retention(last=1), lambda commit, timing: None)
    shape = (2**18,)
    saver.save(position(1), [Fragment("weight", shape, Box.whole(shape), {PARAM: torch.ones(shape)})])
    with pytest.raises(SaveFailed, match="No space left on device"):
        saver.wait()


def test_before_a_save_that_would_not_fit_older_checkpoints_go(tmp_path: Path) -> None:
    room = [10**9, 10**9, 0]
    stood: list[list[int]] = []
    saver = Saver(
        str(tmp_path),
        1,
        Retention(last=9),
        lambda commit, timing: stood.append(checkpoints.committed_steps(str(tmp_path))),
        lambda: room.pop(0),
    )
    for step in (1, 2, 3):
        saver.save(position(step), fragments(step))
    saver.wait()
    assert stood == [[1], [1, 2], [2, 3]]


def test_a_storage_that_cannot_be_asked_for_room_stops_no_save(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), 1, Retention(last=1), lambda commit, timing: None, lambda: 1 / 0)
    saver.save(position(1), fragments(1))
    saver.wait()
    assert newest(str(tmp_path)).step == 1


def test_a_follow_up_that_fails_is_told(tmp_path: Path) -> None:
    def broken(commit: Commit, timing: Timing) -> None:
        raise ValueError("no room for the log")

    saver = Saver(str(tmp_path), 1, Retention(last=1), broken)
    saver.save(position(1), fragments(1))
    with pytest.raises(ValueError, match="no room"):
        saver.wait()
    assert newest(str(tmp_path)).step == 1


def test_the_best_and_every_tenth_step_are_kept(tmp_path: Path) -> None:
    losses = {4: 3.0, 8: 1.0, 10: None, 12: 2.0, 16: None, 20: 4.0, 24: 2.5}
    saver = Saver(str(tmp_path), 1, Retention(last=1, every=10, best=True), lambda commit, timing: None)
    for step, loss in losses.items():
        saver.save(position(step), fragments(step), loss)
    saver.wait()
    assert checkpoints.committed_steps(str(tmp_path)) == [8, 10, 20, 24]
    assert checkpoints.read_commit(str(tmp_path), 8).held_out_loss == 1.0


def test_host_memory_is_asked_for_once(tmp_path: Path) -> None:
    host = HostMemory()

    def places(copies: list[Fragment]) -> list[int]:
        return [tensor.data_ptr() for fragment in copies for tensor in fragment.tensors.values()]

    first = places(host.copy(fragments(1)))
    copies = host.copy(fragments(2))
    assert places(copies) == first
    assert torch.equal(copies[0].tensors[PARAM], value("wide", PARAM, 2))
    assert [f.tensors[PARAM].shape for f in host.copy(fragments(2, 0, WORLD))] == [(3, 4000), (1, 5)], "another layout"
