"""What preflight measured on each node, and what of it speaks against one. Pure: no device, socket or clock.

Machines are shared, and a measurement may fall into a busy moment. What load cannot explain counts at once; what it can
explain is in doubt until a second look, and even then only a clear outlier counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from orchestrator.errors import StorageError

FEWEST_ALIKE = 3
"""Nodes of which one can be called an outlier. Without it, two thirds or more of the devices are left: more than a
group keeps in which all wait for one at less than SLOW."""
SLOW = 0.6
"""Of the median of like nodes."""
SLOW_SHARED = 0.4
"""The same of CPUs, whose cores and memory are shared: with a busy neighbour on the same core one does half."""
SLOW_LINK = 0.25
"""Of the median of the nodes' fastest links: a network is shared by more than one cluster."""


@dataclass(frozen=True, kw_only=True)
class DeviceResult:
    device: int
    name: str = ""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Of matrix products a second, by dtype: the best repetition."""
    typical_flops: Mapping[str, float] = field(default_factory=dict)
    """The median repetition: far below the best one on a machine that is busy or throttled."""
    bytes_per_s: float = 0.0
    """Read and written by a copy within the device's memory: the best repetition."""
    wrong: tuple[str, ...] = ()
    """What it computed wrong."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Why it does not compute, by dtype."""
    error: str = ""
    """Why it could not be examined at all."""


@dataclass(frozen=True, kw_only=True)
class StorageResult:
    latency_s: float = 0.0
    """Of writing a file of one byte."""
    write_bytes_per_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    accelerator: str
    devices: tuple[DeviceResult, ...] = ()
    storage: StorageResult | None = None
    seconds: float = 0.0
    error: str = ""
    """Why there is no result: it crashed, or gave no answer."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        devices = tuple(DeviceResult(**{**device, "wrong": tuple(device["wrong"])}) for device in values["devices"])
        storage = StorageResult(**values["storage"]) if values["storage"] else None
        return cls(**{**values, "devices": devices, "storage": storage})


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two nodes, over TCP."""

    latency_s: float = 0.0
    """One way."""
    bytes_per_s: float = 0.0
    error: str = ""
    """Why nothing was carried."""


Links = Mapping[tuple[str, str], Link]
"""By the ids of the two nodes."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What speaks against a node."""

    node_id: str
    reason: str
    corrupt: bool = False
    """Whether it computed wrong numbers."""
    doubtful: bool = False
    """Whether a busy moment could explain it, so that a second look is due."""


def judge(results: Mapping[str, NodeResult], links: Links, dtype: str) -> list[Finding]:
    """
    Args:
        results: by node id.
        dtype: in which the plan computes.

    Raises:
        StorageError: no node can write to the storage of the run: that is no fault of a node.
    """
    _check_storage(results)
    found = [finding for node_id, result in results.items() for finding in _alone(node_id, result, dtype)]
    sound = {node_id: result for node_id, result in results.items() if node_id not in {f.node_id for f in found}}
    found += _slow(sound, f"computes {dtype}", "GFLOP/s", lambda device: device.flops.get(dtype, 0.0))
    found += _slow(sound, "copies memory", "GB/s", lambda device: device.bytes_per_s)
    return [*found, *_badly_linked(links)]


def faster(one: NodeResult, other: NodeResult) -> NodeResult:
    """The second of two results of a node, with the better of both speeds: load only ever slows a device down."""
    before = {device.device: device for device in one.devices}
    devices = tuple(_faster(before[d.device], d) if d.device in before else d for d in other.devices)
    return replace(other, devices=devices)


def _faster(one: DeviceResult, other: DeviceResult) -> DeviceResult:
    flops = {dtype: max(value, one.flops.get(dtype, 0.0)) for dtype, value in other.flops.items()}
    return replace(other, flops=flops, bytes_per_s=max(one.bytes_per_s, other.bytes_per_s))


def _check_storage(results: Mapping[str, NodeResult]) -> None:
    tried = [result.storage for result in results.values() if result.storage]
    if tried and all(storage.error for storage in tried):
        hint = "no node can write there: check the path or bucket, its owner and its free space"
        raise StorageError(tried[0].error, hint)


def _alone(node_id: str, result: NodeResult, dtype: str) -> Iterator[Finding]:
    """What needs no comparison with other nodes."""
    if result.error:
        yield Finding(node_id=node_id, reason=result.error)
    if result.storage and result.storage.error:
        yield Finding(node_id=node_id, reason=f"{result.storage.error}, while other nodes can")
    for device in result.devices:
        name = f"device {device.device} ({device.name or result.accelerator})"
        if device.wrong:
            reason = f"{name} computes wrong numbers: {'; '.join(device.wrong)}"
            yield Finding(node_id=node_id, reason=reason, corrupt=True)
        if device.error:
            yield Finding(node_id=node_id, reason=f"{name} cannot be used: {device.error}")
        if dtype in device.unfit:
            yield Finding(node_id=node_id, reason=f"{name} does not compute in {dtype}: {device.unfit[dtype]}")


def _slow(
    results: Mapping[str, NodeResult], does: str, unit: str, speed: Callable[[DeviceResult], float]
) -> Iterator[Finding]:
    """Nodes whose slowest device is far slower than those of its own model in other nodes: another model may be slower,
    and is the planner's business."""
    alike: dict[str, dict[str, float]] = {}
    for node_id, result in results.items():
        for device in result.devices:
            if value := speed(device):
                nodes = alike.setdefault(device.name, {})
                nodes[node_id] = min(value, nodes.get(node_id, value))
    for name, nodes in alike.items():
        median = statistics.median(nodes.values())
        for node_id, value in nodes.items():
            limit = SLOW_SHARED if results[node_id].accelerator == "cpu" else SLOW
            if len(nodes) >= FEWEST_ALIKE and value < limit * median:
                share = f"{value / median:.0%} of the {median / 1e9:,.1f} that {len(nodes)} such nodes have as median"
                reason = f"{name} {does} at {value / 1e9:,.1f} {unit}, {share}"
                yield Finding(node_id=node_id, reason=reason, doubtful=True)


def _badly_linked(links: Links) -> Iterator[Finding]:
    """Nodes whose fastest link is slow: all of their links are, so it is theirs. One slow link of two otherwise well
    linked nodes speaks against neither."""
    best: dict[str, float] = {}
    for pair, link in links.items():
        for node_id in pair:
            best[node_id] = max(link.bytes_per_s, best.get(node_id, 0.0))
    if len(best) < FEWEST_ALIKE:
        return
    median = statistics.median(best.values())
    for node_id, value in best.items():
        if value < SLOW_LINK * median:
            why = next((link.error for pair, link in links.items() if node_id in pair and link.error), "")
            share = f"the fastest link carries {value / 1e9:.3f} GB/s, where {median / 1e9:.3f} is the median"
            yield Finding(node_id=node_id, reason=f"{share}{why and f' ({why})'}", doubtful=True)
