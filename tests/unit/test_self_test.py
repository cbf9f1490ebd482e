"""A device that computes wrong numbers without an error, played by a changed torch function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.train import self_test
from orchestrator.train.self_test import EXACT_BITS, products, wrong_answers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sound_device_has_no_wrong_answer(dtype: str) -> None:
    assert wrong_answers(CPU, dtype) == []


@pytest.mark.parametrize("dtype", EXACT_BITS)
@pytest.mark.parametrize("size", [256, 8192])
def test_every_partial_sum_is_an_exact_number(dtype: str, size: int) -> None:
    for product in products(dtype, size, np.random.default_rng(1)):
        left, right = (abs(factor).max() for factor in (product.left, product.right))
        terms = (product.right != 0).sum(0).max()
        assert left * right * terms <= 2 ** EXACT_BITS[dtype]
        assert max(left, right) <= 2 ** min(EXACT_BITS[dtype], 11), "TF32 has 11 bits"


def faulty(change: Callable[[torch.Tensor], None], calls: Callable[[int], bool] = lambda n: True) -> Any:
    """torch.matmul of a device that is broken in some of its calls."""
    sound, count = torch.matmul, itertools.count()

    def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = sound(left, right)
        if calls(next(count)):
            change(result)
        return result

    return matmul


def flip_last_bit(result: torch.Tensor) -> None:
    """Of one element in the middle."""
    bits = result.view({4: torch.int32, 2: torch.int16}[result.element_size()])
    bits[result.shape[0] // 2, result.shape[1] // 2] ^= 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_flipped_bit_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", faulty(flip_last_bit))
    found = wrong_answers(CPU, dtype)
    assert len(found) == len(list(products(dtype, 256, np.random.default_rng(1)))), "each product has one"
    assert found[0] == f"matrix product of 256 x 256 x 256 in {dtype}, 1 wrong results, in 3 of 3 tries"


def test_a_fault_that_comes_and_goes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", faulty(flip_last_bit, calls=lambda number: number == 1))
    assert wrong_answers(CPU, "fp32") == ["matrix product of 256 x 256 x 256 in fp32, 1 wrong results, in 1 of 3 tries"]


def test_numbers_that_are_none_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(result: torch.Tensor) -> None:
        result[0, 0] = torch.nan

    monkeypatch.setattr(torch, "matmul", faulty(spoil))
    assert len(wrong_answers(CPU, "fp32")) == 7


def test_a_broken_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def softmax(values: torch.Tensor) -> torch.Tensor:
        result = torch.softmax(values, -1)
        result[17, 5] += 0 if values.dtype == torch.float64 else 1e-3
        return result

    monkeypatch.setitem(self_test._FUNCTIONS, "softmax", softmax)
    assert wrong_answers(CPU, "fp32") == ["softmax in fp32 is off by 1.0e-03"]


def test_a_function_that_is_not_the_same_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()

    def softmax(values: torch.Tensor) -> torch.Tensor:
        result = torch.softmax(values, -1)
        result[3, 3] += 1e-9 * next(count)
        return result

    monkeypatch.setitem(self_test._FUNCTIONS, "softmax", softmax)
    assert wrong_answers(CPU, "fp32") == ["softmax in fp32 gives other results for the same numbers"]
