"""Who is slow for good is named, and who is delayed now and then is not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir
from orchestrator.train.stragglers import WINDOW, WINDOWS, Detector, Straggler, Stragglers, peers, slowness

RATIO = 1.5


def plan(replicas: int, stages: int = 1, tensor: int = 1) -> Plan:
    return Plan(
        accelerator="cpu",
        node_ids=(),
        workers_by_node=(),
        data_parallel=replicas,
        pipeline_stages=stages,
        tensor_parallel=tensor,
        micro_batch_size=1,
        accumulation=1,
        dtype="fp32",
        parameters=0,
        memory_bytes=0,
        step_time_s=0.0,
    )


def busy(random: np.random.Generator, cases: int, ranks: int) -> np.ndarray:
    """Seconds on a machine that others use too: three steps in ten are delayed, some of them a hundredfold."""
    shape = (cases, WINDOWS * WINDOW, ranks)
    delays = np.where(random.random(shape) < 0.3, random.pareto(1.2, shape), 0)
    return np.asarray((1 + 0.1 * random.standard_exponential(shape)) * (1 + delays))


def judged(detector: Detector, steps: np.ndarray) -> list[tuple[int, Straggler]]:
    """(step, who) of those that are found."""
    return [(step, found) for step, times in enumerate(steps, 1) for found in detector.judge(tuple(times)) or []]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_busy_machine_raises_no_alarm_in_a_hundred_thousand_windows(ranks: int) -> None:
    random = np.random.default_rng(ranks)
    for _ in range(5):
        assert not (slowness(busy(random, 10_000, ranks)) > RATIO).any()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_of_half_the_speed_is_found_within_two_windows(ranks: int) -> None:
    seconds = busy(np.random.default_rng(ranks), 2000, ranks)
    seconds[..., -1] *= 2
    found = slowness(seconds) > RATIO
    assert found[:, -1].mean() > 0.98
    assert not found[:, :-1].any()


def test_a_straggler_is_found_in_every_window_until_it_has_recovered() -> None:
    random = np.random.default_rng(0)
    slow, even = 4 * WINDOW, 4 * WINDOW
    seconds = 1 + 0.02 * random.standard_exponential((2 * slow + even, 3))
    seconds[:slow, 1] *= 2
    seconds[slow + even :, 1] *= 3
    found = judged(Detector(plan(3), RATIO), seconds)
    windows = [2, 3, 4, 10, 11, 12]
    assert [(step, straggler.rank) for step, straggler in found] == [(window * WINDOW, 1) for window in windows]
    assert found[0][1].ratio == pytest.approx(2, rel=0.05) and found[3][1].ratio == pytest.approx(3, rel=0.05)


def test_a_slow_spell_of_one_window_is_no_straggler() -> None:
    seconds = np.ones((8 * WINDOW, 2))
    seconds[WINDOW : 2 * WINDOW, 0] = 5
    assert judged(Detector(plan(2), RATIO), seconds) == []


def test_ranks_are_compared_with_those_that_hold_the_same_layers() -> None:
    assert peers(plan(3, stages=2)) == [[0, 1, 2], [3, 4, 5]]
    assert peers(plan(2, tensor=2)) == [[0, 2]], "one of each tensor-parallel group speaks for it"
    assert peers(plan(1, stages=4)) == []
    uneven = np.tile([1.0, 1.0, 6.0, 6.0], (3 * WINDOW, 1))
    assert judged(Detector(plan(2, stages=2), RATIO), uneven) == [], "a later stage may have more to do"
    uneven[:, 3] = 12
    assert [found.rank for _, found in judged(Detector(plan(2, stages=2), RATIO), uneven)] == [3, 3]


def test_steps_that_were_not_measured_do_not_count() -> None:
    seconds = np.tile([1.0, 2.0], (4 * WINDOW, 1))
    seconds[::2, 0] = math.nan
    ((step, found),) = judged(Detector(plan(2), RATIO), seconds)
    assert (step, found.rank) == (4 * WINDOW, 1)
    assert judged(Detector(plan(1), RATIO), seconds[:, :1]) == []


@pytest.mark.parametrize(("threshold", "rank", "told"), [(RATIO, 0, 1), (None, 0, 0), (RATIO, 1, 0)])
def test_rank_0_tells_where_a_straggler_stands(tmp_path: Path, threshold: float | None, rank: int, told: int) -> None:
    run = RunDir(str(tmp_path))
    nodes = [SimpleNamespace(host=f"host-{n}", id=f"id-{n}") for n in range(2)]
    heard: list[dict[int, float]] = []
    stragglers = Stragglers(run, 4, plan(2), threshold, nodes, rank, heard.append)
    for step in range(1, 8 * WINDOW + 1):
        result: Any = SimpleNamespace(forward_s=(1.0, 2.0 if step <= 4 * WINDOW else 1.0))
        stragglers.follow(step, result)
    assert heard == [{1: 2.0}, {1: 2.0}, {1: 2.0}, {}] * told, "in every window, and when it has ended"
    events = [{key: event[key] for key in event if key not in ("time", "by")} for event in run.events()]
    expected = {"event": "straggler", "attempt": 4, "rank": 1, "node_id": "id-1", "host": "host-1", "ratio": 2.0}
    assert events == [expected] * told
