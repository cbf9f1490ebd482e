"""Spikes of the loss: on curves made by hand, and on noise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from orchestrator.train.spikes import IN_A_ROW, Detector, Spike, rollback, suspects

WINDOW, THRESHOLD = 32, 6.0


def noise(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a healthy run: the loss falls, the norms have a heavy tail."""
    random = np.random.default_rng(seed)
    losses = 2 + 3 * np.exp(-np.arange(steps) / 200) + 0.02 * random.standard_normal(steps)
    norms = 0.5 * np.exp(0.15 * random.standard_normal(steps))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def judged(detector: Detector, curve: list[tuple[float, float]]) -> list[int]:
    """Places of the spikes."""
    return [place for place, pair in enumerate(curve) if detector.judge(*pair)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_spikes(seed: int) -> None:
    assert judged(Detector(THRESHOLD, WINDOW), noise(2000, seed)) == []


def test_a_jump_of_the_loss_is_one_and_so_is_a_jump_of_the_norm() -> None:
    curve = noise(1000)
    curve[20] = (curve[20][0] + 0.4, curve[20][1])  # where the loss falls fast, too
    curve[800] = (curve[800][0] + 0.3, curve[800][1])
    curve[900] = (curve[900][0], 4.0)
    assert judged(Detector(THRESHOLD, WINDOW), curve) == [20, 800, 900]


def test_a_fall_is_none() -> None:
    curve = noise(200)
    assert judged(Detector(THRESHOLD, WINDOW), [*curve, (0.1, 0.01)]) == []


def test_a_smooth_curve_does_not_trip_over_a_step() -> None:
    smooth = [(2.0, 0.5)] * 100
    assert judged(Detector(THRESHOLD, WINDOW), [*smooth, (2.05, 0.9)]) == []
    assert judged(Detector(THRESHOLD, WINDOW), [*smooth, (2.07, 0.5)]) == [100]
    assert judged(Detector(THRESHOLD, WINDOW), [*smooth, (2.0, 1.3)]) == [100]


def test_without_half_a_window_of_history_nothing_is_judged() -> None:
    for before in (WINDOW // 2 - 1, WINDOW // 2):
        found = judged(Detector(THRESHOLD, WINDOW), [*[(2.0, 0.5)] * before, (9.0, 9.0)])
        assert found == ([before] if before == WINDOW // 2 else [])


def test_a_spike_says_how_far_it_lies() -> None:
    detector = Detector(THRESHOLD, WINDOW)
    judged(detector, [(2.0, 0.5)] * WINDOW)
    spike = detector.judge(2.2, 0.5)
    assert spike == Spike(loss=2.2, grad_norm=0.5, loss_z=pytest.approx(20), norm_z=0.0)


def test_spikes_do_not_raise_what_the_next_steps_are_compared_with() -> None:
    """Every third step is one: were they remembered, they would be normal soon."""
    curve = noise(600)
    places = list(range(100, 600, 3))
    for place in places:
        curve[place] = (curve[place][0] + 1, curve[place][1])
    assert judged(Detector(THRESHOLD, WINDOW), curve) == places


def test_a_new_level_is_not_a_spike_for_ever() -> None:
    curve = [*noise(100), *((loss + 2, norm) for loss, norm in noise(200))]
    found = judged(Detector(THRESHOLD, WINDOW), curve)
    assert found == list(range(100, 100 + IN_A_ROW))


def test_what_is_not_finite_is_left_alone() -> None:
    detector = Detector(THRESHOLD, WINDOW)
    judged(detector, noise(WINDOW))
    before = detector.state()
    for pair in ((math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)):
        assert detector.judge(*pair) is None
    assert detector.state() == before


@pytest.mark.parametrize("cut", [0, 5, 40, 101, 103, 150])
def test_a_detector_goes_on_from_its_state_as_if_nothing_had_been(cut: int) -> None:
    """In the middle of some spikes in a row, too."""
    curve = [*noise(100), *((loss + 2, norm) for loss, norm in noise(100, 1)), *noise(100, 2)]
    whole, first = Detector(THRESHOLD, WINDOW), Detector(THRESHOLD, WINDOW)
    judged(first, curve[:cut])
    second = Detector(THRESHOLD, WINDOW, json.loads(json.dumps(first.state())))
    assert [cut + place for place in judged(second, curve[cut:])] == [p for p in judged(whole, curve) if p >= cut]
    assert second.state() == whole.state()


def test_after_forgetting_the_history_begins_anew() -> None:
    detector = Detector(THRESHOLD, WINDOW)
    judged(detector, noise(WINDOW))
    detector.forget()
    assert judged(detector, [(9.0, 9.0)] * WINDOW) == []


# --- suspects ---------------------------------------------------------------------------------------------------------


def test_suspects_are_the_samples_that_stand_out_the_worst_first() -> None:
    losses = np.random.default_rng(0).normal(2, 0.3, 300).astype(np.float32)
    losses[[7, 90, 200]] = 9, np.nan, 6
    steps, samples = np.repeat([10, 11, 12], 100), np.arange(1000, 1300)
    found = suspects(steps, samples, losses, THRESHOLD, most=8)
    assert [(suspect.sample, suspect.step) for suspect in found] == [(1090, 10), (1007, 10), (1200, 12)]
    assert [suspect.sample for suspect in suspects(steps, samples, losses, THRESHOLD, most=1)] == [1090]


def test_a_state_that_has_gone_wrong_has_no_suspects() -> None:
    """All losses are high alike: then it is none of the samples."""
    losses = np.concatenate([np.random.default_rng(0).normal(level, 0.3, 50) for level in (2, 2, 9)])
    assert suspects(np.repeat([1, 2, 3], 50), np.arange(150), losses, THRESHOLD, most=8) == []


def test_a_sample_that_several_ranks_tell_of_is_one_suspect() -> None:
    losses = np.array([2.0, 2.1, 9.0, 9.0, 1.9, 2.0])
    found = suspects(np.ones(6), np.array([1, 2, 3, 3, 4, 5]), losses, THRESHOLD, most=8)
    assert [suspect.sample for suspect in found] == [3]


# --- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("committed", "back_to", "first"),
    [
        ([40, 60], 60, 65),
        ([40, 64], 64, 65),
        ([40, 65], 40, 65),  # one within the steps to pass over does not count
        ([40, 70, 80], 40, 65),
        ([66, 70], 66, 67),  # none lies before them
        ([], 0, 65),
    ],
)
def test_going_back_is_to_the_last_checkpoint_before_what_is_passed_over(
    committed: list[int], back_to: int, first: int
) -> None:
    found = rollback(attempt=1, step=75, jump=10, committed=committed, steps=1000)
    assert (found.back_to, found.first, found.last) == (back_to, first, 85)


def test_what_is_passed_over_lies_within_the_run() -> None:
    assert rollback(attempt=1, step=98, jump=5, committed=[90], steps=100).last == 100
    assert rollback(attempt=1, step=3, jump=5, committed=[], steps=100).first == 1
