"""Checkpoints as files: what is trusted, what is not, what is kept. No torch here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import storage
from orchestrator.errors import CheckpointDamaged, StorageError, UserError
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
    storage.write(checkpoints.marker(root, step, attempt), checkpoints.sealed(made))
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
    checkpoints.retain(anywhere, Retention(last=2), attempt=1)
    assert checkpoints.committed_steps(anywhere) == [3, 4]
    assert all(name.startswith(("step-00000003", "step-00000004")) for name in storage.list_files(anywhere))


def test_which_checkpoints_are_superfluous() -> None:
    losses = dict.fromkeys(range(10, 101, 10)) | {30: 2.0, 60: 1.0, 70: 1.0, 80: 1.5}
    for retention, kept in [
        (Retention(last=1), {100}),
        (Retention(last=3), {80, 90, 100}),
        (Retention(last=20), set(losses)),
        (Retention(last=1, every=30), {30, 60, 90, 100}),
        (Retention(last=1, every=200), {100}),
        (Retention(last=1, best=True), {70, 100}),
        (Retention(last=2, every=50, best=True), {50, 70, 90, 100}),
    ]:
        assert retention.superfluous(losses) == sorted(losses.keys() - kept), retention
    assert Retention(last=1, best=True).superfluous({10: None, 20: None}) == [10], "nothing was measured"
    assert Retention(last=1).superfluous({}) == []


@given(
    st.dictionaries(st.integers(1, 200), st.none() | st.floats(0, 20)),
    st.integers(1, 5),
    st.none() | st.integers(1, 50),
    st.booleans(),
)
def test_retention_never_takes_what_it_promises_to_keep(
    losses: dict[int, float | None], last: int, every: int | None, best: bool
) -> None:
    retention = Retention(last=last, every=every, best=best)
    gone = retention.superfluous(losses)
    left = {step: loss for step, loss in losses.items() if step not in gone}
    assert sorted(left)[-last:] == sorted(losses)[-last:]
    assert not every or not any(step % every == 0 for step in gone)
    measured = [loss for loss in losses.values() if loss is not None]
    assert not (best and measured) or min(measured) in left.values()
    assert retention.superfluous(left) == [], "what is kept once is kept"


def test_what_ended_saves_left_behind_goes_once_a_later_step_is_committed(anywhere: str) -> None:
    commit(anywhere, 4)
    for step in (2, 6, 8):
        storage.write(storage.join(checkpoints.step_directory(anywhere, step), "attempt-001", "__0_0.distcp"), b"half")
    commit(anywhere, 1)
    checkpoints.set_aside(anywhere, 1, "damaged")
    commit(anywhere, 7)
    checkpoints.retain(anywhere, Retention(last=2), attempt=1)
    held = {name.split("/")[0] for name in storage.list_files(anywhere)}
    assert held == {"step-00000004", "step-00000007", "step-00000008"}, "8 may be in the making"


def test_a_commit_without_its_seal_is_damaged_and_one_of_another_version_is_not(tmp_path: Path) -> None:
    root = str(tmp_path)
    made = commit(root, 5)
    marker = checkpoints.marker(root, 5, attempt=1)
    values = storage.read_json(marker)
    del values["seal"]
    storage.write(marker, json.dumps(values).encode())
    with pytest.raises(CheckpointDamaged):
        checkpoints.read_commit(root, 5)
    storage.write(marker, checkpoints.sealed(replace(made, format=6)))
    with pytest.raises(UserError, match="has format 6, and this version of Terrane reads 5"):
        checkpoints.read_commit(root, 5)


def test_a_commit_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    root = str(tmp_path)
    commit(root, 5)
    commit(root, 10)
    marker = Path(checkpoints.marker(root, 10, attempt=1))
    marker.write_bytes(marker.read_bytes()[:40])
    told: list[str] = []
    found = checkpoints.newest(root, lambda step, what: told.append(what))
    assert found is not None
    assert found.step == 5
    assert "is damaged" in told[0]


def test_copies_kept_beside_the_steps_are_passed_over(anywhere: str) -> None:
    commit(anywhere, 5)
    last = commit(anywhere, 10)
    for name in ("step-00000010.bak", "backup", "step-x", "backup/step-00000020"):
        storage.write(storage.join(anywhere, name, "attempt-001", checkpoints.COMMITTED), checkpoints.sealed(last))
        storage.write(storage.join(anywhere, name, "attempt-001", "__0_0.distcp"), b"state")
    before = storage.list_files(anywhere)
    assert checkpoints.committed_steps(anywhere) == [5, 10]
    checkpoints.retain(anywhere, Retention(last=2), attempt=1)
    assert storage.list_files(anywhere) == before


def test_a_commit_of_another_step_is_set_aside(anywhere: str) -> None:
    kept = commit(anywhere, 5)
    data = checkpoints.sealed(kept)
    storage.write(checkpoints.marker(anywhere, 99, attempt=1), data)
    told: list[tuple[int, str]] = []
    assert checkpoints.newest(anywhere, lambda step, what: told.append((step, what))) == kept
    assert told[0][0] == 99 and told[0][1].endswith("is of step 5 and attempt 1")
    assert checkpoints.committed_steps(anywhere) == [5], "step 6 can be committed"


def test_a_commit_that_goes_while_it_is_read_is_passed_over(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = commit(anywhere, 5)
    monkeypatch.setattr(checkpoints, "committed", lambda root: {5: 1, 10: 1})
    assert checkpoints.newest(anywhere) == kept


def test_a_driver_that_fell_behind_cannot_commit(anywhere: str) -> None:
    late = commit(anywhere, 5, attempt=2)
    storage.delete(checkpoints.marker(anywhere, 5, attempt=2))
    commit(anywhere, 20)
    with pytest.raises(StorageError, match="has been replaced"):
        checkpoints.publish(anywhere, late)
    assert checkpoints.committed_steps(anywhere) == [20]
