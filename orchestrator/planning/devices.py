"""Like devices that a layout may be laid over, whether a cluster file tells of them or a live cluster has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.accelerators import NodePool
from orchestrator.errors import PlanError
from orchestrator.planning.cluster_file import Pool, required
from orchestrator.planning.platform import Device, Platform
from orchestrator.planning.search import DTYPES
from orchestrator.planning.throughput import platform_of

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Devices:
    name: str
    accelerator: str
    nodes: int
    devices_per_node: int
    memory_bytes: int
    """Of each."""
    platforms: Mapping[str, Platform]
    """By the dtypes that they compute in."""
    price_per_device_hour: float = 0.0
    figures: Device | None = None
    """That the platforms are made from, of a cluster file."""

    @property
    def count(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def host_memory(self) -> bool:
        """Whether they compute in the memory that states would be offloaded to."""
        return self.accelerator == "cpu"

    def groups(self, size: int) -> int:
        """Of so many devices that must share a node."""
        return self.nodes * (self.devices_per_node // size)

    def dtype(self, asked: str) -> str:
        """Working precision: what is asked for, or the best of those that the devices compute in.

        Raises:
            PlanError: they do not compute in what is asked for.
        """
        if asked == "auto":
            return next(dtype for dtype in DTYPES[self.accelerator] if dtype in self.platforms)
        if asked not in self.platforms:
            known = " or ".join(self.platforms)
            raise PlanError(f"no speed is known of {self.name} in {asked}", f"use train.dtype {known}, or auto")
        return asked

    def __str__(self) -> str:
        return f"{self.nodes} x {self.devices_per_node} {self.name} of {self.memory_bytes / _GIB:.0f} GiB"


def of_pool(pool: Pool) -> Devices:
    """
    Raises:
        UserError: the pool does not say how much memory a device has.
    """
    figures = pool.figures
    return Devices(
        name=pool.name,
        accelerator=pool.accelerator,
        nodes=pool.nodes,
        devices_per_node=pool.devices_per_node,
        memory_bytes=int(required(pool, "memory_gib", "planning") * _GIB),
        platforms={dtype: figures.platform(dtype) for dtype in figures.tflops},
        price_per_device_hour=pool.price_per_device_hour,
        figures=figures,
    )


def of_live(pool: NodePool, cpus_per_worker: float) -> Devices:
    """Nodes of unlike sizes count with as many devices as the smallest."""
    dtypes = [dtype for dtype in DTYPES[pool.accelerator] if dtype != "bf16" or pool.bf16]
    return Devices(
        name=pool.accelerator,
        accelerator=pool.accelerator,
        nodes=len(pool.nodes),
        devices_per_node=min(pool.devices_by_node(cpus_per_worker)),
        memory_bytes=pool.memory_per_device(cpus_per_worker),
        platforms={dtype: platform_of(pool, dtype) for dtype in dtypes},
    )
