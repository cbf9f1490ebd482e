"""Devices that compute wrong numbers, at several ranks under torchrun, without Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.engine.cases import Case
from tests.engine.launching import torchrun

FAULT_STEP, EVERY = 4, 3
THREE, FOUR = Case(shares=(1, 1, 1)), Case(shares=(1, 1, 1, 1))
TENSOR, PIPELINE = Case(shares=(1, 1), tensor=2, zero=1), Case(shares=(1, 1), stages=(2, 2), zero=1)


# A bit that flips once stays flipped in ZeRO-0 only: from ZeRO-1 on the next update writes the working parameters anew.


def trial(case: Case, kind: str = "", rank: int = 0, every: int = EVERY, steps: int = 10) -> dict[str, Any]:
    return {"case": asdict(case), "kind": kind, "rank": rank, "step": FAULT_STEP, "every": every, "steps": steps}


def tried(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return torchrun("integrity_rank.py", Case(**trials[0]["case"]).ranks, json.dumps(trials))


def assert_named(result: dict[str, Any], ranks: list[int], sure: bool = True) -> None:
    verdict = result["verdict"]
    assert verdict, "not found"
    assert verdict["step"] - FAULT_STEP < EVERY
    assert [(suspect["rank"], suspect["sure"]) for suspect in verdict["suspects"]] == [(rank, sure) for rank in ranks]
    for rank in ranks:
        assert f"rank {rank} on host-{rank}" in verdict["message"]


def assert_calm(result: dict[str, Any], unchecked: dict[str, Any] | None = None) -> None:
    assert result["verdict"] is None, result["verdict"]
    assert result["broken"] is None
    assert unchecked is None or result["losses"] == unchecked["losses"], "checks leave training as it is, to the bit"


def test_three_replicas_name_the_one_that_is_wrong() -> None:
    bf16, three = Case(shares=(1, 1, 1), dtype="bf16"), Case(shares=(1, 1, 1), zero=3)
    results = tried(
        [
            trial(THREE, "linear", 1),
            trial(three, "linear", 2),
            trial(bf16, "linear", 0),
            trial(THREE, "stuck bit", 2),
            trial(Case(shares=(1, 1, 1), zero=0), "bit", 0),
            trial(THREE, "poison", 1),
            trial(THREE, every=0),
            trial(THREE),
            trial(three),
        ]
    )
    for result, rank in zip(results, (1, 2, 0, 2, 0), strict=False):
        assert_named(result, [rank])
    assert results[5]["broken"] == ["rank 1 on host-1, gradient of model.decoder.layers.0.self_attn.k_proj.weight"]
    assert_calm(results[7], unchecked=results[6])
    assert_calm(results[8])


def test_fifty_steps_raise_no_false_alarm() -> None:
    cases = [THREE, Case(shares=(1, 1, 1), dtype="bf16"), Case(shares=(1, 1, 1), zero=1, dtype="bf16")]
    for result in tried([trial(case, every=2, steps=52) for case in cases]):
        assert len(result["losses"]) == 50
        assert_calm(result)


def test_two_replicas_of_several_ranks_name_the_rank_that_is_wrong() -> None:
    """Between two there is no majority: what decides is who contradicts itself, or the host's processor."""
    results = tried(
        [
            trial(TENSOR, "linear", 1),
            trial(TENSOR, "sometimes", 3),
            trial(TENSOR, "stuck bit", 2),
            trial(PIPELINE, "linear", 3),
            trial(PIPELINE, "sometimes", 0),
            trial(FOUR, "linear", 3),
            trial(PIPELINE, "stuck bit", 2),
            trial(TENSOR, "poison", 2),
            trial(PIPELINE, "poison", 2),
            trial(TENSOR, every=0),
            trial(TENSOR),
            trial(PIPELINE, every=0),
            trial(PIPELINE),
        ]
    )
    for result, rank in zip(results, (1, 3, 2, 3, 0, 3), strict=False):
        assert_named(result, [rank])
    assert_named(results[6], [2, 3], sure=False)
    parameter = "self_attn.k_proj.weight"
    assert results[7]["broken"] == [f"rank 2 on host-2, gradient of model.decoder.layers.0.{parameter}"]
    assert results[8]["broken"] == [f"rank 2 on host-2, gradient of model.decoder.layers.2.{parameter}"]
    assert_calm(results[10], unchecked=results[9])
    assert_calm(results[12], unchecked=results[11])


def test_a_linear_layer_is_judged_by_the_host() -> None:
    import torch

    from orchestrator.train.integrity import linear_error

    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        values, weight = torch.randn(2, 5, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype)
        bias = torch.randn(48, dtype=dtype)
        output = torch.nn.functional.linear(values, weight, bias)
        assert linear_error(values, weight, bias, output) < rounding
        output[1, 2, 3] += 16
        assert linear_error(values, weight, bias, output) > 0.1
        output[1, 2, 3] = torch.nan
        assert linear_error(values, weight, bias, output) == float("inf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_flipped_bit_changes_the_checksum_and_any_element_the_measure(dtype: str) -> None:
    import torch

    from orchestrator.train.integrity import checksum, measure

    kind = getattr(torch, dtype)
    values = torch.randn(1000, dtype=kind)
    before, projection = checksum([values]), measure(values)[0]
    bits = values.view(torch.int32 if kind.itemsize == 4 else torch.int16)
    for bit in range(kind.itemsize * 8 - 1):
        bits[7] ^= 1 << bit
        assert checksum([values]) != before, bit
        bits[7] ^= 1 << bit
    assert checksum([values]) == before
    values[7] += 1
    assert abs(measure(values)[0] - projection) == pytest.approx(1.0, rel=0.05)
