"""The order: permutations, epochs, mixtures, batch sizes, shares; all of it as a pure function of the step."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import Batches, Order, Pool, Stage, _place_of, permute, shuffled, slice_of, uniform

SEEDS = st.integers(0, 2**32 - 1)


def concatenated(order: Order, first: int, last: int) -> np.ndarray:
    return order.of_rank(range(first, last + 1), 0, (1,))


# --- permutation and shuffle ------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 100))
def test_a_permutation_has_an_inverse(size: int, seed: int, epoch: int) -> None:
    found = permute(np.arange(size), size, (seed, epoch))
    assert np.array_equal(np.sort(found), np.arange(size))
    value = seed % size
    assert found[_place_of(value, size, (seed, epoch))] == value


@given(size=st.integers(1, 3000), block=st.integers(1, 400), window=st.integers(1, 9), seed=SEEDS)
def test_an_epoch_holds_every_sample_once(size: int, block: int, window: int, seed: int) -> None:
    found = shuffled(np.arange(size), size, block, window, (seed, 0, 0))
    assert np.array_equal(np.sort(found), np.arange(size))


@given(size=st.integers(1, 3000), block=st.integers(1, 400), window=st.integers(1, 9), seed=SEEDS)
def test_any_stretch_of_an_epoch_is_found_without_the_rest(size: int, block: int, window: int, seed: int) -> None:
    whole = shuffled(np.arange(size), size, block, window, (seed, 0, 0))
    places = np.random.default_rng(seed).integers(0, size, 20)
    assert np.array_equal(shuffled(places, size, block, window, (seed, 0, 0)), whole[places])


@given(size=st.integers(500, 3000), block=st.integers(1, 100), window=st.integers(1, 5), seed=SEEDS)
def test_a_stretch_of_training_reads_few_blocks(size: int, block: int, window: int, seed: int) -> None:
    order = shuffled(np.arange(size), size, block, window, (seed, 0, 0))
    span = block * window
    for first in range(0, size, span):
        assert len(np.unique(order[first : first + span] // block)) <= 2 * window + 1


def test_seed_and_epoch_change_the_order() -> None:
    base = shuffled(np.arange(1000), 1000, 10, 4, (0, 0, 0))
    for seed in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert np.mean(base == shuffled(np.arange(1000), 1000, 10, 4, seed)) < 0.02


def test_neighbours_are_not_kept_together() -> None:
    found = shuffled(np.arange(10_000), 10_000, 100, 32, (0, 0, 0))
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.1
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.01


@given(size=st.integers(640, 5000), seed=SEEDS)
def test_every_window_holds_all_parts_of_the_pool_alike(size: int, seed: int) -> None:
    """A part of the pool that fills a window's share of it or more is in every whole window, in its measure."""
    found = shuffled(np.arange(size), size, 10, 8, (seed, 0, 0))
    quarters = found * 4 // size
    for first in range(0, size - 160, 80):
        counts = np.bincount(quarters[first : first + 80], minlength=4)
        assert np.abs(counts - 20).max() <= 10, "two blocks of ten each, to within one"


def test_the_blocks_of_a_window_are_mixed_evenly() -> None:
    found = shuffled(np.arange(32 * 100), 32 * 100, 100, 32, (0, 0, 0)) // 100
    for first in range(0, len(found), 320):
        counts = np.bincount(found[first : first + 320], minlength=32)
        assert ((counts - 10) ** 2 / 10).sum() < 61, "chi-squared of 31 degrees of freedom: 61 is one in a thousand"


@pytest.mark.parametrize(
    ("samples", "seed", "step", "expected"),
    [(1000, 0, 1, [553, 646, 901, 516]), (10**9, 7, 10**6, [261658257, 862946246, 763309714, 340717585])],
)
def test_the_order_never_changes_between_releases(samples: int, seed: int, step: int, expected: list[int]) -> None:
    """A checkpoint's data position means nothing once this changes."""
    assert uniform(samples=samples, seed=seed, global_batch_size=4).step(step).tolist() == expected


