"""Copies of checkpoint files in memory: what is kept, what is refused, and how they travel. No torch here."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.train import checkpoints, memory_copies
from orchestrator.train.checkpoints import Commit, Position
from orchestrator.train.fragment_memory import CopyServer, FragmentMemory, Held, Refused, Save, new_token
from orchestrator.train.memory_copies import Copies, Holder, Places

FIRST, SECOND, LATER_ATTEMPT = Save(1, 10), Save(1, 20), Save(2, 15)
KIB = 2**10


def keep(memory: FragmentMemory, save: Save, name: str = "__0_0.distcp", size: int = KIB) -> None:
    room = memory.begin(save, name, size)
    room.data[:] = bytes([save.step]) * size
    memory.seal(save, name, room)


def saves(memory: FragmentMemory) -> set[Save]:
    return {Save(held.attempt, held.step) for held in memory.listing()}


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_newest_committed_save_is_kept_and_the_one_in_flight() -> None:
    memory = FragmentMemory(10 * KIB)
    for save in (FIRST, SECOND):
        keep(memory, save)
    memory.commit(FIRST)
    assert saves(memory) == {FIRST, SECOND}
    memory.commit(SECOND)
    assert saves(memory) == {SECOND}
    assert bytes(memory.file(SECOND, "__0_0.distcp")) == bytes([20]) * KIB


def test_a_file_counts_once_it_is_sealed() -> None:
    memory = FragmentMemory(10 * KIB)
    room = memory.begin(FIRST, "file", KIB)
    assert memory.listing() == []
    with pytest.raises(Refused):
        memory.file(FIRST, "file")
    memory.seal(FIRST, "file", room)
    assert memory.listing() == [Held(1, 10, "file", KIB)]
    other = memory.begin(FIRST, "other", KIB)
    memory.abandon(FIRST, "other", other)
    assert len(memory.listing()) == 1


def test_an_attempt_that_was_replaced_can_neither_add_nor_take_away() -> None:
    memory = FragmentMemory(10 * KIB)
    keep(memory, LATER_ATTEMPT)
    memory.commit(LATER_ATTEMPT)
    with pytest.raises(Refused):
        memory.begin(SECOND, "file", KIB)
    memory.commit(SECOND)
    assert saves(memory) == {LATER_ATTEMPT}, "training had gone back: a later attempt counts, not a later step"


def test_what_does_not_fit_in_takes_the_place_of_older_saves_or_is_refused() -> None:
    memory = FragmentMemory(3 * KIB)
    keep(memory, FIRST)
    memory.commit(FIRST)
    keep(memory, SECOND)
    keep(memory, LATER_ATTEMPT, "a")
    assert saves(memory) == {FIRST, SECOND, LATER_ATTEMPT}
    keep(memory, LATER_ATTEMPT, "b")
    assert saves(memory) == {FIRST, LATER_ATTEMPT}, "what was never committed goes first"
    keep(memory, LATER_ATTEMPT, "c")
    assert saves(memory) == {LATER_ATTEMPT}
    with pytest.raises(Refused, match="take 4096 bytes or more here, and may take 3072"):
        memory.begin(LATER_ATTEMPT, "d", KIB)
    assert len(memory.listing()) == 3


def test_a_save_that_could_never_fit_in_takes_nobodys_place() -> None:
    memory = FragmentMemory(3 * KIB)
    keep(memory, FIRST)
    with pytest.raises(Refused):
        memory.begin(SECOND, "file", 4 * KIB)
    assert saves(memory) == {FIRST}


def test_a_file_that_had_to_make_room_while_it_came_is_refused() -> None:
    memory = FragmentMemory(KIB)
    room = memory.begin(FIRST, "file", KIB)
    keep(memory, SECOND)
    with pytest.raises(Refused):
        memory.seal(FIRST, "file", room)
    assert saves(memory) == {SECOND}


def test_who_reads_a_file_can_finish_after_it_is_dropped() -> None:
    memory = FragmentMemory(KIB)
    keep(memory, FIRST)
    data = memory.file(FIRST, "__0_0.distcp")
    memory.commit(SECOND)
    assert memory.listing() == []
    assert bytes(data) == bytes([10]) * KIB
    with pytest.raises(TypeError):
        data[0] = 1


# --- how it travels ---------------------------------------------------------------------------------------------------

TOKEN = new_token()


@contextlib.contextmanager
def served(limit: int = 2**30) -> Iterator[tuple[FragmentMemory, Holder]]:
    memory = FragmentMemory(limit)
    server = CopyServer(memory, TOKEN)
    address = server.start("127.0.0.1")
    try:
        yield memory, Holder(address, TOKEN)
    finally:
        server.close()


def test_a_file_comes_back_as_it_was_put_in_any_order_of_ranges() -> None:
    data = os.urandom(5 * 2**20 + 7)
    with served() as (memory, holder):
        holder.put(FIRST, "file", io.BytesIO(data))
        assert holder.listing() == memory.listing() == [Held(1, 10, "file", len(data))]
        with holder.open(FIRST, "file") as stream:
            for offset, length in ((3 * 2**20, 2 * 2**20 + 7), (0, 1), (100, 2**20), (len(data) - 3, 10), (50, 0)):
                stream.seek(offset)
                assert stream.read(length) == data[offset : offset + length]
            stream.seek(0)
            room = bytearray(len(data))
            assert stream.readinto(room) == len(data)  # type: ignore[attr-defined]
            assert room == data


def test_files_of_a_disk_and_empty_ones_are_put_too(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with served() as (memory, holder):
        for content in (os.urandom(10**6), b""):
            file.write_bytes(content)
            with file.open("rb") as stream:
                holder.put(FIRST, f"{len(content)}", stream)
            assert bytes(memory.file(FIRST, f"{len(content)}")) == content
            with holder.open(FIRST, f"{len(content)}") as stream:
                assert stream.read() == content


def test_a_refusal_is_told_before_the_file_is_sent() -> None:
    with served(limit=KIB) as (memory, holder):
        with pytest.raises(OSError, match="may take 1024"):
            holder.put(FIRST, "file", io.BytesIO(bytes(2 * KIB)))
        with pytest.raises(OSError, match="is not held"), holder.open(FIRST, "file"):
            pass
        holder.put(FIRST, "file", io.BytesIO(bytes(KIB)))
        assert len(memory.listing()) == 1


def test_who_does_not_know_the_token_gets_no_answer() -> None:
    with served() as (memory, holder):
        keep(memory, FIRST)
        stranger = Holder(holder.address, new_token())
        with pytest.raises(OSError):
            stranger.listing()
        with pytest.raises(OSError):
            stranger.commit(SECOND)
        assert saves(memory) == {FIRST}


def test_a_writer_that_is_killed_leaves_nothing() -> None:
    with served() as (memory, holder):
        host, _, port = holder.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                TOKEN.encode() + b'{"do": "put", "attempt": 1, "step": 10, "name": "file", "size": 99}\n'
            )
            assert connection.recv(100) == b'{"bytes": 0}\n'
            connection.sendall(b"half")
        assert holder.listing() == []
        keep(memory, FIRST, "file")
        assert len(holder.listing()) == 1, "and the name is free"


def test_many_ranks_put_at_once() -> None:
    with served() as (memory, holder):
        content = [os.urandom(10**6) for _ in range(8)]
        putting = [
            threading.Thread(target=holder.put, args=(FIRST, f"__{rank}_0.distcp", io.BytesIO(content[rank])))
            for rank in range(8)
        ]
        for thread in putting:
            thread.start()
        for thread in putting:
            thread.join(60)
        assert [bytes(memory.file(FIRST, f"__{rank}_0.distcp")) for rank in range(8)] == content


# --- what a rank does with it -----------------------------------------------------------------------------------------


def put(copies: Copies, save: Save, name: str, data: bytes) -> None:
    with copies.keeping(save, name, io.BytesIO(data)):
        pass


def test_a_rank_keeps_its_file_on_its_own_node_and_the_next() -> None:
    with served() as (one, a), served() as (two, b), served() as (three, c):
        ring = {"a": a.address, "b": b.address, "c": c.address}
        for node in ring:
            put(Copies.of(Places(token=TOKEN, ring=ring).as_json(), node), FIRST, node, b"state")
        held = [{held.name for held in memory.listing()} for memory in (one, two, three)]
        assert held == [{"a", "c"}, {"a", "b"}, {"b", "c"}]


def test_one_node_has_one_copy() -> None:
    with served() as (memory, holder):
        copies = Copies.of(Places(token=TOKEN, ring={"a": holder.address}).as_json(), "a")
        put(copies, FIRST, "file", b"state")
        put(copies, SECOND, "file", b"state")
        copies.commit(SECOND)
        assert memory.listing() == [Held(1, 20, "file", 5)]


def test_a_copy_that_cannot_be_kept_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with served() as (_, gone):
        pass
    with served(limit=3) as (_, small), served() as (memory, room):
        for others in (gone, small):
            copies = Copies(keep=[others, room])
            put(copies, FIRST, others.address, b"state")
            copies.commit(FIRST)
        assert {held.name for held in memory.listing()} == {gone.address, small.address}
        assert f"step 10: storage has {gone.address}, and {gone.address} no copy: " in caplog.text
        assert "may take 3" in caplog.text


def test_copies_are_read_from_the_own_node_first() -> None:
    ring = {"a": "1.1.1.1:1", "b": "1.1.1.2:1", "c": "1.1.1.3:1"}
    places = Places(token=TOKEN, ring=ring, found={"file": ["1.1.1.1:1", "1.1.1.2:1"]}).as_json()

    def order(node: str) -> list[str]:
        return [words.split()[-1] for words, _ in Copies.of(places, node).places(FIRST, "file")]

    assert order("b") == ["1.1.1.2:1", "1.1.1.1:1"]
    assert order("a") == order("c") == order("a node that joined") == ["1.1.1.1:1", "1.1.1.2:1"]
    assert list(Copies.of(places, "a").places(FIRST, "other")) == []
    assert list(Copies.of(None, "a").places(FIRST, "file")) == []


# --- what the supervisor makes of it ----------------------------------------------------------------------------------


def committed(root: str, step: int, attempt: int = 1) -> Commit:
    """Whose files are not on storage."""
    files = {f"{checkpoints.attempt_folder(attempt)}/{name}": size for name, size in ((".metadata", 7), ("file", 9))}
    position = Position(step=step, updates=step, past={})
    return checkpoints.publish(root, Commit(attempt=attempt, position=position, files=files, metadata_xxh3=""))


def test_a_checkpoint_that_survives_in_memory_alone_is_whole(tmp_path: Path) -> None:
    root = str(tmp_path)
    commit = committed(root, 10)
    there = {"a:1": [Held(1, 10, ".metadata", 7)], "b:1": [Held(1, 10, "file", 9), Held(1, 10, ".metadata", 7)]}
    assert checkpoints.newest(root, in_memory=memory_copies.sizes(there)) == commit
    assert memory_copies.found(there, commit) == {".metadata": ["a:1", "b:1"], "file": ["b:1"]}


@pytest.mark.parametrize(
    "held", [Held(1, 10, "file", 8), Held(1, 20, "file", 9), Held(2, 10, "file", 9), Held(1, 10, "other", 9)], ids=str
)
def test_a_file_of_another_save_or_size_is_no_copy(tmp_path: Path, held: Held) -> None:
    root = str(tmp_path)
    commit = committed(root, 10)
    there = {"a:1": [Held(1, 10, ".metadata", 7), held]}
    told: list[str] = []
    assert memory_copies.found(there, commit) == {".metadata": ["a:1"]}
    assert checkpoints.newest(root, lambda step, what: told.append(what), memory_copies.sizes(there)) is None
    assert told[0].endswith("file is missing")
