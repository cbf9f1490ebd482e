"""Arithmetic with known answers: a device that computes wrong numbers without an error is found out before it trains.

Matrix products and sums are of integers so small that every partial sum is exact: in any order of addition, in TF32,
with 16-bit accumulators. So one answer is right, and a single wrong element shows; it is found with integer arithmetic,
which is another circuit. Functions whose values are rounded are compared with float64, and with themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT_BITS = {"fp32": 24, "bf16": 8, "fp16": 11}
"""Integers of so many bits are exact."""
FACTOR_BITS = {"fp32": 11, "bf16": 4, "fp16": 5}
"""Of a factor whose products are exact, also in TF32, which has 11 bits of the 24."""
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Relative and absolute, of functions whose values are rounded: several units in the last place."""
SIZES = {"cpu": 256, "cuda": 8192}
"""Rows and columns of the largest product: on a GPU its tiles cover every multiprocessor many times."""
REPEATS = {"cpu": 3, "cuda": 8}
_CHECKED_AT_ONCE = 2**23
"""Elements."""


@dataclass(frozen=True)
class Product:
    """Two factors of integers, int64."""

    name: str
    left: np.ndarray
    right: np.ndarray


def wrong_answers(device: torch.device, dtype: str) -> list[str]:
    """What the device computes wrong in a dtype, in words; empty where all is right.

    Raises:
        RuntimeError: it does not compute in that dtype.
    """
    size = SIZES[device.type]
    random = np.random.default_rng(20)
    found = []
    for product in products(dtype, size, random):
        if told := _repeated(device, functools.partial(wrong_rows, product, device, dtype)):
            sizes = " x ".join(map(str, (*product.left.shape, product.right.shape[1])))
            found.append(f"{product.name} of {sizes} in {dtype}, {told}")
    for terms in _terms(dtype, size, random):
        if told := _repeated(device, functools.partial(_wrong_sums, terms, device, dtype)):
            found.append(f"sum of {' x '.join(map(str, terms.shape))} in {dtype}, {told}")
    return found + list(_wrong_functions(device, dtype, size))


def products(dtype: str, size: int, random: np.random.Generator) -> Iterator[Product]:
    """Sizes from one tile to all of the device, even and odd; factors of few bits that many products add up from, and
    of all bits that one product each comes from."""
    most = 2 ** EXACT_BITS[dtype]
    for rows, inner, columns in (
        (size, 256, size),
        (size // 2, 64, size // 4),
        (129, 67, 61),
        (1, 16, size),
        (31, 5, 3),
    ):
        largest = min(math.isqrt(most // inner), 1024)
        left = random.integers(-largest, largest, (rows, inner), endpoint=True)
        yield Product("matrix product", left, random.integers(-largest, largest, (inner, columns), endpoint=True))
    largest = 2 ** FACTOR_BITS[dtype] - 1
    for rows, inner in ((size // 2, 256), (67, 129)):
        left = random.integers(-largest, largest, (rows, inner), endpoint=True)
        right = np.zeros((inner, inner), dtype=np.int64)
        right[random.permutation(inner), np.arange(inner)] = random.integers(1, largest, inner, endpoint=True)
        yield Product("scaled permutation", left, right)


def wrong_rows(product: Product, device: torch.device, dtype: str) -> int:
    """How many rows of the product come out wrong.

    Integers compare a weighted sum of each row (Freivalds, 1977): weights without a zero find any single wrong element.
    """
    weights = np.arange(product.right.shape[1]) % 31 * 2 + 1
    expected = torch.from_numpy(product.left @ (product.right @ weights)).to(device)
    left, right = (torch.from_numpy(factor).to(device, DTYPES[dtype]) for factor in (product.left, product.right))
    found = torch.matmul(left, right)
    at_once = max(1, _CHECKED_AT_ONCE // found.shape[1])
    parts = zip(torch.split(found, at_once), torch.split(expected, at_once), strict=True)
    on_device = torch.from_numpy(weights).to(device)
    return sum(int(_differs(part, sums, on_device).sum()) for part, sums in parts)


def _differs(found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    whole = found.to(torch.int64)
    return ((whole * weights).sum(1) != expected) | (whole.to(found.dtype) != found).any(1)


def _terms(dtype: str, size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Integers whose sums, over rows and over columns, are exact."""
    most = 2 ** EXACT_BITS[dtype]
    for rows, columns in ((min(size, most), min(size, most)), (127, 61)):
        largest = min(most // max(rows, columns), 1024)
        yield random.integers(-largest, largest, (rows, columns), endpoint=True)


def _wrong_sums(terms: np.ndarray, device: torch.device, dtype: str) -> int:
    values = torch.from_numpy(terms).to(device, DTYPES[dtype])
    return sum(
        int((values.sum(axis).to(torch.int64).cpu() != torch.from_numpy(terms.sum(axis))).sum()) for axis in (0, 1)
    )


def _repeated(device: torch.device, wrong: Callable[[], int]) -> str:
    """Which repetitions had how many wrong results; a fault may come and go."""
    counts = [wrong() for _ in range(REPEATS[device.type])]
    failed = sum(count > 0 for count in counts)
    return f"{max(counts)} wrong results, in {failed} of {len(counts)} tries" if failed else ""


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer norm": lambda values: functional.layer_norm(values, values.shape[-1:]),
    "softmax": lambda values: torch.softmax(values, -1),
    "GELU": functional.gelu,
    "SiLU": functional.silu,
}


def _wrong_functions(device: torch.device, dtype: str, size: int) -> Iterator[str]:
    random = torch.Generator().manual_seed(20)
    values = torch.randn((size, 257), generator=random).to(DTYPES[dtype])
    for name, function in _FUNCTIONS.items():
        expected = function(values.double())
        found = [function(values.to(device)).cpu() for _ in range(REPEATS[device.type])]
        if any(not torch.equal(found[0], again) for again in found[1:]):
            yield f"{name} in {dtype} gives other results for the same numbers"
        limit = TOLERANCE[dtype]
        if not torch.allclose(found[0].double(), expected, rtol=limit, atol=limit):
            error = float((found[0].double() - expected).abs().nan_to_num(nan=math.inf).max())
            yield f"{name} in {dtype} is off by {error:.1e}"
