"""Like devices that a layout may be laid over, whether a cluster file tells of them or a live cluster has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.accelerators import NodePool
from orchestrator.errors import PlanError
from orchestrator.planning.cluster_file import Pool, required
from orchestrator.planning.platform import Device, Platform
from orchestrator.planning.throughput import platform_of

_GIB = 2**30
DTYPES = {"cpu": ("fp32", "bf16"), "dcu": ("fp16", "fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}
"""What each kind of device computes in, the best first."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    name: str
    accelerator: str
    nodes_by_devices: Mapping[int, int]
    """How many nodes have so many devices."""
    memory_bytes: int
    """Of each."""
    platforms: Mapping[str, Platform]
    """By the dtypes that they compute in."""
    price_per_device_hour: float = 0.0
    figures: Device | None = None
    """That the platforms are made from, of a cluster file."""

    @property
    def nodes(self) -> int:
        return sum(self.nodes_by_devices.values())

    @property
    def devices_per_node(self) -> int:
        """Of the largest."""
        return max(self.nodes_by_devices)

    @property
    def count(self) -> int:
        return self.groups(1)

    @property
    def host_memory(self) -> bool:
        """Whether they compute in the memory that states would be offloaded to."""
        return self.accelerator == "cpu"

    def groups(self, size: int) -> int:
        """Of so many devices that must share a node."""
        return sum(nodes * (devices // size) for devices, nodes in self.nodes_by_devices.items())

    def with_nodes(self, nodes: int) -> Devices:
        """So many, all like the largest."""
        return replace(self, nodes_by_devices={self.devices_per_node: nodes})

    def dtype(self, asked: str) -> str:
        """Working precision: what is asked for, or the best of those that the devices compute in.

        Raises:
            PlanError: they do not compute in what is asked for.
        """
        if asked == "auto":
            return next(dtype for dtype in DTYPES[self.accelerator] if dtype in self.platforms)
        if asked not in self.platforms:
            known = " or ".join(self.platforms)
            raise PlanError(f"train.dtype={asked} is not for {self.name}", f"use {known}, or auto")
        return asked

    def __str__(self) -> str:
        each = " or ".join(str(devices) for devices in sorted(self.nodes_by_devices, reverse=True))
        return f"{self.nodes} x {each} {self.name} of {self.memory_bytes / _GIB:.0f} GiB"


def of_pool(pool: Pool) -> Devices:
    """
    Raises:
        UserError: the pool does not say how much memory a device has.
    """
    figures = pool.figures
    return Devices(
        name=pool.name,
        accelerator=pool.accelerator,
        nodes_by_devices={pool.devices_per_node: pool.nodes},
        memory_bytes=int(required(pool, "memory_gib", "planning") * _GIB),
        platforms={dtype: figures.platform(dtype) for dtype in figures.tflops},
        price_per_device_hour=pool.price_per_device_hour,
        figures=figures,
    )


def of_live(pool: NodePool, cpus_per_worker: float) -> Devices:
    """The nodes of a cluster, by what was measured of them."""
    dtypes = [dtype for dtype in DTYPES[pool.accelerator] if dtype != "bf16" or pool.bf16]
    return Devices(
        name=pool.accelerator,
        accelerator=pool.accelerator,
        nodes_by_devices=Counter(pool.devices_by_node(cpus_per_worker)),
        memory_bytes=pool.memory_per_device(cpus_per_worker),
        platforms={dtype: platform_of(pool, dtype) for dtype in dtypes},
    )
