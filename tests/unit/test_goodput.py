"""The goodput ledger of made-up logs: what each second counts as, and that every second counts once."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from orchestrator.goodput import Ledger, ledger

Record = dict[str, Any]


def event(name: str, time: float, **facts: Any) -> Record:
    return {"event": name, "time": time, **facts}


def line(attempt: int, step: int, time: float, step_time_s: float = 1.0, **facts: Any) -> Record:
    return {"attempt": attempt, "step": step, "time": time, "step_time_s": step_time_s, "tokens": step * 100, **facts}


def started(attempt: int, time: float, resume_step: int, loaded: float | None = None) -> list[Record]:
    """An attempt that takes half a second until its workers begin, and another half for the engine."""
    found = [event("attempt_started", time, attempt=attempt, resume_step=resume_step)]
    if loaded is not None:
        times = {"began": time + 0.5, "engine_began": time + 1.0, "loaded": loaded}
        found.append(event("worker_started", loaded, attempt=attempt, **times))
    return found


def ended(attempt: int, time: float, outcome: str, committed_step: int, failed_at: float | None = None) -> Record:
    facts = {"outcome": outcome, "committed_step": committed_step, "failed_at": failed_at}
    return event("attempt_ended", time, attempt=attempt, **facts)


BEGUN = event("stage_started", 0.0, stage="train")


def seconds(found: Ledger) -> dict[str, float]:
    assert_tiles(found)
    return {kind: pytest.approx(s) for kind, s in found.seconds.items()}


def assert_tiles(found: Ledger) -> None:
    assert all(before.end <= after.begin for before, after in pairwise(found.spans))
    assert all(span.begin < span.end for span in found.spans)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-6)


def test_undisturbed_attempt_is_told_by_its_records() -> None:
    events = [BEGUN, *started(1, 2.0, 0, loaded=4.0), event("committed", 9.0, attempt=1, step=3)]
    events += [ended(1, 9.5, "finished", 3), event("stage_finished", 10.0, stage="train")]
    first = line(1, 1, 5.2, step_time_s=1.2, data_s=0.2)
    metrics = [first, line(1, 2, 6.5, data_s=0.1), line(1, 3, 8.5, checkpoint_s=0.4, check_s=0.1, data_s=0.1)]
    assert seconds(ledger(events, metrics, now=99.0)) == {
        "productive": 1.0 + 1.2 + 1.5,
        "scheduling": 2.5 + 1.0,  # before the workers began, and after the last commit
        "load": 1.0,
        "checkpoint": 0.4 + 0.5,
        "start_up": 0.5,
        "data_wait": 0.4,
    }


def test_goodput_and_tokens_are_of_the_wall_time() -> None:
    events = [BEGUN, *started(1, 1.0, 0, loaded=2.0), event("stage_finished", 8.0, stage="train")]
    events.insert(-1, ended(1, 6.0, "finished", 4))
    found = ledger(events, [line(1, step, 2.0 + step) for step in (1, 2, 3, 4)], now=0.0)
    assert (found.goodput, found.tokens, found.tokens_per_second) == (0.5, 400, 50.0)


def failing(failed_at: float | None, *between: Record) -> tuple[list[Record], list[Record]]:
    """Steps 1 to 4 at the seconds 2 to 5, a commit of step 2, an end at 9, and steps 3 and 4 once more until 14."""
    events = [BEGUN, *started(1, 0.0, 0, loaded=1.0), event("committed", 3.2, attempt=1, step=2), *between]
    events += [ended(1, 9.0, "worker_lost", 2, failed_at), *started(2, 10.0, 2, loaded=12.0)]
    events += [event("committed", 14.0, attempt=2, step=4), ended(2, 14.0, "finished", 4)]
    lines = [line(1, step, 1.0 + step) for step in (1, 2, 3, 4)] + [line(2, 3, 13.0), line(2, 4, 14.0)]
    return [*events, event("stage_finished", 14.0, stage="train")], lines


def test_failure_costs_the_steps_done_again_the_one_under_way_and_the_time_to_be_noticed() -> None:
    found = ledger(*failing(failed_at=5.5), now=99.0)
    assert seconds(found)["lost_work"] == 2.0 + 0.5
    assert found.seconds["detection"] == 3.5
    assert found.seconds["productive"] == 4.0
    (cost,) = found.failures
    assert (cost.outcome, cost.count, cost.lost_s, cost.mean_s) == ("worker_lost", 1, 9.0, 9.0)  # from 3.0 to 12.0


@pytest.mark.parametrize(
    ("between", "detection_s"),
    [((), 9.0 - 6.0), ((event("fault_injected", 5.25, kind="kill_rank"),), 9.0 - 5.25)],
    ids=["a step after the last record", "injected fault"],
)
def test_moment_of_a_failure_that_nobody_told_is_inferred(between: tuple[Record, ...], detection_s: float) -> None:
    found = ledger(*failing(None, *between), now=99.0)
    assert seconds(found)["detection"] == detection_s


def test_fault_that_a_step_survived_is_not_what_ended_the_attempt() -> None:
    found = ledger(*failing(5.5, event("fault_injected", 3.0, kind="slow_rank")), now=99.0)
    assert found.seconds["detection"] == 3.5


def test_save_before_the_steps_that_are_lost_is_a_checkpoint() -> None:
    events, lines = failing(failed_at=5.5)
    lines[2] |= {"checkpoint_s": 0.25}  # of step 2, which stays
    lines[3] |= {"checkpoint_s": 0.25}  # of step 3, which does not
    assert seconds(ledger(events, lines, now=99.0))["checkpoint"] == 0.25


def test_damaged_checkpoint_makes_steps_lost_that_seemed_safe() -> None:
    events, lines = failing(failed_at=5.5)
    events[-4] |= {"resume_step": 1}
    events[-5] |= {"resume_step": 1}
    found = ledger(events, lines, now=99.0)
    assert seconds(found)["lost_work"] == 3.0 + 0.5
    assert found.tokens == 400


def test_time_between_attempts_is_waiting_and_preflight_where_these_are_told() -> None:
    said = [event("waiting", 9.1, missing="1 node"), event("waited", 9.4, seconds=0.3)]
    events, lines = failing(5.5)
    place = next(n for n, e in enumerate(events) if e["event"] == "attempt_ended") + 1
    events[place:place] = [*said, event("preflight", 9.9, seconds=0.4)]
    found = ledger(events, lines, now=99.0).seconds
    assert (found["waiting"], found["preflight"]) == (pytest.approx(0.3), pytest.approx(0.4))
    assert found["scheduling"] == pytest.approx(0.5 + 0.3 + 0.5)


def test_preflight_beside_a_live_attempt_costs_nothing() -> None:
    events, lines = failing(5.5)
    events.insert(4, event("preflight", 4.0, seconds=2.0))
    assert "preflight" not in ledger(events, lines, now=99.0).seconds


def test_planned_resize_loses_no_step() -> None:
    events = [BEGUN, *started(1, 0.0, 0, loaded=1.0), event("committed", 3.5, attempt=1, step=2)]
    events += [ended(1, 3.75, "yielded", 2), *started(2, 4.0, 2, loaded=6.0)]
    lines = [line(1, 1, 2.0), line(1, 2, 3.0), line(2, 3, 7.0)]
    found = ledger(events, lines, now=7.0)
    assert seconds(found) == {
        "productive": 3.0,
        "scheduling": 0.5 + 0.5 + 0.5,
        "load": 2 * 1.0 - 1.0,
        "start_up": 1.0,
        "checkpoint": 0.5,
    }
    assert not found.failures


def test_clock_rests_between_two_commands() -> None:
    events = [BEGUN, event("stage_stopped", 10.0, stage="train"), event("stage_started", 500.0, stage="train")]
    found = ledger([*events, event("stage_finished", 505.0, stage="train")], [], now=9_999.0)
    assert seconds(found) == {"scheduling": 15.0}


def test_nobody_sees_a_dead_driver_until_the_next_command() -> None:
    events = [BEGUN, *started(1, 0.0, 0, loaded=1.0), event("driver_started", 60.0)]
    events += [event("stage_started", 61.0, stage="train"), *started(2, 62.0, 0, loaded=64.0)]
    found = ledger(events, [line(1, 1, 2.0), line(2, 1, 65.0)], now=65.0)
    assert seconds(found)["detection"] == 60.0 - 3.0
    assert found.seconds["lost_work"] == 2.0
    assert [cost.outcome for cost in found.failures] == ["driver_lost"]


def test_driver_that_died_between_attempts_is_missed_from_its_last_sign_of_life() -> None:
    events = [BEGUN, event("planned", 3.0, attempt=1), event("stage_started", 60.0, stage="train")]
    assert seconds(ledger(events, [], now=61.0)) == {"detection": 57.0, "scheduling": 4.0}


def test_step_under_way_counts_for_as_long_as_a_step_takes() -> None:
    events, lines = [BEGUN, *started(1, 0.0, 0, loaded=1.0)], [line(1, 1, 2.0), line(1, 2, 3.0)]
    assert seconds(ledger(events, lines, now=3.75))["productive"] == 2.75
    late = ledger(events, lines, now=9.0)
    assert (late.seconds["productive"], late.seconds["detection"]) == (3.0, 5.0)


def test_what_was_set_aside_by_starting_over_is_not_counted() -> None:
    events, lines = failing(5.5)
    events += [event("started_over", 20.0, last_attempt=2), event("stage_started", 20.0, stage="train")]
    events += started(3, 21.0, 0, loaded=22.0)
    assert ledger(events, [*lines, line(3, 1, 23.0)], now=23.0).wall_s == 3.0


def test_log_of_an_older_version_gives_what_it_can() -> None:
    """The start is start-up, and later attempts say what is lost."""
    events = [BEGUN, event("attempt_started", 1.0, attempt=1), event("attempt_ended", 9.0, attempt=1, outcome="error")]
    events += [event("attempt_started", 10.0, attempt=2), event("stage_finished", 15.0, stage="train")]
    lines = [line(1, 1, 5.0), line(1, 2, 6.0), line(2, 2, 14.0)]
    assert seconds(ledger(events, lines, now=99.0)) == {
        "start_up": 3.0 + 3.0,
        "lost_work": 2.0 + 1.0,
        "detection": 2.0,
        "scheduling": 2.0,
        "productive": 2.0,
    }


@pytest.mark.parametrize("seed", range(200))
def test_every_second_counts_once(seed: int) -> None:
    events, lines, wall_s, now = random_run(random.Random(seed))
    found = ledger(events, lines, now)
    assert_tiles(found)
    assert found.wall_s == pytest.approx(wall_s)
    assert all(cost.lost_s >= 0 for cost in found.failures)


def random_run(dice: random.Random) -> tuple[list[Record], list[Record], float, float]:
    """Events, metric lines, the wall time and the time of looking: of a few commands with some attempts each, with
    fields and events left out here and there, and clocks of workers that are off by up to half a second."""
    at, step, attempt, wall_s = 1000.0, 0, 0, 0.0
    events: list[Record] = []
    lines: list[Record] = []

    def later(most_s: float) -> float:
        nonlocal at
        at += dice.random() * most_s
        return at

    def say(name: str, skew_s: float = 0.0, **facts: Any) -> None:
        kept = {key: value for key, value in facts.items() if key in ("attempt", "stage") or dice.random() > 0.1}
        events.append(event(name, at + skew_s, **kept))

    commands = dice.randint(1, 4)
    for command in range(commands):
        begun = at
        say("stage_started", stage="train")
        for _ in range(dice.randint(0, 4)):
            if dice.random() < 0.3:
                say("waiting", missing="a node")
                begin = at
                say("waited", seconds=later(20.0) - begin)
            if dice.random() < 0.3:
                begin = at
                say("preflight", seconds=later(5.0) - begin)
            attempt, skew_s = attempt + 1, dice.uniform(-0.5, 0.5)
            later(3.0)
            say("attempt_started", attempt=attempt, resume_step=step)
            if dice.random() < 0.8:
                times = {key: later(2.0) + skew_s for key in ("began", "engine_began", "loaded")}
                say("worker_started", skew_s, attempt=attempt, **times)
            done = step
            for _ in range(dice.randint(0, 12)):
                done += 1
                parts = {
                    key: dice.random() * 0.2 for key in ("data_s", "checkpoint_s", "check_s") if dice.random() > 0.5
                }
                took_s = dice.random()
                at += took_s + sum(parts.values())
                lines.append(line(attempt, done, at + skew_s, took_s, **parts))
                if dice.random() < 0.2:
                    step = done
                    say("committed", skew_s, attempt=attempt, step=step)
            if dice.random() < 0.2:
                say("fault_injected", skew_s, kind="kill_rank")
            if dice.random() < 0.9:
                failed_at = later(1.0)
                later(3.0)
                outcome = dice.choice(["worker_lost", "hang", "yielded", "stopped", "finished"])
                say("attempt_ended", attempt=attempt, outcome=outcome, committed_step=step, failed_at=failed_at)
        later(2.0)
        if command == commands - 1 and dice.random() < 0.5:
            return events, lines, wall_s + at - begun, at  # it still goes on
        if dice.random() < 0.7 or command == commands - 1:
            say(dice.choice(["stage_finished", "stage_failed", "stage_stopped"]), stage="train")
            wall_s += at - begun
            later(100.0)
        else:
            later(100.0)
            if dice.random() < 0.5:
                say("driver_started")
                later(1.0)
            wall_s += at - begun
    return events, lines, wall_s, at
