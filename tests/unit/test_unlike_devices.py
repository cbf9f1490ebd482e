"""Unlike pools in one run: islands with shares by speed, and pipelines whose stages stand on different devices."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.cluster_file import Pool
from orchestrator.planning.devices import Devices, of_pool
from orchestrator.planning.islands import islands
from orchestrator.planning.layout import Layout
from orchestrator.planning.layout_search import search, sized
from orchestrator.planning.memory import Load, stage_memory
from orchestrator.planning.mixed import Stage, laid, mixed_pipeline, split_layers
from orchestrator.planning.request import Space, Work
from orchestrator.planning.throughput import stage_pace
from tests.unit.test_layout_search import galactica, work


def pool(name: str, device: str, nodes: int, **values: Any) -> Devices:
    return of_pool(Pool.model_validate({"name": name, "device": device, "nodes": nodes, **values}))


FEW = [
    pool("old", "v100-16", 1, devices_per_node=4),
    pool("new", "a100-40", 2, devices_per_node=2),
    pool("home", "rtx-4090", 4, devices_per_node=1),
]


# --- islands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [FEW[:2], FEW[1:], FEW], ids=lambda chosen: "-".join(one.name for one in chosen))
def test_no_way_to_share_a_batch_is_faster(chosen: list[Devices]) -> None:
    asked = work(global_batch_size=9)
    found = islands(asked, [(devices, Space()) for devices in chosen])
    assert found
    assert sum(devices.count for devices in chosen) <= 12

    def alone(devices: Devices, sequences: int) -> float:
        return search(work(global_batch_size=sequences), devices, Space(), keep=1).best[0].step.total

    times = [[math.inf] + [alone(devices, count) for count in range(1, 10)] for devices in chosen]
    ways = (way for way in itertools.product(range(1, 10), repeat=len(chosen)) if sum(way) == 9)
    best = min(max(times[n][count] for n, count in enumerate(way)) for way in ways)
    assert found.step_time_s - found.exchange_s == pytest.approx(best, rel=1e-9)


def test_shares_follow_speed() -> None:
    pools = [pool("slow", "v100-16", 8), pool("fast", "a100-80", 8)]
    asked = work(galactica("6.7b"), sequence_length=2048, global_batch_size=1024)
    found = islands(asked, [(devices, Space()) for devices in pools])
    assert found
    slow, fast = found.islands
    assert slow.sequences + fast.sequences == 1024
    assert fast.sequences > 1.5 * slow.sequences
    assert slow.candidate.step.total == pytest.approx(fast.candidate.step.total, rel=0.1), "neither waits for long"
    alone = [search(asked, devices, Space(), keep=1).best[0].step.total for devices in pools]
    assert found.step_time_s < min(alone)
    assert found.exchange_s > 0


def test_one_pool_is_no_group_of_islands() -> None:
    assert islands(work(), [(FEW[0], Space())]) is None
    tiny = pool("tiny", "v100-16", 1, memory_gib=1.6)
    assert islands(work(), [(FEW[0], Space()), (tiny, Space())]) is None


# --- pipelines --------------------------------------------------------------------------------------------------------


def test_layers_are_split_as_well_as_by_a_look_at_every_split() -> None:
    random_ = random.Random(0)
    for _ in range(200):
        count, layers = random_.randint(1, 4), random_.randint(4, 11)
        stages = [
            Stage(random_.choice([1.0, 1.5, 2.0, 3.7]), random_.choice([0.0, 0.4, 2.0]), random_.randint(1, 8))
            for _ in range(count)
        ]
        micro_batches = random_.choice([1, 2, 5, 40])

        def step(split: tuple[int, ...]) -> float:
            times = [s.layer_s * n + s.fixed_s for s, n in zip(stages, split, strict=True)]  # noqa: B023
            return sum(times) + (micro_batches - 1) * max(times)  # noqa: B023

        ways = itertools.product(*(range(1, stage.most + 1) for stage in stages))
        every = [step(way) for way in ways if sum(way) == layers]
        found = split_layers(stages, layers, micro_batches)
        assert (found is None) == (not every)
        if found:
            assert sum(found) == layers
            assert all(1 <= n <= stage.most for n, stage in zip(found, stages, strict=True))
            assert step(found) == pytest.approx(min(every), rel=1e-12)


def every_pipeline(asked: Work, pools: Sequence[Devices]) -> Iterator[float]:
    """Seconds of a step of every pipeline that fits, by predictions of every single one."""
    blocks, batch = asked.shape.layers, asked.global_batch_size
    for size in (size for size in (1, 2) if all(size <= one.devices_per_node for one in pools)):
        for replicas in range(1, min(*(one.groups(size) for one in pools), batch) + 1):
            for counts in itertools.product(*(range(1, one.groups(size) // replicas + 1) for one in pools)):
                of_stage = [one for one, count in zip(pools, counts, strict=True) for _ in range(count)]
                for ends in itertools.combinations(range(1, blocks), len(of_stage) - 1):
                    split = tuple(end - begin for begin, end in itertools.pairwise((0, *ends, blocks)))
                    for recompute, micro_batch in itertools.product((False, True), range(1, batch // replicas + 1)):
                        cut = Layout(
                            tensor_parallel=size,
                            pipeline_stages=len(of_stage),
                            layers_per_stage=split,
                            zero_stage=1,
                            offload=False,
                            recompute=recompute,
                        )
                        yield from seconds_if_it_fits(asked, of_stage, cut, replicas, micro_batch)


def seconds_if_it_fits(
    asked: Work, of_stage: Sequence[Devices], cut: Layout, replicas: int, micro_batch: int
) -> Iterator[float]:
    share = math.ceil(asked.global_batch_size / replicas)
    load = Load(
        dtype="bf16",
        data_parallel=replicas,
        micro_batch_size=micro_batch,
        accumulation=math.ceil(share / micro_batch),
        sequence_length=asked.sequence_length,
    )
    paces = []
    for number, (one, blocks) in enumerate(zip(of_stage, cut.layers_per_stage, strict=True)):
        platform = one.platforms["bf16"]
        if stage_memory(asked.shape, cut, platform, load, number).total > one.memory_bytes:
            return
        first, last = number == 0, number == len(of_stage) - 1
        paces.append(stage_pace(asked.shape, cut, platform, load, blocks, first, last))
    times = [pace.sequence_s * share / load.accumulation + pace.fixed_s for pace in paces]
    once = max(pace.reduce_s for pace in paces) + max(pace.update_s for pace in paces)
    yield sum(times) + (load.accumulation - 1) * max(times) + once


def test_no_pipeline_over_few_devices_is_faster() -> None:
    rng = random.Random(1)
    fitting = 0
    for _ in range(40):
        first, second = rng.choice([(1, 2), (2, 2), (1, 4), (2, 3)])
        links = rng.choices([0.1, 1, 20], k=2)
        pools = [
            pool("a", "a100-40", first, devices_per_node=2, memory_gib=8, node_link_gb_per_s=links[0]),
            pool(
                "b",
                "v100-16",
                second,
                devices_per_node=rng.choice([1, 2]),
                memory_gib=rng.uniform(2, 6),
                tflops={"bf16": rng.choice([20, 60, 300])},
                node_link_gb_per_s=links[1],
            ),
        ]
        shape = replace(galactica("125m"), layers=rng.randint(4, 6))
        asked = work(shape, sequence_length=512, global_batch_size=rng.choice([2, 4, 9]))
        found, times = mixed_pipeline(asked, pools), list(every_pipeline(asked, pools))
        assert (found is None) == (not times)
        if found:
            fitting += 1
            assert found.step_time_s == pytest.approx(min(times), rel=1e-9)
    assert fitting > 20


def test_big_memory_comes_first_and_fast_devices_take_more_layers() -> None:
    pools = [pool("small", "a100-40", 2), pool("big", "a100-80", 2, tflops={"bf16": 150})]
    asked = work(galactica("30b"), sequence_length=2048, global_batch_size=256)
    found = mixed_pipeline(asked, pools)
    assert found and found.fits
    names = [devices.name for devices in found.pools]
    assert names == sorted(names), "stages on big come before those on small"
    blocks = dict.fromkeys(names, 0.0)
    for name, count in zip(names, found.layout.layers_per_stage, strict=True):
        blocks[name] += count / names.count(name)
    assert blocks["small"] > 1.5 * blocks["big"], "small is twice as fast"
    assert sum(found.layout.layers_per_stage) == 48


def test_small_memory_limits_layers() -> None:
    pools = [pool("big", "a100-80", 1), pool("small", "a100-80", 1, memory_gib=24)]
    asked = work(galactica("30b"), sequence_length=2048, global_batch_size=64)
    load = Load(dtype="bf16", data_parallel=1, micro_batch_size=1, accumulation=64, sequence_length=2048)
    found = laid(asked, pools, (1, 1), 8, True, load)
    assert found and found.fits
    first, second = found.layout.layers_per_stage
    assert first > second
    even = laid(asked, [pools[0], pools[0]], (1, 1), 8, True, load)
    assert even and abs(even.layout.layers_per_stage[0] - even.layout.layers_per_stage[1]) <= 2


def test_pipeline_of_like_devices_is_as_fast_as_the_search_says() -> None:
    """Two halves of one pool are a pipeline as any other."""
    half = pool("half", "a100-40", 1)
    asked = work(galactica("6.7b"), sequence_length=2048, global_batch_size=64)
    load = Load(dtype="bf16", data_parallel=4, micro_batch_size=1, accumulation=16, sequence_length=2048)
    found = laid(asked, [half, half], (2, 2), 1, True, load)
    assert found
    whole = pool("whole", "a100-40", 2)
    assert sized(asked, whole, found.layout, 4, 1, "bf16").step.total == pytest.approx(found.step_time_s, rel=1e-9)


def test_devices_of_unlike_kinds_share_no_pipeline() -> None:
    assert mixed_pipeline(work(), [FEW[0], pool("dcu", "z100", 1)]) is None
    assert mixed_pipeline(work(), [FEW[0]]) is None
