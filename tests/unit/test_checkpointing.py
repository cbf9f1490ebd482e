"""The interval between two saves: the formula, its bounds, the failure rate, and the clock that goes by them."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.errors import StorageError
from orchestrator.planning import checkpointing
from orchestrator.planning.checkpointing import best_interval_s, efficiency, interval_s, mtbf_s
from orchestrator.train.save_clock import History, SaveClock, read_history
from orchestrator.train_config import TrainConfig
from tests.made_runs import recipe

HOUR = 3600.0


# --- the interval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost_s", [0.1, 5.0, 120.0])
@pytest.mark.parametrize("mtbf", [600.0, HOUR, 24 * HOUR])
def test_no_other_interval_is_more_efficient(cost_s: float, mtbf: float) -> None:
    def share(interval: float) -> float:
        return efficiency(interval, cost_s, 10.0, mtbf)

    best = best_interval_s(cost_s, mtbf)
    top = max(share(best * factor / 100) for factor in range(20, 500))
    assert share(best) == pytest.approx(top, rel=1e-4)


def test_a_save_dearer_than_two_failures_apart_is_made_once_a_failure() -> None:
    assert best_interval_s(20.0, 10.0) == 10.0
    assert best_interval_s(20.0, 10.0) == pytest.approx(best_interval_s(19.999, 10.0), rel=0.15)


def test_time_that_stays_is_told_for_plain_cases() -> None:
    assert efficiency(600.0, 0.0, 0.0, 1e9) == pytest.approx(1.0)
    assert efficiency(95.0, 5.0, 0.0, 1e9) == pytest.approx(0.95)
    assert efficiency(60.0, 5.0, 60.0, HOUR) < efficiency(60.0, 5.0, 10.0, HOUR)


def test_interval_stays_within_its_bounds() -> None:
    assert interval_s(None, HOUR) == checkpointing.FIRST_S
    assert interval_s(1.0, 30.0) == 19.0, "5 % of the time goes into saves"
    assert interval_s(0.01, 30.0) == checkpointing.SHORTEST_S
    assert interval_s(1.0, 1e9) == checkpointing.LONGEST_S
    assert interval_s(1000.0, 60.0) == checkpointing.LONGEST_S
    assert interval_s(1.0, 2 * HOUR) == best_interval_s(1.0, 2 * HOUR) == pytest.approx(119.3, abs=0.1)


def test_a_run_that_has_not_failed_is_trusted_as_far_as_it_has_come() -> None:
    assert mtbf_s(0, 0.0) == 0.0
    assert mtbf_s(0, 600.0) == 1200.0
    assert interval_s(1.0, mtbf_s(0, 0.0)) == 19.0
    assert interval_s(1.0, mtbf_s(0, 1e6)) == checkpointing.LONGEST_S


def test_failures_shorten_the_time_to_the_next_and_fade_with_time() -> None:
    assert [mtbf_s(failures, HOUR) for failures in (1, 2, 8)] == [HOUR / 1.5, HOUR / 2.5, HOUR / 8.5]
    after = [mtbf_s(3, hours * HOUR) for hours in (1, 10, 1000)]
    assert after == sorted(after)


def test_early_saves_of_a_run_that_never_fails_cost_little() -> None:
    at, cost_s, saves = 0.0, 1.0, 0
    while at < 24 * HOUR:
        at, saves = at + interval_s(cost_s, mtbf_s(0, at)) + cost_s, saves + 1
    assert saves * cost_s / at < 0.004


# --- the clock --------------------------------------------------------------------------------------------------------


class Training:
    """A clock whose time passes by hand, and a save that is in flight when told."""

    def __init__(self, history: History | Exception | None) -> None:
        self.at, self.writing = 0.0, False
        future: Future[History] = Future()
        if isinstance(history, History):
            future.set_result(history)
        elif history:
            future.set_exception(history)
        self.clock = SaveClock(future, in_flight=lambda: self.writing, now=lambda: self.at)

    def step(self, seconds: float = 1.0) -> None:
        self.at += seconds
        self.clock.stepped(seconds)

    def steps_until_due(self) -> int:
        for number in range(10_000):
            if self.clock.due():
                return number
            self.step()
        raise AssertionError("never due")


def test_first_save_of_a_run_comes_after_a_minute() -> None:
    assert Training(History()).steps_until_due() == checkpointing.FIRST_S


def test_clock_goes_by_the_history_of_the_run() -> None:
    """It says when a step ends nearest to the best time, which moves on while the run does not fail."""
    calm, rough = (Training(History(failures=n, observed_s=10 * HOUR, cost_s=1.0)) for n in (1, 20))
    assert calm.steps_until_due() == pytest.approx(best_interval_s(1.0, 10 * HOUR / 1.5), rel=0.02)
    assert rough.steps_until_due() == pytest.approx(best_interval_s(1.0, 10 * HOUR / 20.5), rel=0.02)


def test_clock_goes_by_what_its_saves_cost_slower_steps_included() -> None:
    training = Training(History(failures=4, observed_s=HOUR, cost_s=30.0))
    training.steps_until_due()
    training.clock.saved(0.25)
    training.writing = True
    training.step(1.5)
    training.step(1.25)
    training.writing = False
    training.step(1.25)  # the save ended in this one
    training.step()
    expected = best_interval_s(0.25 + 0.5 + 0.25 + 0.25, (HOUR + training.at) / 4.5)
    assert training.clock.interval_s == pytest.approx(expected)


def test_no_save_is_due_while_one_is_written() -> None:
    training = Training(History())
    training.steps_until_due()
    training.writing = True
    assert not training.clock.due()


@pytest.mark.parametrize("history", [None, StorageError("gone")], ids=["still being read", "unreadable"])
def test_clock_does_without_a_history(history: Exception | None) -> None:
    assert Training(history).steps_until_due() == checkpointing.FIRST_S


def test_history_is_read_from_the_events(tmp_path: Path) -> None:
    from orchestrator.runs import open_run

    run = open_run(recipe(str(tmp_path)))
    assert read_history(run) == History()
    run.log_event("stage_started", stage="train")
    run.log_event("attempt_started", attempt=1, resume_step=0)
    run.log_event("committed", attempt=1, step=2, waited_s=0.25, copied_s=0.5, saved_s=3.0)
    run.log_event("attempt_ended", attempt=1, outcome="worker_lost", committed_step=2)
    run.log_event("stage_failed", stage="train")
    seen = read_history(run)
    assert (seen.failures, seen.cost_s) == (1, 0.75)
    assert 0 < seen.observed_s < 60


# --- the recipe -------------------------------------------------------------------------------------------------------


def saved(**values: object) -> list[int]:
    config = TrainConfig.model_validate({"steps": 10, "lr": 1, **values})
    return [step for step in range(1, 11) if config.saves_at(step)]


def test_steps_that_are_kept_for_themselves_are_saved_whatever_the_time() -> None:
    assert saved(checkpoint_every=4) == [4, 8, 10]
    assert saved(checkpoint_every="auto") == [10]
    assert saved(checkpoint_every="auto", keep_every=5) == [5, 10]
    assert saved(checkpoint_every="auto", evaluate_every=3) == [10]
    assert saved(checkpoint_every="auto", evaluate_every=3, keep_best=True) == [3, 6, 9, 10]


@pytest.mark.parametrize("value", [0, "automatic", 2.5, None])
def test_other_intervals_are_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="checkpoint_every"):
        saved(checkpoint_every=value)