def test_seeking_far_takes_no_time_and_no_memory() -> None:
    """10^9 samples; the millionth step of 1024. Asked: 50 ms."""
    order = uniform(samples=10**9, seed=3, global_batch_size=1024)
    order.step(1)
    tracemalloc.start()
    times = []
    for step in range(10**6, 10**6 + 20):
        before = time.thread_time()
        order.step(step)
        times.append(time.thread_time() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(times)[len(times) // 2] < 0.05
    assert peak < 2**20


# --- epochs, mixtures, batch sizes ------------------------------------------------------------------------------------


@given(samples=st.integers(1, 500), seed=st.integers(0, 1000), batch=st.integers(1, 64), block=st.integers(1, 90))
def test_epochs_join_without_dropping_or_repeating(samples: int, seed: int, batch: int, block: int) -> None:
    order = uniform(samples=samples, seed=seed, global_batch_size=batch, block=block)
    stream = concatenated(order, 1, -(-3 * samples // batch))
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * samples : (epoch + 1) * samples]), np.arange(samples))


def mixed(*stages: Stage, sizes: tuple[int, ...] = (700, 300, 5), batch: int = 10) -> Order:
    firsts = np.cumsum([0, *sizes[:-1]])
    pools = tuple(Pool(int(first), size) for first, size in zip(firsts, sizes, strict=True))
    return Order(pools=pools, stages=stages, batches=(Batches(batch),), seed=1, block=64, window=4)


def shares_of(order: Order, first: int, last: int) -> list[float]:
    """Share of each pool among the samples of steps first..last."""
    ids = concatenated(order, first, last)
    return [float(np.mean((ids >= p.first) & (ids < p.first + p.samples))) for p in order.pools]


def test_every_batch_holds_its_weights() -> None:
    order = mixed(Stage((8, 1, 1)))
    assert {tuple(shares_of(order, step, step)) for step in range(1, 400)} == {(0.8, 0.1, 0.1)}


def test_stages_follow_each_other() -> None:
    order = mixed(Stage((1, 0, 0), samples=1000), Stage((0.5, 0.25, 0.25)))
    assert shares_of(order, 1, 100) == [1, 0, 0]
    assert np.allclose(shares_of(order, 101, 300), (0.5, 0.25, 0.25), atol=1e-3)


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    length=st.integers(1, 25_000),
    batch=st.integers(1, 64),
)
def test_a_pool_is_drawn_in_whole_epochs_across_stages(weights: list[float], length: int, batch: int) -> None:
    order = mixed(Stage(tuple(weights), samples=length), Stage((1, 1, 1)), batch=batch)
    ids = order.samples(np.arange(length + 5000))
    for pool in order.pools:
        drawn = ids[(ids >= pool.first) & (ids < pool.first + pool.samples)] - pool.first
        for epoch in range(len(drawn) // pool.samples):
            part = drawn[epoch * pool.samples : (epoch + 1) * pool.samples]
            assert np.array_equal(np.sort(part), np.arange(pool.samples))


@settings(max_examples=25)
@given(weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6), length=st.integers(1, 20_000))
def test_any_stretch_holds_its_shares(weights: list[float], length: int) -> None:
    order = mixed(Stage(tuple(weights)), sizes=(1000,) * len(weights))
    pools, _ = order._draws(np.arange(length))
    counts = np.bincount(pools, minlength=len(weights))
    assert np.abs(counts - np.array(weights) / sum(weights) * length).max() <= len(weights) + length / 10_000


RAMPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), max_size=4)


def ramped(ramp: list[tuple[int, int]], last: int = 12, samples: int = 500) -> Order:
    return Order(
        pools=(Pool(0, samples),),
        stages=(Stage((1.0,)),),
        batches=(*(Batches(size, steps) for steps, size in ramp), Batches(last)),
        seed=5,
        block=50,
        window=3,
    )


@given(ramp=RAMPS)
def test_a_batch_ramp_moves_no_sample(ramp: list[tuple[int, int]]) -> None:
    order = ramped(ramp)
    steps = sum(steps for steps, _ in ramp) + 10
    sizes = [size for steps, size in ramp for _ in range(steps)] + [12] * 10
    assert [order.batch_size(step) for step in range(1, steps + 1)] == sizes
    assert [order.position(step) for step in range(1, steps + 2)] == np.cumsum([0, *sizes]).tolist()
    assert np.array_equal(concatenated(order, 1, steps), ramped([], 1).samples(np.arange(sum(sizes))))


