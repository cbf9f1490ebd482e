from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import LossSpike, NotFinite, StepFailed
from orchestrator.failures import BUDGETS, WITHOUT_COUNT, Budget, Decision, Ending, Outcome, decide


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


# --- kinds, budgets, back-off -----------------------------------------------------------------------------------------

FAILURES = ("worker_lost", "out_of_memory", "node_lost", "network", "storage", "hang", "corruption", "error")


def stuck(outcome: str, times: int, **values: Any) -> list[Ending]:
    """Attempts that came to different steps, and to no checkpoint."""
    return [ending(outcome, resumed_from=20, last_step=25 + n, plan=f"plan {n}", **values) for n in range(times)]


def course(outcome: str, max_restarts: int = 10) -> list[Decision]:
    """What is decided while the same kind of failure goes on, up to the end."""
    decisions: list[Decision] = []
    while not decisions or decisions[-1].action == "restart":
        decisions.append(decide(stuck(outcome, len(decisions) + 1), max_restarts))
    return decisions


def test_a_lost_worker_and_a_lost_node_are_made_up_for_at_once() -> None:
    assert [decision.wait_s for decision in course("worker_lost")[:5]] == [0, 0, 5, 10, 20]
    assert [decision.wait_s for decision in course("node_lost")[:5]] == [0, 5, 10, 20, 40]


def test_storage_and_network_are_given_time() -> None:
    waits = [decision.wait_s for decision in course("storage")]
    assert waits[:4] == [5, 10, 20, 40]
    assert sum(waits) > 45 * 60, "an outage of three quarters of an hour"
    assert sum(decision.wait_s for decision in course("network")) > 20 * 60
    decision = decide(stuck("storage", 3), 10)
    assert decision.reason == "storage: resume at step 20, 7 steps to repeat, in 20 s"


def test_the_first_wait_is_the_same_for_an_attempt_that_had_left_a_checkpoint() -> None:
    assert decide([ending("network")], 10).wait_s == 5


def test_what_costs_much_or_helps_little_has_a_budget_of_its_own() -> None:
    tries = {kind: len(course(kind)) - 1 for kind in FAILURES}
    assert tries == {
        **dict.fromkeys(("worker_lost", "node_lost", "network", "storage", "corruption"), 10),
        **dict.fromkeys(("out_of_memory", "error"), 5),
        "hang": 3,
    }
    assert course("hang")[-1].reason == "hang 4 times without a new checkpoint, and more of the same will not help"
    assert len(course("hang", max_restarts=1)) - 1 == 1, "the total holds for every kind"


def test_kinds_share_the_total() -> None:
    mixed = [*stuck("network", 2), *stuck("hang", 2), *stuck("worker_lost", 2)]
    assert decide(mixed, max_restarts=6).action == "restart"
    assert "6 attempts in a row without a new checkpoint" in decide(mixed, max_restarts=5).reason


def test_a_night_on_spot_nodes_ends_with_the_last_step() -> None:
    lost = [ending("node_lost", resumed_from=n, committed_step=n + 10, last_step=n + 13) for n in range(0, 5000, 10)]
    for hour in range(1, len(lost), 7):
        decision = decide(lost[:hour], max_restarts=0)
        assert (decision.action, decision.wait_s) == ("restart", 0)


def test_making_way_costs_nothing() -> None:
    asked = ending("yielded", resumed_from=20, message="2 -> 4 workers")
    decision = decide([asked] * 100, max_restarts=0)
    assert (decision.action, decision.wait_s) == ("restart", 0)
    assert decision.reason == "2 -> 4 workers: goes on at step 20"
    between = [*stuck("worker_lost", 2), *[asked] * 50, *stuck("worker_lost", 1)]
    assert decide(between, max_restarts=3).action == "restart"
    assert decide(between, max_restarts=2).action == "give_up"


