"""The data schedule: what crosses process borders, what is passed over, and the past that no recipe may change."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.data.schedule import Schedule, changes
from tests.unit.test_exclusions import LENGTH, SAMPLES, exclusions

weights = st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.5]), min_size=2, max_size=2).filter(any).map(tuple)
orders = st.builds(
    lambda stages, last, ramp, size, seed, block: Order(
        pools=(Pool(0, 10), Pool(10, SAMPLES - 10)),
        stages=(*stages, Stage(last)),
        batches=(*ramp, Batches(size)),
        seed=seed,
        block=block,
    ),
    st.lists(st.builds(Stage, weights, st.integers(1, 60)), max_size=2),
    weights,
    st.lists(st.builds(Batches, st.integers(1, 9), st.integers(1, 5)), max_size=3),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10),
)
skips = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), max_size=3).map(
    lambda found: tuple((first, first + more) for first, more in found)
)
schedules = st.builds(
    lambda order, skip_steps, without: Schedule(
        order=order, sequence_length=LENGTH, corpus_hash="c", skip_steps=skip_steps, exclusions=without
    ),
    orders,
    skips,
    exclusions,
)


@given(schedules, st.integers(1, 40))
def test_a_schedule_comes_back_from_json_as_it_was(schedule: Schedule, step: int) -> None:
    """It crosses to the workers, and to `data.json`, from which later commands read what a step saw."""
    again = Schedule.from_json(json.loads(json.dumps(schedule.as_json())))
    assert again == schedule
    assert np.array_equal(again.order.step(step), schedule.order.step(step))
    assert (again.targets(step), again.past(step)) == (schedule.targets(step), schedule.past(step))
    assert json.loads(json.dumps(schedule.past(step))) == schedule.past(step), "it is compared with one from a file"


@given(schedules, st.integers(1, 20), st.integers(0, 20))
def test_stretches_hold_every_step_once_but_those_passed_over(schedule: Schedule, first: int, more: int) -> None:
    found = list(schedule.stretches(first, first + more))
    steps = [step for stretch in found for step in stretch]
    assert steps == [step for step in range(first, first + more + 1) if not schedule.skips(step)]
    for stretch in found:
        assert len({schedule.order.batch_size(step) for step in stretch}) == 1


@given(schedules, st.integers(1, 30))
def test_a_step_that_is_passed_over_has_no_targets_and_moves_no_other(schedule: Schedule, step: int) -> None:
    plain = Schedule(order=schedule.order, sequence_length=LENGTH, corpus_hash="c", exclusions=schedule.exclusions)
    assert schedule.targets(step) == (0 if schedule.skips(step) else plain.targets(step))
    passed = {s for first, last in schedule.past(step)["skipped"] for s in range(first, last + 1)}
    assert passed == {s for s in range(1, step + 1) if schedule.skips(s)}


@pytest.mark.parametrize("step", [1, 5])
def test_the_past_tells_the_same_whatever_comes_after(step: int) -> None:
    """A ramp that ends, a stage that is cut in two, a skip that lies ahead: none of them touches what was consumed."""
    pools, mixture = (Pool(0, 10), Pool(10, 14)), (0.5, 0.5)

    def past(stages: tuple[Stage, ...], batches: tuple[Batches, ...], skip: tuple[tuple[int, int], ...] = ()) -> object:
        order = Order(pools=pools, stages=stages, batches=batches, seed=1, block=4)
        return Schedule(order=order, sequence_length=LENGTH, corpus_hash="c", skip_steps=skip).past(step)

    base = past((Stage(mixture),), (Batches(4),))
    assert past((Stage(mixture, 20), Stage((1.0, 0.0))), (Batches(4),)) == base
    assert past((Stage((2.0, 2.0)),), (Batches(4, 5), Batches(8))) == base, "weights are scaled"
    assert past((Stage(mixture),), (Batches(4, 2), Batches(4, 3), Batches(9)), ((6, 8),)) == base
    assert past((Stage(mixture, 3), Stage((1.0, 0.0))), (Batches(4),)) != base
    assert past((Stage(mixture),), (Batches(5),)) != base
    assert past((Stage(mixture),), (Batches(4),), ((1, 1),)) != base


@given(schedules, st.integers(1, 30), weights, st.integers(1, 12))
def test_a_past_is_enough_to_do_the_same_again(
    schedule: Schedule, step: int, tail: tuple[float, ...], size: int
) -> None:
    """What a refusal's hint gives: batches and mixture of the past, and then anything else."""
    past, order = schedule.past(step), schedule.order
    again = replace(
        order,
        batches=(*(Batches(sequences, steps) for steps, sequences in past["batches"]), Batches(size)),
        stages=(*(Stage(tuple(n / 1e4 for n in shares), drawn) for drawn, shares in past["mixture"]), Stage(tail)),
    )
    skipped = tuple((first, last) for first, last in past["skipped"])
    other = Schedule(order=again, sequence_length=LENGTH, corpus_hash="c", skip_steps=skipped)
    assert changes(past, other.past(step)) == []
    assert other.past(step) == past
    for done in range(1, step + 1):
        assert np.array_equal(again.step(done), order.step(done))
        assert other.skips(done) == schedule.skips(done)


@given(schedules, schedules, st.integers(1, 12))
def test_schedules_of_one_past_consumed_the_same(one: Schedule, other: Schedule, step: int) -> None:
    if not changes(one.past(step), other.past(step)):
        assert [one.order.step(s).tolist() for s in range(1, step + 1)] == [
            other.order.step(s).tolist() for s in range(1, step + 1)
        ]
