"""Bytes that a rank holds of weights, gradients and optimizer states, counted storage by storage. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Counters and flags, of one element each, do not count."""

    weights: int
    """In working precision; of ZeRO-3 this rank's part."""
    fetched: int
    """Weights that ZeRO-3 has gathered for the time being."""
    gradients: int
    """All else that was found: whatever DeepSpeed keeps beside weights, optimizer and buckets is of gradients."""
    optimizer: int
    """fp32 masters and moments. Masters that are the weights themselves count as weights."""
    buckets: int
    """That gradients are reduced in."""

    @property
    def total(self) -> int:
        """Of what stays: without buckets and fetched weights."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(engine: Any) -> StateBytes:
    """Of what a DeepSpeed engine holds at the moment, by the storages of all tensors that its module's parameters and
    its optimizer lead to. What else is in the process, activations above all, is not looked at.

    Args:
        engine: of DeepSpeed, at any stage of ZeRO.
    """
    zero = engine.optimizer
    adam = getattr(zero, "optimizer", zero)
    parameters = list(engine.module.parameters())
    readable = _storages([parameters], deep=False)
    weights = _storages([getattr(p, "ds_tensor", None) for p in parameters], deep=False) or readable
    optimizer = _storages([[group["params"] for group in adam.param_groups], *_held_states(zero, adam)], deep=False)
    buckets = _storages([getattr(bucket, "buffer", None) for bucket in _buckets(zero)], deep=False)
    everything = _storages([parameters, zero, adam], deep=True)
    masters = optimizer.keys() - weights.keys()
    known = weights.keys() | readable.keys() | masters | buckets.keys()
    return StateBytes(
        weights=sum(weights.values()),
        gradients=sum(size for place, size in everything.items() if place not in known),
        optimizer=sum(optimizer[place] for place in masters),
        fetched=sum(size for place, size in readable.items() if place not in weights),
        buckets=sum(buckets.values()),
    )


def _held_states(zero: Any, adam: Any) -> Iterator[Any]:
    """ZeRO-3 hands its masters to the optimizer only while that updates them."""
    yield list(adam.state)
    yield list(adam.state.values())
    yield getattr(zero, "fp32_partitioned_groups_flat", None)


def _buckets(zero: Any) -> Iterable[Any]:
    found: Mapping[Any, Any] = getattr(zero, "ipg_buckets", {})
    return found.values()


def _storages(roots: Iterable[Any], deep: bool) -> dict[int, int]:
    """Bytes by address.

    Args:
        deep: whether gradients and attributes of tensors, and objects of DeepSpeed, are followed.
    """
    found: dict[int, int] = {}
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # and kept, so that no other gets its id
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() and storage.nbytes() > item.element_size():  # on the meta device nothing is held
                found[storage.data_ptr()] = storage.nbytes()
            waiting += [item.grad if item.is_leaf else None, *vars(item).values()] if deep else []
        else:
            waiting += _inside(item, deep)
    return found


def _inside(item: Any, deep: bool) -> list[Any]:
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    if deep and type(item).__module__.startswith("deepspeed.") and not isinstance(item, torch.nn.Module):
        return list(vars(item).values()) if hasattr(item, "__dict__") else []
    return []
