"""What training goes on without, against an implementation that goes token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.data.schedule import Schedule

LENGTH = 8
SAMPLES = 24

lost_shards = st.lists(
    st.builds(
        lambda first, samples: LostShard(name=f"s{first}", first=first, samples=samples, reason="is missing"),
        st.integers(0, SAMPLES - 1),
        st.integers(1, 9),
    ),
    max_size=3,
).map(tuple)
runs = st.builds(
    lambda sample, a, b: Run(sample, min(a, b), max(a, b)),
    st.integers(0, SAMPLES - 1),
    st.integers(0, LENGTH - 1),
    st.integers(0, LENGTH - 1),
)
quarantines = st.dictionaries(st.sampled_from("abcd"), st.lists(runs, min_size=1, max_size=4).map(tuple), max_size=4)
exclusions = st.builds(
    lambda lost, quarantined, filler: Exclusions(lost=lost, quarantined=quarantined, filler=filler),
    lost_shards,
    quarantines,
    st.integers(0, 9),
)
ids = st.lists(st.integers(0, SAMPLES - 1), max_size=20).map(lambda values: np.array(values, np.int64))


def naive(without: Exclusions, sample: int, token: int) -> bool:
    """Whether a token is left."""
    lost = any(shard.first <= sample < shard.first + shard.samples for shard in without.lost)
    inside = (
        run.sample == sample and run.first <= token <= run.last for r in without.quarantined.values() for run in r
    )
    return not lost and not any(inside)


@given(exclusions, ids)
def test_what_is_left_is_what_no_exclusion_covers(without: Exclusions, samples: np.ndarray) -> None:
    expected = np.array([[naive(without, s, t) for t in range(LENGTH)] for s in samples.tolist()], bool)
    expected = expected.reshape(len(samples), LENGTH)
    found = without.counted(samples, LENGTH)
    assert (found is None) == bool(expected.all()), "None tells the engine that it may take the short way"
    if found is not None:
        assert np.array_equal(found, expected)
    assert without.targets(samples, LENGTH) == int(expected[:, 1:].sum()), "the first token of a sample is no target"
    assert not len(samples) or np.array_equal(
        without.lost_samples(samples), [any(s.first <= i < s.first + s.samples for s in without.lost) for i in samples]
    )


@given(exclusions, ids, st.permutations(range(20)), st.integers(0, 20))
def test_the_targets_of_a_batch_are_those_of_its_parts(
    without: Exclusions, samples: np.ndarray, places: list[int], cut: int
) -> None:
    """Every rank divides by the targets of the global batch: they must not depend on who takes what."""
    mixed = samples[[place for place in places if place < len(samples)]]
    parts = without.targets(mixed[:cut], LENGTH) + without.targets(mixed[cut:], LENGTH)
    assert parts == without.targets(samples, LENGTH)


@given(exclusions)
def test_exclusions_cross_process_borders_as_json(without: Exclusions) -> None:
    assert Exclusions.from_json(json.loads(json.dumps(without.as_json()))) == without


def test_without_exclusions_there_is_nothing_to_ask() -> None:
    assert not Exclusions()
    assert not Exclusions(filler=2)
    assert Exclusions().counted(np.arange(3), LENGTH) is None
    assert Exclusions().targets(np.arange(3), LENGTH) == 3 * (LENGTH - 1)


# --- in a schedule ----------------------------------------------------------------------------------------------------

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
