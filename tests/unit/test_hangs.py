"""When an attempt counts as hanging, and on whom it is blamed."""

from __future__ import annotations

import pytest

from orchestrator.hangs import Hang, blame, durations, hang, hang_after_s, named
from orchestrator.train.beats import PHASES, Phase, Sign

FLOWING = {"data": [0.1, 0.2], "step": [1.0, 2.0], "evaluation": [30.0], "check": [1.0], "checkpoint": [2.0]}


def sign(phase: Phase, step: int, age_s: float = 100.0) -> Sign:
    return Sign(phase=phase, step=step, age_s=age_s, time=0.0)


@pytest.mark.parametrize(
    ("setting", "recent", "phase", "seconds"),
    [
        (None, {}, "starting", 1800),
        (None, {}, "loading", 1800),
        (None, {}, "step", 1800),
        (5.0, {}, "step", 1800),
        (7200.0, {}, "step", 7200),
        (None, FLOWING, "step", 60),
        (None, FLOWING, "data", 300),
        (None, FLOWING, "evaluation", 300),
        (None, FLOWING, "check", 60),
        (None, FLOWING, "checkpoint", 300),
        (None, FLOWING, "ending", 1800),
        (None, {**FLOWING, "step": [1.0, 20.0, 2.0]}, "step", 200),
        (None, {**FLOWING, "evaluation": []}, "evaluation", 1800),
        (5.0, FLOWING, "step", 5),
        (5.0, FLOWING, "data", 5),
        (5.0, FLOWING, "check", 60),
        (500.0, FLOWING, "check", 500),
        (5.0, FLOWING, "parked", 300),
    ],
)
def test_a_phase_may_take_as_long_as(
    setting: float | None, recent: dict[Phase, list[float]], phase: Phase, seconds: float
) -> None:
    assert hang_after_s(setting, recent, phase) == seconds


def test_durations_are_those_of_the_recent_metric_lines() -> None:
    lines = [{"step": n, "data_s": 0.1, "compute_s": float(n), "checkpoint_s": 3.0 * (n == 90)} for n in range(1, 101)]
    found = durations(lines)
    assert (min(found["step"]), len(found["step"])) == (51.0, 50)
    assert found["checkpoint"] == [3.0], "a step without a save says nothing about saves"
    assert found["evaluation"] == found["check"] == []


def test_the_rank_that_is_behind_is_the_one_that_the_others_wait_for() -> None:
    signs = {rank: sign("step", 17, 94.0) for rank in (0, 1, 2)} | {3: sign("data", 17, 95.0)}
    found = hang(signs, FLOWING, 90.0)
    assert found == Hang(
        step=17,
        seconds=94.0,
        ranks=(3,),
        message="rank 3 in data of step 17 for 95 s; waiting for that: ranks 0-2 in step of step 17 for 94 s",
    )
    assert hang(signs, FLOWING, 94.5) is None, "somebody moved less long ago"
    assert hang(signs, FLOWING, None) is None, "it may still be reading"


def test_what_the_ranks_behind_do_says_how_long_it_may_take() -> None:
    signs = {0: sign("checkpoint", 16, 250.0), 1: sign("step", 17, 250.0)}
    assert hang(signs, FLOWING, 10.0) is None
    slower = {0: sign("checkpoint", 16, 301.0), 1: sign("step", 17, 301.0)}
    assert (found := hang(slower, FLOWING, 10.0)) and (found.ranks, found.step) == ((0,), 16)


def test_ranks_in_one_phase_are_told_apart_by_the_state_of_their_processes() -> None:
    signs = {rank: sign("step", 17) for rank in range(4)}
    assert blame(signs).ranks == ()
    assert blame(signs).message == "all are in the same phase: ranks 0-3 in step of step 17 for 100 s"
    stopped = blame(signs, stopped=[2])
    assert stopped.ranks == (2,)
    assert stopped.message == (
        "stopped: rank 2 in step of step 17 for 100 s; waiting for that: ranks 0-1, 3 in step of step 17 for 100 s"
    )


def test_a_rank_that_gave_no_sign_may_take_as_long_as_a_start() -> None:
    signs = {0: sign("loading", 0, 1700.0), 1: None}
    assert hang(signs, {}, 5.0) is None
    found = hang({0: sign("loading", 0, 1800.0), 1: None}, {}, 5.0)
    assert (
        found and found.ranks == (1,) and found.message.startswith("rank 1 gave no sign; waiting for that: rank 0 in")
    )
    assert hang({0: None, 1: None}, {}, 5.0) is None


def test_hours_of_standing_by_are_no_hang_and_a_job_that_is_not_taken_up_is_one() -> None:
    signs = {0: sign("loading", 0, 0.5), 1: sign("parked", 0, 1e6)}
    assert hang(signs, {}, None, since_s=10.0) is None
    stuck = {0: sign("loading", 0, 400.0), 1: sign("parked", 0, 1e6)}
    found = hang(stuck, {}, None, since_s=400.0)
    assert found is not None
    assert (found.ranks, found.seconds) == ((1,), 400.0)


def test_phases_are_in_the_order_of_a_step() -> None:
    step: tuple[Phase, ...] = ("data", "step", "evaluation", "check", "checkpoint")
    assert PHASES[PHASES.index("data") :] == (*step, "ending")


@pytest.mark.parametrize(
    ("ranks", "words"), [([4], "rank 4"), ([2, 0, 1, 5], "ranks 0-2, 5"), ([1, 2], "ranks 1-2"), ([7, 3], "ranks 3, 7")]
)
def test_ranks_are_named_shortly(ranks: list[int], words: str) -> None:
    assert named(ranks) == words
