"""Document numbers: the unit in the upper 32 bits, the row in the unit's file below. Their order is the corpus's."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)
"""A number, or uint64 numbers of any shape."""


def number_of(unit: int, rows: np.ndarray) -> np.ndarray:
    """uint64 numbers of rows of a unit."""
    return np.uint64(unit << 32) | rows.astype(np.uint64)


def unit_of(number: Number) -> Number:
    return number >> 32


def row_of(number: Number) -> Number:
    return number & 0xFFFFFFFF