@pytest.mark.parametrize("outcome", ["hang", "out_of_memory"])
def test_the_same_plan_is_not_tried_again_where_it_came_to_nothing(outcome: str) -> None:
    first = ending(outcome, resumed_from=20, plan="2 workers on a (2)", message="one")
    again = ending(outcome, resumed_from=20, plan="2 workers on a (2)", message="in other words")
    for between in ([], [ending(resumed_from=20, last_step=21)]):
        decision = decide([first, *between, again], max_restarts=10)
        assert decision.action == "give_up"
        assert decision.reason == f"the same {outcome.replace('_', ' ')} twice after step 25"
    moved = ending(outcome, resumed_from=20, plan="2 workers on b (2)")
    assert decide([first, moved], max_restarts=10).action == "restart"


def test_an_error_at_a_step_that_was_passed_in_between_is_another() -> None:
    same = ending("error", resumed_from=20)
    assert decide([same, ending(resumed_from=20, last_step=24), same], max_restarts=10).action == "give_up"
    assert decide([same, ending(resumed_from=20, last_step=29), same], max_restarts=10).action == "restart"


def test_an_error_is_the_same_whichever_rank_tells_it_first() -> None:
    first = ending("error", message="rank 3: ValueError: <object at 0x7f8a3c> is none")
    again = ending("error", message="ranks 0, 1: ValueError: <object at 0x55d0aa> is none")
    assert decide([first, again], max_restarts=10).action == "give_up"


def test_after_a_lack_of_memory_the_next_attempt_takes_less() -> None:
    assert decide(stuck("out_of_memory", 1), 3).reason.startswith("out_of_memory: resume with less memory at step 20")


def endings_at_random() -> st.SearchStrategy[list[Ending]]:
    outcomes = st.sampled_from([outcome for outcome in get_args(Outcome) if outcome not in ("finished", "stopped")])
    steps = st.integers(0, 3)

    def made(what: list[tuple[Any, int, int]]) -> list[Ending]:
        found, committed = [], 0
        for number, (outcome, learned, lost) in enumerate(what, 1):
            resumed, committed = committed, committed + learned
            facts = {"resumed_from": resumed, "committed_step": committed, "last_step": committed + lost}
            found.append(ending(outcome, attempt=number, plan="p", **facts))
        return found

    return st.lists(st.tuples(outcomes, steps, steps), min_size=1, max_size=30).map(made)


@given(endings=endings_at_random(), max_restarts=st.integers(0, 12))
def test_every_course_of_endings_is_decided_in_bounds(endings: list[Ending], max_restarts: int) -> None:
    decision = decide(endings, max_restarts, rollback_allowance=1)
    budget = BUDGETS.get(endings[-1].outcome, Budget())
    assert 0 <= decision.wait_s <= budget.longest_s
    if endings[-1].outcome in WITHOUT_COUNT:
        assert (decision.action, decision.wait_s) == ("restart", 0)
    if decision.action == "restart" and endings[-1].outcome not in WITHOUT_COUNT:
        assert sum(_counts(endings)) <= max_restarts


def _counts(endings: list[Ending]) -> Iterator[bool]:
    """Whether each ending since the newest checkpoint is a failure."""
    for e in reversed(endings):
        if e.committed_step > e.resumed_from:
            return
        yield e.outcome not in WITHOUT_COUNT


@given(endings=endings_at_random(), outcome=st.sampled_from(FAILURES))
def test_a_new_checkpoint_wipes_the_slate(endings: list[Ending], outcome: str) -> None:
    step = max(e.last_step for e in endings) + 10
    progress = ending(outcome, resumed_from=step - 10, committed_step=step, last_step=step + 1)
    assert decide([*endings, progress], max_restarts=0).action == "restart"


@given(kinds=st.lists(st.sampled_from(FAILURES), min_size=60, max_size=60), max_restarts=st.integers(0, 50))
def test_a_run_that_makes_no_checkpoint_comes_to_an_end(kinds: list[str], max_restarts: int) -> None:
    endings = [ending(kind, resumed_from=20, last_step=25 + n, plan=f"plan {n}") for n, kind in enumerate(kinds)]
    actions = [decide(endings[:n], max_restarts).action for n in range(1, len(endings) + 1)]
    assert actions.index("give_up") <= max_restarts