@given(ramp=RAMPS, step=st.integers(0, 40), more=st.integers(1, 30))
def test_what_comes_may_change_without_changing_the_past(ramp: list[tuple[int, int]], step: int, more: int) -> None:
    before = ramped(ramp)
    past = before.past(step)
    kept = [(steps, size) for steps, size in past["batches"]]
    after = ramped(kept, last=more)
    assert after.past(step) == past
    assert all(np.array_equal(before.step(s), after.step(s)) for s in range(1, step + 1))
    if step:
        assert ramped([(steps, size + 1) for steps, size in kept]).past(step) != past


def test_a_new_stage_of_a_mixture_keeps_the_past() -> None:
    begun = mixed(Stage((8, 1, 1)))
    grown = mixed(Stage((0.8, 0.1, 0.1), samples=200), Stage((0, 1, 0)))
    assert begun.past(20) == grown.past(20)
    assert begun.past(21) != grown.past(21)
    assert mixed(Stage((7, 2, 1))).past(1) != begun.past(1)


# --- ranks ------------------------------------------------------------------------------------------------------------


@given(
    step=st.integers(1, 10**6),
    shares=st.lists(st.integers(1, 7), min_size=1, max_size=40),
    batch=st.integers(1, 64),
)
def test_the_union_over_ranks_is_the_step_whatever_the_shares(step: int, shares: list[int], batch: int) -> None:
    order = uniform(samples=997, seed=3, global_batch_size=batch, block=100)
    parts = [order.of_rank([step], rank, shares) for rank in range(len(shares))]
    assert np.array_equal(np.concatenate(parts), order.step(step))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - batch * share / sum(shares)) < 1


@pytest.mark.parametrize(
    ("shares", "sizes"), [((1, 1, 1), [5, 5, 6]), ((1,) * 5, [3, 3, 3, 3, 4]), ((2, 1, 1), [8, 4, 4])]
)
def test_unequal_shares(shares: tuple[int, ...], sizes: list[int]) -> None:
    bounds = [slice_of(16, rank, shares) for rank in range(len(shares))]
    assert [end - first for first, end in bounds] == sizes


@given(steps=st.lists(st.integers(1, 60), min_size=1, max_size=9), rank=st.integers(0, 2))
def test_many_steps_at_once_are_the_steps_one_by_one(steps: list[int], rank: int) -> None:
    order = ramped([(7, 3), (9, 8)])
    each = [order.of_rank([step], rank, (2, 1, 1)) for step in steps]
    assert np.array_equal(order.of_rank(steps, rank, (2, 1, 1)), np.concatenate(each))


# --- kills and resizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hundred", range(10))
def test_no_sample_is_lost_or_repeated_through_kills_and_resizes(hundred: int) -> None:
    """A thousand random runs: attempts of any ranks and shares, each killed anywhere and resumed from its commit."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        draw = np.random.default_rng(seed)
        ramp = [(int(draw.integers(1, 10)), int(draw.integers(1, 21))) for _ in range(draw.integers(0, 5))]
        order = ramped(ramp, last=int(draw.integers(1, 21)), samples=int(draw.integers(1, 400)))
        every, last = int(draw.integers(1, 11)), int(draw.integers(1, 60))
        consumed: dict[int, list[int]] = {}
        committed = 0
        while committed < last:
            shares = draw.integers(1, 6, draw.integers(1, 9)).tolist()
            # A run that never comes to its next commit would not end, in life as here.
            end = min(last, max(committed + int(draw.integers(1, 41)), (committed // every + 1) * every))
            consumed |= consume(order, range(committed + 1, end + 1), shares)
            committed = end if end == last else end // every * every
        stream = [sample for step in range(1, last + 1) for sample in consumed[step]]
        samples = order.pools[0].samples
        epochs, rest = divmod(len(stream), samples)
        counts = Counter(stream)
        assert all(counts[sample] in ((epochs, epochs + 1) if rest else (epochs,)) for sample in range(samples)), seed
        assert stream == order.samples(np.arange(len(stream))).tolist(), seed


def consume(order: Order, steps: range, shares: list[int]) -> dict[int, list[int]]:
    """What the ranks take together, by step."""
    parts = [iter(order.of_rank(steps, rank, shares).tolist()) for rank in range(len(shares))]
    found = {}
    for step in steps:
        bounds = [slice_of(order.batch_size(step), rank, shares) for rank in range(len(shares))]
        found[step] = [next(part) for part, (low, high) in zip(parts, bounds, strict=True) for _ in range(high - low)]
    assert not any(list(part) for part in parts)
    return found
