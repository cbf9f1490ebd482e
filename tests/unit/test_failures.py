from __future__ import annotations

import pickle
from typing import Any

import pytest

from orchestrator.errors import LossSpike, NotFinite, StepFailed
from orchestrator.failures import Ending, decide


def ending(outcome: Any = "worker_lost", **values: Any) -> Ending:
    facts = {"attempt": 1, "message": "m", "resumed_from": 0, "last_step": 25, "committed_step": 20}
    return Ending(outcome=outcome, **{**facts, **values})


def test_a_lost_worker_costs_the_steps_since_the_last_commit() -> None:
    decision = decide([ending()], max_restarts=3)
    assert decision.action == "restart"
    assert decision.reason == "worker_lost: resume at step 20, 5 steps to repeat"


@pytest.mark.parametrize("outcome", ["finished", "stopped"])
def test_an_end_that_was_wanted_is_the_end(outcome: str) -> None:
    assert decide([ending(outcome)], max_restarts=3).action == "finish"


def test_wrong_input_is_never_retried() -> None:
    assert decide([ending("user_error")], max_restarts=3).action == "give_up"


def test_the_same_error_at_the_same_step_is_given_up() -> None:
    same = [ending("error"), ending("error", resumed_from=20)]
    assert "the same error twice after step 25" in decide(same, max_restarts=3).reason
    assert decide(same, max_restarts=3).action == "give_up"
    for other in (ending("error", last_step=26), ending("error", message="n"), ending("worker_lost")):
        assert decide([ending("error"), other], max_restarts=3).action == "restart"


def test_restarts_without_a_new_checkpoint_run_out() -> None:
    stuck = [ending(resumed_from=20, last_step=20 + n) for n in range(4)]
    assert decide(stuck[:3], max_restarts=3).action == "restart"
    assert decide(stuck, max_restarts=3).action == "give_up"


def test_a_new_checkpoint_starts_the_count_anew() -> None:
    endings = [ending(resumed_from=n * 10, committed_step=n * 10 + 10, last_step=n * 10 + 15) for n in range(50)]
    assert decide(endings, max_restarts=1).action == "restart"


def test_none_allowed_means_the_first_failure_is_the_last() -> None:
    assert decide([ending(committed_step=0)], max_restarts=0).action == "give_up"


def test_a_lost_shard_is_gone_on_without_as_far_as_that_is_allowed() -> None:
    """However often: what is lost is known by then, so that no attempt meets it again."""
    lost = [ending("shard_lost", lost_shard=f"shards/{n}.arrow", resumed_from=20) for n in range(5)]
    for allowance in (0, 3):
        decision = decide(lost, max_restarts=0, shard_allowance=allowance)
        assert decision.action == "restart"
        assert decision.reason == "goes on without shards/4.arrow: resume at step 20"
    decision = decide(lost, max_restarts=10, shard_allowance=-1)
    assert decision.action == "give_up"
    assert "train.max_lost_shards" in decision.reason


def test_a_damaged_checkpoint_costs_no_restart() -> None:
    """However often: it was set aside, so that no attempt meets it again."""
    damaged = [ending("checkpoint_damaged", resumed_from=step, committed_step=step - 10) for step in (40, 30, 20)]
    decision = decide(damaged, max_restarts=0)
    assert decision.action == "restart"
    assert decision.reason == "goes on from the checkpoint before: resume at step 10"


def test_what_is_not_finite_is_tried_once_more() -> None:
    """A device that erred will not err alike again; the same step with the same end is for the data."""
    first = ending("not_finite", failed_step=24)
    assert decide([first], max_restarts=3).action == "restart"
    decision = decide([first, ending("not_finite", failed_step=24, message="from rank 1 on another host")], 3)
    assert (decision.action, "step 24 came to the same again" in decision.reason) == ("give_up", True)
    assert decide([first, ending(), ending("not_finite", failed_step=24)], max_restarts=9).action == "give_up"
    assert decide([first, ending("not_finite", failed_step=25)], max_restarts=3).action == "restart"


def test_behind_a_spike_the_run_goes_back_as_often_as_it_may() -> None:
    spikes = [ending("spike", failed_step=24 + n, resumed_from=20) for n in range(5)]
    decision = decide(spikes, max_restarts=0, rollback_allowance=1)
    assert (decision.action, decision.reason) == ("restart", "goes back behind step 28")
    decision = decide(spikes, max_restarts=10, rollback_allowance=0)
    assert (decision.action, "train.spikes.max_rollbacks" in decision.reason) == ("give_up", True)


@pytest.mark.parametrize("error", [NotFinite("m", "h", 7), LossSpike("m", "h", 7)])
def test_the_error_of_a_step_names_it_in_another_process_too(error: StepFailed) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.hint, again.step) == (type(error), "m", "h", 7)


def test_a_corrupt_device_costs_restarts_until_they_run_out() -> None:
    """The same verdict twice is no reason to stop: the next plan may do without the node."""
    corrupt = [ending("corruption", resumed_from=20)] * 3
    assert decide(corrupt, max_restarts=3).reason == "corruption: resume at step 20, 5 steps to repeat"
    assert decide([*corrupt, corrupt[0]], max_restarts=3).action == "give_up"
