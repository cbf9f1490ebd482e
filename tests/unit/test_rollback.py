"""Going back behind a loss spike, on run directories made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import resume, rollback, storage
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints
from tests.made_runs import commit, manifest_of, recipe, root_of, train

JUMP = {"spikes": {"action": "rollback", "jump": 2}}


def spiked(run: RunDir, attempt: int, step: int, *documents: str) -> None:
    """Leave behind what an attempt finds out about a spike."""
    run.write_json(run.spike(attempt, step), {"attempt": attempt, "step": step, "quarantined": documents})


def gone_back(run: RunDir, step: int = 9) -> None:
    """An attempt to step 8 with checkpoints at 4 and 8, and back from a spike behind it."""
    settings = recipe(root_of(run), **JUMP)
    train(run, settings, 1, 4)
    attempt = train(run, settings, 5, 8)
    spiked(run, attempt, step, "a/d3")
    rollback.roll_back(run, settings, attempt, step)


def test_the_run_resumes_before_the_spike_and_passes_over_what_is_around_it(run_anywhere: RunDir) -> None:
    run, settings = run_anywhere, recipe(root_of(run_anywhere), **JUMP)
    gone_back(run)
    found = resume.resume_point(run)
    assert found is not None
    assert found.step == 4, "the checkpoint of step 8 is among the steps to pass over"
    chosen = resume.data_schedule(run, settings, manifest_of(run))
    assert [step for step in range(1, 21) if chosen.skips(step)] == [7, 8, 9, 10, 11]
    assert list(chosen.exclusions.quarantined) == ["a/d3"]
    resume.check_past(run, settings)
    train(run, settings, 5, 12)
    assert sorted(run.loss_curve()) == [1, 2, 3, 4, 5, 6, 12]
    resume.check_past(run, settings)
    (event,) = [event for event in run.events() if event["event"] == "rolled_back"]
    assert (event["step"], event["back_to"], event["first"], event["last"]) == (9, 4, 7, 11)
    assert event["quarantined"] == ["a/d3"]
    (changed,) = [event for event in run.events() if event["event"] == "schedule_changed"]
    assert changed["changed"] == ["train.quarantine", "train.skip_steps"]


def test_the_second_spike_goes_back_behind_the_first_one_only_where_it_must(run: RunDir) -> None:
    gone_back(run)
    settings = recipe(root_of(run), **JUMP)
    assert train(run, settings, 5, 12) == 3
    spiked(run, 3, 15)
    rollback.roll_back(run, settings, 3, 15)
    assert checkpoints.committed_steps(run.checkpoints) == [4, 12], "what an attempt after the first committed stays"
    chosen = resume.data_schedule(run, settings, manifest_of(run))
    assert [step for step in range(1, 21) if chosen.skips(step)] == [7, 8, 9, 10, 11, 13, 14, 15, 16, 17]


def test_what_was_passed_over_and_left_out_goes_on_beside_the_recipe(run: RunDir) -> None:
    gone_back(run)
    settings = recipe(root_of(run), skip_steps=[[8, 8], [18, 19]], quarantine=["b/d40", "a/d3"], **JUMP)
    chosen = resume.data_schedule(run, settings, manifest_of(run))
    assert chosen.past(20)["skipped"] == [[7, 11], [18, 19]]
    assert sorted(chosen.exclusions.quarantined) == ["a/d3", "b/d40"]


def test_starting_over_forgets_spikes(run: RunDir) -> None:
    gone_back(run)
    settings = recipe(root_of(run))
    resume.start_over(run, settings)
    chosen = resume.data_schedule(run, settings, manifest_of(run))
    assert (chosen.skip_steps, bool(chosen.exclusions)) == ((), False)
    assert (run.spikes(), run.rollbacks()) == ([], [])
    train(run, settings, 1, 8)
    rollback.finish(run)
    assert checkpoints.committed_steps(run.checkpoints) == [8]


@pytest.mark.parametrize("operation", range(1, 4))
def test_going_back_holds_from_its_first_write_on(run: RunDir, monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    """Killed before any later write or deletion, it is finished by the next command."""
    calls: list[str] = []

    def breaking(call: Callable[..., bool | None]) -> Callable[..., bool | None]:
        def broken(uri: str, *rest: bytes) -> bool | None:
            if "rollback" in uri or calls:
                calls.append(uri)
            if len(calls) == operation + 1:
                raise KeyboardInterrupt
            return call(uri, *rest)

        return broken

    with monkeypatch.context() as patched:
        for name in ("write", "delete", "create"):
            patched.setattr(storage, name, breaking(getattr(storage, name)))
        interrupted = False
        try:
            gone_back(run)
        except KeyboardInterrupt:
            interrupted = True
    assert interrupted == (operation < 3), "two writes follow the first"
    rollback.finish(run)
    resume.check_past(run, recipe(root_of(run), **JUMP))
    assert checkpoints.committed_steps(run.checkpoints) == [4]
    (event,) = [event for event in run.events() if event["event"] == "rolled_back"]
    assert (event["step"], event["back_to"], event["quarantined"]) == (9, 4, ["a/d3"])


def test_a_mixture_of_stages_says_which_one_a_step_is_of(run: RunDir) -> None:
    stages: list[dict[str, Any]] = [
        {"weights": {"a": 1}, "tokens": 40},  # 5 samples, batches of 4
        {"weights": {"b": 1}, "tokens": 80},
        {"weights": {"a": 1, "b": 1}},
    ]
    order = resume.data_schedule(run, recipe(root_of(run), corpus_mixture=stages), manifest_of(run)).order
    assert [order.stage(step) for step in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    assert resume.data_schedule(run, recipe(root_of(run)), manifest_of(run)).order.stage(99) == 0


def test_the_history_of_the_watch_goes_through_a_commit(run: RunDir) -> None:
    state = {"past": [[2.0, 0.1 + 0.2]], "spikes": [], "stage": 0}
    chosen = resume.data_schedule(run, recipe(root_of(run)), manifest_of(run))
    commit(run, chosen, 4, watch=state)
    assert checkpoints.read_commit(run.checkpoints, 4).position.watch == state
