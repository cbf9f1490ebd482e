"""The search over layouts: as good as a look at every one, and fast on thousands of devices."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest

from orchestrator.model_config import ModelConfig
from orchestrator.planning.bounds import Bounds
from orchestrator.planning.cluster_file import Pool
from orchestrator.planning.devices import Devices, of_pool
from orchestrator.planning.families import config_values
from orchestrator.planning.layout_search import families, micro_batches, predicted, search
from orchestrator.planning.prediction import predict
from orchestrator.planning.request import Space, Work
from orchestrator.planning.shape import ModelShape, shape_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def devices(device: str = "a100-40", nodes: int = 1, **values: Any) -> Devices:
    return of_pool(Pool.model_validate({"name": "p", "device": device, "nodes": nodes, **values}))


def work(shape: ModelShape | None = None, **values: Any) -> Work:
    usual = {"sequence_length": 1024, "global_batch_size": 24, "steps": 10}
    return Work(**{"shape": shape or shape_of(LLAMA), **usual, **values})


def galactica(size: str) -> ModelShape:
    return shape_of(config_values(ModelConfig.model_validate({"preset": f"galactica-{size}"}), 50_000, 2048))


def exhaustive(asked: Work, among: Devices, space: Space) -> tuple[float, int]:
    """(seconds of the fastest step that fits, the layouts that do), by predictions of every single one."""
    dtype, times = among.dtype(asked.dtype), []
    for layout in families(asked, among, space, dtype):
        groups = among.groups(layout.tensor_parallel) // layout.pipeline_stages
        for replicas in range(1, min(groups, asked.global_batch_size) + 1):
            for micro_batch in range(1, math.ceil(asked.global_batch_size / replicas) + 1):
                found = predict(
                    asked.shape,
                    layout,
                    among.platforms[dtype],
                    available_bytes=among.memory_bytes,
                    dtype=dtype,
                    data_parallel=replicas,
                    micro_batch_size=micro_batch,
                    global_batch_size=asked.global_batch_size,
                    sequence_length=asked.sequence_length,
                    host_memory=among.host_memory,
                )
                times += [found.step.total] * found.fits
    return min(times, default=math.inf), len(times)


POOLS = [
    {"device": "a100-40", "nodes": 1},
    {"device": "v100-16", "nodes": 3, "devices_per_node": 4},
    {"device": "z100", "nodes": 3, "devices_per_node": 4, "memory_gib": 8},
    {"device": "rtx-4090", "nodes": 6, "devices_per_node": 2, "node_link_gb_per_s": 0.2},
    {"device": "h100", "nodes": 2, "devices_per_node": 3, "memory_gib": 9, "device_link_gb_per_s": 20},
    {"accelerator": "cpu", "nodes": 4, "devices_per_node": 3, "memory_gib": 24},
    {"device": "h100", "nodes": 5, "devices_per_node": 2, "device_link_gb_per_s": 1},
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: f"{pool.get('device', 'cpu')}-{pool['nodes']}")
@pytest.mark.parametrize("batch", [7, 24])
def test_up_to_12_devices_nothing_is_faster_than_what_is_found(pool: dict[str, Any], batch: int) -> None:
    asked, among = work(global_batch_size=batch), of_pool(Pool.model_validate({"name": "p", **pool}))
    assert among.count <= 12
    best, fitting = exhaustive(asked, among, Space())
    found = search(asked, among, Space())
    assert fitting > 50
    assert found.best[0].step.total == pytest.approx(best, rel=1e-9)
    assert found.best[0].memory.total <= among.memory_bytes


def test_each_of_the_best_is_the_best_of_its_kind() -> None:
    asked, among = work(), devices(nodes=1, memory_gib=12)
    for candidate in search(asked, among, Space()).best:
        tensor, stages = candidate.cut
        best, _ = exhaustive(asked, among, Space(tensor_parallel=tensor, pipeline_stages=stages))
        assert candidate.step.total == pytest.approx(best, rel=1e-9)


def test_what_was_judged_by_its_fullest_stage_is_judged_alike_by_every_stage() -> None:
    asked, among = work(galactica("6.7b"), global_batch_size=64, sequence_length=2048), devices(nodes=2)
    for candidate in search(asked, among, Space()).best:
        whole = predicted(asked, among, candidate)
        assert whole.peak_memory_bytes == candidate.memory.total
        assert whole.step == candidate.step


@pytest.mark.parametrize("device", ["a100-40", "z100", "rtx-4090"])
def test_bounds_are_below_the_times_and_near_them(device: str) -> None:
    asked, among = work(global_batch_size=60), devices(device, nodes=2)
    dtype = among.dtype("auto")
    bounds = Bounds(asked.shape, among.platforms[dtype], 60, asked.sequence_length, dtype)
    nearest = []
    for layout, replicas in itertools.product(families(asked, among, Space(), dtype), (1, 2, 7, 16)):
        share = bounds.share(replicas)
        for accumulation, size in micro_batches(share):
            step = predict(
                asked.shape,
                layout,
                among.platforms[dtype],
                available_bytes=0,
                dtype=dtype,
                data_parallel=replicas,
                micro_batch_size=size,
                global_batch_size=60,
                sequence_length=asked.sequence_length,
            ).step.total
            assert bounds.of(layout, replicas).with_accumulation(share, accumulation) <= step
            assert bounds.of_range(layout, 1, replicas) <= bounds.of(layout, replicas).at_best(share) <= step
            nearest.append(bounds.of(layout, replicas).with_accumulation(share, accumulation) / step)
    assert max(nearest) > 0.999999
    assert min(nearest) > 0.8


@pytest.mark.parametrize(
    ("device", "nodes", "size", "batch", "seconds"),
    [
        ("z100", 512, "30b", 4096, 1),
        ("h100", 256, "120b", 2048, 1),
        ("h100", 2048, "120b", 16_384, 5),
        ("h100", 2048, "1.3b", 16_384, 5),
    ],
)
def test_thousands_of_devices_are_planned_in_seconds(
    device: str, nodes: int, size: str, batch: int, seconds: float
) -> None:
    """Processor time, twice what is promised, on the second try where need be: machines that run tests are busy."""
    asked, among = work(galactica(size), sequence_length=2048, global_batch_size=batch), devices(device, nodes)
    for _ in range(2):
        began = time.process_time()
        found = search(asked, among, Space())
        took = time.process_time() - began
        if took < seconds:
            break
    assert found.best
    assert took < 2 * seconds


def test_what_is_given_is_kept_to() -> None:
    asked, among = work(galactica("6.7b"), global_batch_size=64, sequence_length=2048), devices(nodes=4)
    space = Space(tensor_parallel=2, pipeline_stages=4, layers_per_stage=(7, 8, 8, 9), recompute=True, most_workers=16)
    best = search(asked, among, space).best[0]
    assert best.cut == (2, 4)
    assert best.layout.layers_per_stage == (7, 8, 8, 9)
    assert best.layout.recompute
    assert best.workers == 16
    assert search(asked, among, Space(zero_stage=3)).best[0].layout.zero_stage == 3
    assert search(asked, among, Space(offload=True)).best[0].offload
    assert search(asked, among, Space(fewest_workers=32)).best[0].workers == 32


def test_tensor_parallel_ranks_stand_on_one_node() -> None:
    found = search(work(), devices(nodes=3, devices_per_node=3), Space(tensor_parallel=2)).best[0]
    assert found.workers <= 3 * 2, "the third device of a node has no partner"
