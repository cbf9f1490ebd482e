"""A rank that is killed while it saves, at every point where that can make a difference: a whole checkpoint stands."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.train import checkpoints
from tests.engine import save_kills
from tests.engine.save_kills import AFTER, BEFORE, SAVED, WORLD, Kill


def one_process_saves(uri: str, step: int, attempt: int) -> None:
    made = save_kills.saver(uri, attempt)
    made.save(save_kills.position(step), save_kills.fragments(step))
    made.wait()


def places(root: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Storage that holds the checkpoint of step BEFORE, anew each time, and a folder for the ranks."""
    for number in itertools.count():
        uri = storage.join(root, f"{number:04d}")
        one_process_saves(uri, BEFORE, attempt=1)
        yield uri, tmp_path / f"ranks-{number:04d}"


def check(uri: str, outcome: list[dict[str, object]], kill: Kill) -> int:
    """What stands after a kill is whole, and the next attempt goes on from there. Returns the step that stood."""
    survivor = outcome[1 - kill.rank]
    assert outcome[kill.rank] == {}, f"{kill}: the rank lived"
    commit = checkpoints.newest(uri)
    assert commit is not None, kill
    assert commit.step in (BEFORE, SAVED), kill
    assert save_kills.loaded(uri, commit), kill
    assert survivor["error"] or commit.step == SAVED, f"{kill}: the peer takes for saved what is not"
    one_process_saves(uri, AFTER, attempt=2)
    after = checkpoints.newest(uri)
    assert after is not None, kill
    assert (after.step, after.parent) == (AFTER, commit.step)
    assert save_kills.loaded(uri, after), kill
    assert all(name.startswith(f"step-{AFTER:08d}/") for name in storage.list_files(uri)), f"{kill}: left behind"
    return commit.step


def killed_everywhere(root: str, tmp_path: Path, every_call: bool) -> set[int]:
    """Returns the steps that stood after one kill or another."""
    stood = set()
    rooms = places(root, tmp_path)
    undisturbed = save_kills.saves(*next(rooms), None)
    assert [rank["error"] for rank in undisturbed] == [None] * WORLD
    for rank in range(WORLD):
        calls = undisturbed[rank]["calls"]
        points = range(len(calls)) if every_call else save_kills.spread(calls)
        for call in points:
            kill, (uri, folder) = Kill(rank, call), next(rooms)
            stood.add(check(uri, save_kills.saves(uri, folder, kill), kill))
            if not storage.is_s3(uri):
                shutil.rmtree(uri)
    return stood


def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert killed_everywhere(str(tmp_path / "storage"), tmp_path, every_call=False) == {BEFORE, SAVED}


def test_a_kill_at_any_request_to_s3_leaves_a_whole_checkpoint(bucket: str, tmp_path: Path) -> None:
    assert killed_everywhere(bucket, tmp_path, every_call=True) == {BEFORE, SAVED}


def test_a_rank_that_cannot_write_fails_on_every_rank(tmp_path: Path) -> None:
    uri, folder = next(places(str(tmp_path / "storage"), tmp_path))
    Path(checkpoints.step_directory(uri, SAVED), checkpoints.attempt_folder(1), "__1_0.distcp").mkdir(parents=True)
    errors = [str(rank["error"]) for rank in save_kills.saves(uri, folder, None)]
    assert all(error.startswith("SaveFailed: rank 1: IsADirectoryError") for error in errors), errors
    assert checkpoints.committed_steps(uri) == [BEFORE]


def test_every_rank_of_a_replaced_attempt_is_told(tmp_path: Path) -> None:
    uri, folder = next(places(str(tmp_path / "storage"), tmp_path))
    one_process_saves(uri, AFTER, attempt=2)
    errors = [str(rank["error"]) for rank in save_kills.saves(uri, folder, None)]
    assert all("attempt 1 has been replaced" in error for error in errors), errors
    assert checkpoints.committed_steps(uri) == [AFTER]


@pytest.mark.soak
def test_a_kill_at_every_single_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert killed_everywhere(str(tmp_path / "storage"), tmp_path, every_call=True) == {BEFORE, SAVED}
