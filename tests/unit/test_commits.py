"""Checkpoints as files: what is trusted, what is not, what is kept. No torch here."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.errors import StorageError
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position, Retention


def commit(root: str, step: int, attempt: int = 1, held_out_loss: float | None = None) -> Commit:
    directory = checkpoints.step_directory(root, step)
    name = f"{checkpoints.attempt_folder(attempt)}/__0_0.distcp"
    data = f"state of step {step}".encode()
    storage.write(storage.join(directory, name), data)
    position = Position(step=step, updates=step, past={})
    made = Commit(
        attempt=attempt, position=position, held_out_loss=held_out_loss, files={name: len(data)}, metadata_xxh3=""
    )
    storage.write(storage.join(directory, checkpoints.COMMITTED), checkpoints.sealed(made))
    return made


def test_the_newest_commit_is_found(anywhere: str) -> None:
    assert checkpoints.newest(anywhere) is None
    for step in (5, 10, 100):
        commit(anywhere, step)
    assert checkpoints.newest(anywhere) == commit(anywhere, 100)
    assert checkpoints.committed_steps(anywhere) == [5, 10, 100]


def test_an_uncommitted_checkpoint_is_never_resumed(anywhere: str) -> None:
    commit(anywhere, 5)
    storage.write(storage.join(checkpoints.step_directory(anywhere, 10), "attempt-001", "__0_0.distcp"), b"half")
    found = checkpoints.newest(anywhere)
    assert found is not None
    assert found.step == 5


def test_a_file_cut_short_is_seen_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    root = str(tmp_path)
    commit(root, 5)
    bad = commit(root, 10)
    file = Path(checkpoints.step_directory(root, 10), next(iter(bad.files)))
    file.write_bytes(file.read_bytes()[:-1])
    told: list[tuple[int, str]] = []
    found = checkpoints.newest(root, lambda step, what: told.append((step, what)))
    assert found is not None
    assert found.step == 5
    assert told[0][0] == 10
    assert "is damaged" in told[0][1]


def test_a_damaged_step_can_be_committed_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    bad = commit(root, 10)
    Path(checkpoints.step_directory(root, 10), next(iter(bad.files))).unlink()
    assert checkpoints.newest(root) is None
    assert checkpoints.committed_steps(root) == []
    assert checkpoints.newest(root) is None
    commit(root, 10, attempt=2)
    found = checkpoints.newest(root)
    assert found is not None
    assert found.attempt == 2


def test_the_last_few_are_kept(anywhere: str) -> None:
    for step in (1, 2, 3, 4):
        commit(anywhere, step)
    checkpoints.retain(anywhere, Retention(last=2))
    assert checkpoints.committed_steps(anywhere) == [3, 4]
    assert all(name.startswith(("step-00000003", "step-00000004")) for name in storage.list_files(anywhere))


def test_a_commit_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    root = str(tmp_path)
    commit(root, 5)
    commit(root, 10)
    marker = Path(checkpoints.step_directory(root, 10), checkpoints.COMMITTED)
    marker.write_bytes(marker.read_bytes()[:40])
    told: list[str] = []
    found = checkpoints.newest(root, lambda step, what: told.append(what))
    assert found is not None
    assert found.step == 5
    assert "is damaged" in told[0]


def test_a_driver_that_fell_behind_cannot_commit(anywhere: str) -> None:
    late = commit(anywhere, 5, attempt=2)
    storage.delete(storage.join(checkpoints.step_directory(anywhere, 5), checkpoints.COMMITTED))
    commit(anywhere, 20)
    with pytest.raises(StorageError, match="committed by another attempt"):
        checkpoints.publish(anywhere, late)
    assert checkpoints.committed_steps(anywhere) == [20]
