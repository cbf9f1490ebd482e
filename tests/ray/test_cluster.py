"""Pools of a live cluster with unlike nodes. The GPU counts are declared to Ray; no device is touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cluster
from orchestrator.examiner import Examiner
from orchestrator.findings import DeviceResult, NodeResult, StorageResult
from orchestrator.nodes import examinations
from orchestrator.planning.plan import Plan
from orchestrator.preflight import preflight
from orchestrator.runs import RunDir
from tests.made_runs import recipe


@pytest.fixture(scope="module")
def mixed() -> Iterator[None]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    folder = tempfile.mkdtemp(prefix="trn-", dir="/tmp")
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "temp_dir": folder, **small})
    try:
        nodes.add_node(num_cpus=2, num_gpus=4, labels={"terrane.io/accelerator": "dcu"}, **small)
        nodes.add_node(num_cpus=2, num_gpus=1, labels={"ray.io/accelerator-type": "A100"}, **small)
        ray.init(address=nodes.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_unlike_nodes_form_pools(mixed: None) -> None:
    pools = {pool.accelerator: pool for pool in cluster.node_pools()}
    assert {name: pool.devices(1.0) for name, pool in pools.items()} == {"cpu": 2, "cuda": 1, "dcu": 4}
    assert pools["dcu"].device_memory_bytes == 16 * 2**30
    assert pools["cuda"].device_memory_bytes == 40 * 2**30


def test_work_can_be_kept_on_a_node(mixed: None) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def where() -> str:
        return str(ray.get_runtime_context().get_node_id())

    for pool in cluster.node_pools():
        for node in pool.nodes:
            found = where.options(label_selector=cluster.on_node(node.id)).remote()
            assert ray.get(found, timeout=60) == node.id


class GivenNumbers(Examiner):
    """An agent that measures links alone, which takes no time."""

    async def preflight(self, **request: Any) -> NodeResult:
        device = DeviceResult(device=0, flops={"fp32": 1e11}, bytes_per_s=1e10)
        return NodeResult(accelerator="cpu", devices=(device,), storage=StorageResult())


def test_preflight_reaches_every_node_and_measures_the_links_between_them(mixed: None, tmp_path: Path) -> None:
    import ray

    names = sorted(node.id for pool in cluster.node_pools() for node in pool.nodes)
    made = ray.remote(GivenNumbers)
    agents = {name: made.options(num_cpus=0.1, label_selector=cluster.on_node(name)).remote() for name in names}
    plan = Plan(
        accelerator="cpu",
        node_ids=tuple(names),
        workers_by_node=(1, 1, 1),
        data_parallel=3,
        micro_batch_size=1,
        accumulation=1,
        dtype="fp32",
        parameters=1,
        memory_bytes=1,
        step_time_s=1.0,
    )
    run = RunDir(str(tmp_path))
    assert preflight(run, recipe(str(tmp_path)), plan, agents, {}, {}) == []
    found = examinations(run, names)
    assert [sorted(found[name].links) for name in names] == [[n for n in names if n != name] for name in names]
    assert all(link.bytes_per_s > 1e6 for one in found.values() for link in one.links.values())
