from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.order import Order, Pool, Stage, permute, uniform


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 100))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    found = permute(np.arange(size, dtype=np.uint64), size, seed, epoch)
    assert np.array_equal(np.sort(found), np.arange(size))


@given(samples=st.integers(1, 500), seed=st.integers(0, 1000), batch=st.integers(1, 64))
def test_epochs_join_without_dropping_or_repeating(samples: int, seed: int, batch: int) -> None:
    order = uniform(samples=samples, seed=seed, global_batch_size=batch)
    steps = -(-3 * samples // batch)
    stream = np.concatenate([order.step(step) for step in range(1, steps + 1)])
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * samples : (epoch + 1) * samples]), np.arange(samples))


@given(step=st.integers(1, 10**6), world_size=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_union_over_ranks_is_the_step_whatever_the_world(step: int, world_size: int) -> None:
    order = uniform(samples=997, seed=3, global_batch_size=12)
    parts = [order.of_rank(step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), order.step(step))


def test_seed_and_epoch_change_the_order() -> None:
    offsets = np.arange(1000, dtype=np.uint64)
    base = permute(offsets, 1000, 0, 0)
    for seed, epoch in ((1, 0), (0, 1)):
        assert np.mean(base == permute(offsets, 1000, seed, epoch)) < 0.02


def test_neighbours_are_not_kept_together() -> None:
    found = permute(np.arange(10_000, dtype=np.uint64), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.01


@pytest.mark.parametrize(
    ("samples", "seed", "step", "expected"),
    [(1000, 0, 1, [796, 133, 356, 46]), (10**9, 7, 10**6, [942007047, 974775111, 438507683, 57931633])],
)
def test_the_order_never_changes_between_releases(samples: int, seed: int, step: int, expected: list[int]) -> None:
    """A checkpoint's data position means nothing once this changes."""
    assert uniform(samples=samples, seed=seed, global_batch_size=4).step(step).tolist() == expected


def mixed(*stages: Stage, sizes: tuple[int, ...] = (700, 300, 5), batch: int = 10) -> Order:
    firsts = np.cumsum([0, *sizes[:-1]])
    pools = tuple(Pool(int(first), size) for first, size in zip(firsts, sizes, strict=True))
    return Order(pools=pools, stages=stages, seed=1, global_batch_size=batch)


def shares(order: Order, first: int, last: int) -> list[float]:
    """Share of each pool among the samples of steps first..last."""
    ids = np.concatenate([order.step(step) for step in range(first, last + 1)])
    return [float(np.mean((ids >= p.first) & (ids < p.first + p.samples))) for p in order.pools]


def test_every_batch_holds_its_weights() -> None:
    order = mixed(Stage((8, 1, 1)))
    assert {tuple(shares(order, step, step)) for step in range(1, 400)} == {(0.8, 0.1, 0.1)}


def test_stages_follow_each_other() -> None:
    order = mixed(Stage((1, 0, 0), samples=1000), Stage((0.5, 0.25, 0.25)))
    assert shares(order, 1, 100) == [1, 0, 0]
    assert np.allclose(shares(order, 101, 300), (0.5, 0.25, 0.25), atol=1e-3)


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
