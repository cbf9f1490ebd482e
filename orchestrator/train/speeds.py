"""What a device does in a second: matrix products by dtype, and copies within its memory."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

SMALLEST = 256
LARGEST = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices."""
LONG_ENOUGH_S = {"cpu": 4e-4, "cuda": 1e-3}
"""For one product: long against the time of starting it, and short against the time slices of a busy machine, so that
some repetition is left alone."""
REPETITIONS = 100
AT_MOST_S = 0.1
"""For the repetitions of one measurement."""
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""More than a cache holds."""
PARTS = {"cpu": 16, "cuda": 1}
"""In which it is copied, one after the other: short, as products are."""


@dataclass(frozen=True, order=True)
class Rate:
    """A second."""

    best: float
    median: float


def matrix_flops(device: torch.device, dtype: torch.dtype) -> Rate:
    """Floating-point operations in products of square matrices, of a size that fits the device."""
    for size in _sizes(device):
        product = _product(device, dtype, size)
        took = min(seconds(device, product, 3))
        if took > LONG_ENOUGH_S[device.type]:
            break
    return _repeated(device, product, size, took)


def matrix_flops_by_size(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """(best, median) of operations a second by the number of rows, up to one of which a product takes long.

    Empty where the device has no kernels for them."""
    found: dict[str, tuple[float, float]] = {}
    for size in _sizes(device):
        try:
            product = _product(device, dtype, size)
            took = min(seconds(device, product, 3))
            rate = _repeated(device, product, size, took)
        except RuntimeError:
            return {}
        found[str(size)] = (rate.best, rate.median)
        if took > AT_MOST_S:
            break
    return found


def memory_bandwidth(device: torch.device) -> Rate:
    """Bytes read and written by a copy."""
    size = min(COPIED_BYTES[device.type], free_bytes(device) // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    part = size // PARTS[device.type]
    parts = list(zip(torch.split(target, part), torch.split(source, part), strict=True))
    every = [took for to, of in parts * 4 for took in seconds(device, functools.partial(to.copy_, of), 1)]
    return _rate(2 * part, every)


def _product(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], object]:
    random = torch.Generator().manual_seed(size)
    left, right = (torch.randn((size, size), generator=random).to(device, dtype) for _ in range(2))
    result = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=result)


def _repeated(device: torch.device, product: Callable[[], object], size: int, took_s: float) -> Rate:
    repetitions = max(3, min(REPETITIONS, int(AT_MOST_S / took_s)))
    return _rate(2 * size**3, seconds(device, product, repetitions))


def seconds(device: torch.device, work: Callable[[], object], repetitions: int) -> list[float]:
    """Of each repetition, until the device is done."""
    return list(_timed(device, work, repetitions))


def _timed(device: torch.device, work: Callable[[], object], repetitions: int) -> Iterator[float]:
    for _ in range(repetitions):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        yield time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(amount: float, took: list[float]) -> Rate:
    return Rate(best=amount / min(took), median=amount / statistics.median(took))


def _sizes(device: torch.device) -> Iterator[int]:
    """Of which three matrices in fp32 take no more than a quarter of the free memory."""
    size, most = SMALLEST, min(LARGEST[device.type], math.isqrt(free_bytes(device) // 4 // 12))
    while size == SMALLEST or size <= most:
        yield size
        size *= 2


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
