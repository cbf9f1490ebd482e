"""The live Ray cluster as pools of like nodes."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator import accelerators
from orchestrator.accelerators import Node, NodePool
from orchestrator.errors import RunFailed, UserError

OBJECT_STORE_BYTES = 256 * 2**20
REMOVAL_S = 5.0


@contextmanager
def connection(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, or start one on this machine and take it down afterwards.

    Args:
        address: as `ray.init` takes it ("auto", host:port, ray://...); None starts a local cluster.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Without this, Ray turns its metrics exporter and memory monitor on for every worker it starts.
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster answers at {address}: {error}", "start one with `ray start --head`"
            ) from None
        with _disconnecting():
            yield
        return
    # A cluster of our own listens on loopback only and ends with this process, so it needs no token.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="trn-", dir="/tmp")  # short: Ray's sockets live below it, limit 107 characters
    try:
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
                **quiet,
            )
        except Exception as error:
            if "timed out" not in str(error):  # Ray raises the bare class
                raise
            raise RunFailed("Ray did not start in time on this machine", "it is busy: run the same command") from None
        with _disconnecting():
            yield
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Ray's processes may write there for a moment yet, above all where its end was interrupted."""
    end = time.monotonic() + REMOVAL_S
    while Path(folder).exists() and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


@contextmanager
def _disconnecting() -> Iterator[None]:
    import ray

    if threading.current_thread() is threading.main_thread():
        # Ray has put a handler of its own that ends the process. SIGTERM is how Kubernetes asks: take it as Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()


def node_pools() -> list[NodePool]:
    """The alive nodes of the connected cluster, grouped by accelerator and device memory.

    A node is `cuda` when it has Ray GPUs, unless its label `terrane.io/accelerator` says otherwise, and else `cpu`.

    Raises:
        UserError: a label names no accelerator.
    """
    import ray

    groups: dict[tuple[str, int, bool], list[Node]] = {}
    for row in ray.nodes():
        if row["Alive"]:
            groups.setdefault(_kind(row), []).append(_node(row))
    if not groups:
        raise RunFailed("the Ray cluster has no alive node")
    return [
        NodePool(
            accelerator=name, nodes=tuple(sorted(nodes, key=lambda n: n.id)), device_memory_bytes=memory, bf16=bf16
        )
        for (name, memory, bf16), nodes in sorted(groups.items())
    ]


def hosts() -> dict[str, str]:
    """The names of the nodes' machines, by node id."""
    import ray

    return {row["NodeID"]: row["NodeManagerHostname"] for row in ray.nodes() if row["Alive"]}


def draining() -> dict[str, float]:
    """Nodes that are about to go, and when, in unix seconds; 0 where that is not known.

    Ray has no public call for this; its own Train watches for preemption in the same way.
    """
    import ray

    found = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 for node, deadline in found.items()}


def ask_for(workers: int, resources: dict[str, float]) -> None:
    """Tell the autoscaler, where there is one, that so many workers want room; none takes it back."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[resources] * workers)


def on_node(node_id: str) -> dict[str, str]:
    """Ray's label selector for one node."""
    return {"ray.io/node-id": node_id}


def _kind(row: dict[str, Any]) -> tuple[str, int, bool]:
    """(accelerator, bytes of a device, whether it computes in bf16)."""
    labels: dict[str, str] = row.get("Labels") or {}
    has_devices = row["Resources"].get("GPU", 0) >= 1
    name = labels.get(accelerators.LABEL) or ("cuda" if has_devices else "cpu")
    if name not in accelerators.ACCELERATORS:
        known = ", ".join(accelerators.ACCELERATORS)
        raise UserError(f"node {row['NodeManagerAddress']} has {accelerators.LABEL}={name}", f"known: {known}")
    if accelerators.ACCELERATORS[name].ray_resource == "CPU":
        return name, 0, True
    model = labels.get("ray.io/accelerator-type", "")
    fallback = accelerators.DEVICE_MEMORY_GIB.get(model, accelerators.UNKNOWN_DEVICE_MEMORY_GIB)
    memory = int(float(labels.get(accelerators.MEMORY_LABEL, fallback)) * 2**30)
    return name, memory, model not in accelerators.WITHOUT_BF16


def _node(row: dict[str, Any]) -> Node:
    resources = row["Resources"]
    return Node(
        id=row["NodeID"],
        address=row["NodeManagerAddress"],
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
    )
