"""Several attempts on one directory of checkpoints: which commits count, what a process that wakes up late can do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import storage
from orchestrator.errors import StorageError, UserError
from orchestrator.train import checkpoints
from orchestrator.train.succession import mark_back, mark_begun, mark_resumed, succession
from tests.zombie import Stopped, save, state

REPLACED = "attempt 1 has been replaced: its commit of step 10 does not count"


def begin(root: str, attempt: int) -> int:
    """Returns the step that the attempt goes on from."""
    found = checkpoints.begin(root, attempt)
    return found.step if found else 0


def whole(root: str) -> dict[int, int]:
    """The attempts of the commits that count, by step, each of which holds what that attempt wrote."""
    for step, attempt in checkpoints.committed(root).items():
        commit = checkpoints.read_commit(root, step)
        assert (commit.attempt, checkpoints.damage(root, commit)) == (attempt, None)
        (name,) = commit.files
        assert storage.read(storage.join(checkpoints.step_directory(root, step), name)) == state(attempt, step)
    return checkpoints.committed(root)


# --- processes that are stopped ---------------------------------------------------------------------------------------

POINTS = ["before create", "after create"]


@pytest.mark.parametrize("where", POINTS)
def test_of_two_that_commit_one_step_the_live_one_counts(anywhere: str, where: str) -> None:
    begin(anywhere, 1)
    save(anywhere, 1, 5)
    with Stopped(anywhere, 1, 10, where) as zombie:
        went_on_from = begin(anywhere, 2)
        assert went_on_from == (5 if where == "before create" else 10), "what stands is taken over, if only just"
        step = 10 if went_on_from == 5 else 15
        save(anywhere, 2, step, keep=2)
        before = storage.list_files(anywhere)
        assert zombie.goes_on() == REPLACED
    assert whole(anywhere) == {went_on_from: 1, step: 2}
    assert set(before) <= set(storage.list_files(anywhere)), "it deleted nothing"


def test_a_zombie_that_was_ahead_does_not_count_and_blocks_nobody(anywhere: str) -> None:
    begin(anywhere, 1)
    save(anywhere, 1, 5)
    with Stopped(anywhere, 1, 10, "before create") as zombie:
        begin(anywhere, 2)
        save(anywhere, 2, 8, keep=2)
        assert zombie.goes_on() == REPLACED
    assert whole(anywhere) == {5: 1, 8: 2}
    save(anywhere, 2, 10)
    assert whole(anywhere) == {10: 2}
    assert begin(anywhere, 3) == 10


def test_a_zombie_from_before_a_rollback_does_not_bring_back_what_was_left(anywhere: str) -> None:
    begin(anywhere, 1)
    save(anywhere, 1, 5)
    with Stopped(anywhere, 1, 10, "before create") as zombie:
        checkpoints.go_back(anywhere, 1, 5)
        assert zombie.goes_on() == REPLACED
    assert whole(anywhere) == {5: 1}
    assert begin(anywhere, 2) == 5
    save(anywhere, 2, 10, keep=2)
    assert whole(anywhere) == {5: 1, 10: 2}


def test_a_zombie_that_wakes_up_while_it_deletes_takes_nothing_that_is_needed(anywhere: str) -> None:
    """It was about to delete the checkpoint before its own, which the next attempt has taken over."""
    begin(anywhere, 1)
    save(anywhere, 1, 5)
    with Stopped(anywhere, 1, 10, "before delete") as zombie:
        assert begin(anywhere, 2) == 10
        assert zombie.goes_on() == "committed"
    assert whole(anywhere) == {10: 1}


# --- attempts in turn -------------------------------------------------------------------------------------------------


def test_an_attempt_that_has_begun_ends_those_before_it_at_once(anywhere: str) -> None:
    assert [begin(anywhere, attempt) for attempt in (1, 2)] == [0, 0]
    for attempt, allowed in ((1, False), (2, True)):
        if allowed:
            assert save(anywhere, attempt, 10).parent is None
        else:
            with pytest.raises(StorageError, match="attempt 1 has been replaced"):
                save(anywhere, attempt, 10)


def test_an_attempt_that_begins_late_does_not_take_over_from_a_later_one(anywhere: str) -> None:
    """Its driver was stopped between the claim of its number and its begin."""
    save(anywhere, 1, 5)
    begin(anywhere, 3)
    save(anywhere, 3, 10, keep=2)
    begin(anywhere, 2)
    assert whole(anywhere) == {5: 1, 10: 3}
    with pytest.raises(StorageError, match="attempt 2 has been replaced"):
        save(anywhere, 2, 15)
    save(anywhere, 3, 15)
    assert whole(anywhere) == {15: 3}


def test_a_begin_cut_short_is_made_good_by_the_next(anywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(anywhere, 1)
    save(anywhere, 1, 5)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "newest", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(anywhere, 2)
    assert whole(anywhere) == {5: 1}
    assert begin(anywhere, 3) == 5
    save(anywhere, 3, 10)
    assert whole(anywhere) == {10: 3}


def test_after_a_rollback_the_line_goes_on_from_before_it(anywhere: str) -> None:
    begin(anywhere, 1)
    for step in (5, 10, 15):
        save(anywhere, 1, step, keep=9)
    checkpoints.go_back(anywhere, 1, 5)
    assert begin(anywhere, 2) == 5
    save(anywhere, 2, 10, keep=9)
    checkpoints.go_back(anywhere, 2, 10)
    assert begin(anywhere, 3) == 10
    save(anywhere, 3, 20, keep=9)
    assert whole(anywhere) == {5: 1, 10: 2, 20: 3}


def test_reading_costs_a_listing_whoever_has_committed(bucket: str) -> None:
    for attempt in (1, 2, 3):
        begin(bucket, attempt)
        save(bucket, attempt, 10 * attempt, keep=9)
    requests: list[str] = []
    client = storage._s3()
    client.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name), unique_id="count")
    try:
        assert list(checkpoints.committed(bucket)) == [10, 20, 30]
    finally:
        client.meta.events.unregister("before-call.s3", unique_id="count")
    assert requests == ["ListObjectsV2"]


def test_commits_of_an_earlier_version_are_refused_until_the_run_begins_anew(anywhere: str) -> None:
    storage.write(storage.join(checkpoints.step_directory(anywhere, 5), checkpoints.COMMITTED), b"{}")
    with pytest.raises(UserError, match="is of an earlier version"):
        checkpoints.newest(anywhere)
    storage.write(storage.join(anywhere, "started-over.json"), b'{"last_attempt": 1, "set_aside": true}')
    assert checkpoints.newest(anywhere) is None


# --- what is kept of that which does not count ------------------------------------------------------------------------


def test_what_was_set_aside_goes_once_training_is_as_many_commits_past_it(anywhere: str) -> None:
    begin(anywhere, 1)
    for step in (5, 10, 15, 20):
        save(anywhere, 1, step, keep=9)
    checkpoints.go_back(anywhere, 1, 5)
    begin(anywhere, 2)

    def after(step: int) -> list[str]:
        save(anywhere, 2, step, keep=2)
        folders = {name.rpartition("/")[0] for name in storage.list_files(anywhere) if name.startswith("step-")}
        return sorted(folder.replace("step-000000", "").replace("/attempt-00", " by ") for folder in folders)

    assert after(10) == ["05 by 1", "10 by 2", "15 by 1", "20 by 1"], "the two newest that were set aside"
    assert after(15) == ["10 by 2", "15 by 1", "15 by 2", "20 by 1"]
    assert after(20) == ["15 by 1", "15 by 2", "20 by 1", "20 by 2"], "one commit is past step 15"
    assert after(25) == ["20 by 1", "20 by 2", "25 by 2"]
    assert after(30) == ["25 by 2", "30 by 2"]


def test_a_save_in_the_making_stays_and_those_of_earlier_attempts_go(anywhere: str) -> None:
    begin(anywhere, 1)
    for step, attempt in ((20, 1), (20, 2), (2, 2)):
        name = storage.join(checkpoints.step_directory(anywhere, step), f"attempt-00{attempt}", "__0_0.distcp")
        storage.write(name, b"half")
    begin(anywhere, 2)
    save(anywhere, 2, 10)
    left = [name for name in storage.list_files(anywhere) if name.endswith(".distcp")]
    assert left == ["step-00000010/attempt-002/__0_0.distcp", "step-00000020/attempt-002/__0_0.distcp"]


# --- the pure part ----------------------------------------------------------------------------------------------------


def test_other_names_are_no_marks() -> None:
    assert succession(["attempt-001.bak", "README", "attempt-002.from-", "x/attempt-009"]) == succession([])


Step = st.integers(0, 30)
Made = st.lists(st.tuples(Step, st.booleans()), min_size=1, max_size=8)


@given(Made, Step)
def test_a_step_belongs_to_one_attempt_at_most(made: list[tuple[int, bool]], step: int) -> None:
    """Of attempts that went on from some step, with or without going back afterwards; any may have committed it."""
    marks = [mark_begun(number) for number, _ in enumerate(made, 1)]
    marks += [mark_resumed(number, began) for number, (began, _) in enumerate(made, 1)]
    marks += [mark_back(number, began) for number, (began, back) in enumerate(made, 1) if back]
    found = succession(marks)
    owners = [n for n, (began, _) in enumerate(made, 1) if began < step and found.counts(step, n)]
    assert len(owners) <= 1
    assert not owners or all(began >= step for began, _ in made[owners[0] :]), "nobody has gone back behind it since"
    assert [n for n in range(1, len(made) + 1) if not found.has_replaced(n)] == [len(made)] * (not made[-1][1])
