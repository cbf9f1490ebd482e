"""Pools of a live cluster with unlike nodes. The GPU counts are declared to Ray; no device is touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from orchestrator import cluster


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
