"""What training goes on without, against an implementation that goes token by token."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.exclusions import Exclusions, LostShard, Run

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
