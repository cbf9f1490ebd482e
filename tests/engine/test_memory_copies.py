"""Ranks that keep copies of their checkpoint in the memory of nodes, and others that go on from these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.errors import CheckpointDamaged
from orchestrator.train import checkpoints, memory_copies
from orchestrator.train.checkpoints import Commit
from orchestrator.train.fragment_memory import CopyServer, FragmentMemory, Room, new_token
from orchestrator.train.memory_copies import Copies, Holder, Places
from tests.engine import save_kills
from tests.engine.save_kills import WORLD, loaded

TOKEN = new_token()


class Cluster:
    """The memories of two nodes, each in a thread here; a rank is on each."""

    def __init__(self) -> None:
        self.memories = [FragmentMemory(2**30) for _ in range(WORLD)]
        self._servers = [CopyServer(memory, TOKEN) for memory in self.memories]
        self.ring = {str(rank): server.start("127.0.0.1") for rank, server in enumerate(self._servers)}

    def places(self, commit: Commit | None = None) -> Places:
        listings = {address: Holder(address, TOKEN).listing() for address in self.ring.values()}
        found = memory_copies.found(listings, commit) if commit else {}
        return Places(token=TOKEN, ring=self.ring, found=found)

    def copies(self, commit: Commit) -> Copies:
        """Of a rank on a node that has joined."""
        return Copies.of(self.places(commit).as_json(), "joined")

    def lose(self, rank: int) -> None:
        self._servers[rank].close()
        del self.ring[str(rank)]

    def close(self) -> None:
        for server in self._servers:
            server.close()


class Saved(NamedTuple):
    uri: str
    commit: Commit
    cluster: Cluster

    def clear_storage(self) -> None:
        """Of all but COMMITTED."""
        for name in self.commit.files:
            Path(checkpoints.step_directory(self.uri, self.commit.step), name).unlink()


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Saved]:
    uri, cluster = str(tmp_path / "storage"), Cluster()
    told = save_kills.saves(uri, tmp_path / "ranks", None, places=cluster.places().as_json())
    assert [rank["error"] for rank in told] == [None] * WORLD
    commit = checkpoints.newest(uri)
    assert commit is not None
    yield Saved(uri, commit, cluster)
    cluster.close()


def room(memory: FragmentMemory, name: str) -> Room:
    (files,) = memory._files.values()
    return files[name]


def test_every_file_is_held_by_both_nodes(saved: Saved) -> None:
    held = saved.cluster.places(saved.commit).found
    both = list(saved.cluster.ring.values())
    assert held == {".metadata": both, "__0_0.distcp": both, "__1_0.distcp": both}


def test_any_layout_loads_from_memory_when_storage_has_lost_the_files(saved: Saved) -> None:
    saved.clear_storage()
    assert loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit))
    for rank in range(3):
        assert loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit), rank, 3)
    with pytest.raises(CheckpointDamaged, match="is missing"):
        loaded(saved.uri, saved.commit)


@pytest.mark.parametrize("lost", range(WORLD))
def test_either_node_alone_holds_the_whole_checkpoint(saved: Saved, lost: int) -> None:
    saved.clear_storage()
    saved.cluster.lose(lost)
    assert loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit))


def test_a_memory_that_goes_after_it_was_asked_is_done_without(saved: Saved) -> None:
    before = saved.cluster.copies(saved.commit)
    saved.cluster.lose(0)
    assert loaded(saved.uri, saved.commit, before)
    saved.cluster.lose(1)
    assert loaded(saved.uri, saved.commit, before), "from storage"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_in_a_memory_is_found_and_the_next_place_is_read(saved: Saved, name: str) -> None:
    for memory in saved.cluster.memories:  # the nearest, then all
        data = room(memory, name).data
        data[len(data) // 2] ^= 1
        assert loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit))
    saved.clear_storage()
    with pytest.raises(CheckpointDamaged) as damage:
        loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit))
    assert damage.value.step == saved.commit.step


def test_a_damaged_file_on_storage_is_not_missed_while_a_memory_has_it(saved: Saved) -> None:
    file = Path(checkpoints.step_directory(saved.uri, saved.commit.step), saved.commit.folder, "__1_0.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    assert loaded(saved.uri, saved.commit, saved.cluster.copies(saved.commit))


def test_the_ranks_save_on_where_a_memory_takes_nothing(tmp_path: Path) -> None:
    uri, cluster = str(tmp_path / "storage"), Cluster()
    places = cluster.places().as_json()
    cluster.lose(1)
    try:
        told = save_kills.saves(uri, tmp_path / "ranks", None, places=places)
        assert [rank["error"] for rank in told] == [None] * WORLD
        commit = checkpoints.newest(uri)
        assert commit is not None
        assert len(cluster.places(commit).found) == 3, "the node that is left has what both ranks wrote"
    finally:
        cluster.close()
