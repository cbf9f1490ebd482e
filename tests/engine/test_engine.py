"""The engine and its checkpoints at several ranks, under torchrun, without Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from orchestrator.data.schedule import Role
from tests.engine.cases import CONFIG, SAVED, SCHEDULE, STEPS, UNTRAINED, Case, model, share_of
from tests.engine.launching import torchrun

ALIKE = {ranks: (1,) * ranks for ranks in (1, 2, 3, 4)}
UNLIKE = (2, 1, 1)

Losses = dict[int, tuple[float, float]]
"""(loss, gradient norm) by step."""


def trained(directory: str, *cases: Case) -> list[dict[str, Any]]:
    """What became of each case; all are of one world size, and share the seconds that a start takes."""
    return torchrun("rank.py", cases[0].ranks, directory, json.dumps([asdict(case) for case in cases]))


def losses_of(result: dict[str, Any]) -> Losses:
    return {int(step): tuple(pair) for step, pair in result["losses"].items()}


def assert_alike(found: Losses, expected: Losses, rel: float, what: object) -> None:
    assert found.keys() == expected.keys(), what
    for step, pair in found.items():
        assert pair == pytest.approx(expected[step], rel=rel), f"{what}, step {step}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def first_attempts(checkpoints: str) -> list[dict[str, Any]]:
    """Two ranks, ZeRO-2, every step, with two checkpoints; then another attempt at the second of these."""
    return trained(
        checkpoints,
        Case(shares=ALIKE[2], save=(UNTRAINED, SAVED)),
        Case(shares=ALIKE[2], last=SAVED, save=(SAVED,), attempt=2),
    )


@pytest.fixture(scope="module")
def undisturbed(first_attempts: list[dict[str, Any]]) -> Losses:
    return losses_of(first_attempts[0])


def test_the_schedule_has_steps_of_every_kind() -> None:
    def shares(step: int, of: tuple[int, ...]) -> list[Any]:
        return [share_of(step, Role(rank, of)) for rank in range(len(of))]

    trained = [step for step in range(1, STEPS + 1) if SCHEDULE.targets(step)]
    assert trained == [2, 3, 4, 6, 7, 8, 9], "the first is passed over, and the one before the second checkpoint"
    assert [SCHEDULE.order.batch_size(step) for step in trained] == [2, 2, 8, 8, 5, 5, 5]
    assert [len(share.tokens) for share in shares(2, ALIKE[3])] == [0, 1, 1], "a rank has nothing to give"
    assert [len(share.tokens) for share in shares(6, UNLIKE)] == [4, 2, 2]
    assert [share.counted is None for share in shares(3, ALIKE[2])] == [False, True], "excluded on one rank only"
    assert not shares(7, ALIKE[4])[1].counted.any(), "all that a rank has is excluded"


def test_losses_equal_a_plain_transformers_loop(undisturbed: Losses) -> None:
    import torch

    reference = model()
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=CONFIG.weight_decay
    )
    plain = {}
    for step in undisturbed:
        share = share_of(step, Role(0, ALIKE[1]))
        assert share.tokens is not None
        tokens = torch.from_numpy(share.tokens.astype(np.int64))
        labels = tokens if share.counted is None else tokens.masked_fill(~torch.from_numpy(share.counted), -100)
        loss = reference(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.clip_norm)
        optimizer.step()
        plain[step] = (loss.item(), norm.item())
    assert_alike(undisturbed, plain, 1e-4, "2 ranks")
    assert undisturbed[STEPS][0] < undisturbed[2][0], "it learns"


def test_resuming_at_the_same_world_size_is_bitwise_equal(checkpoints: str, undisturbed: Losses) -> None:
    """After a step that was passed over, too: Adam's bias correction goes by updates, not by steps."""
    cases = [Case(shares=ALIKE[2], load=step) for step in (SAVED, UNTRAINED)]
    for case, result in zip(cases, trained(checkpoints, *cases), strict=True):
        assert losses_of(result) == {step: pair for step, pair in undisturbed.items() if step > case.load}, case


@pytest.mark.parametrize(
    "cases",
    [
        [Case(shares=ALIKE[1]), Case(shares=ALIKE[1], zero=1), Case(shares=ALIKE[1], load=SAVED)],
        [Case(shares=ALIKE[2], zero=1), Case(shares=ALIKE[2], zero=1, load=SAVED)],
        [
            Case(shares=ALIKE[3]),
            Case(shares=ALIKE[3], zero=1, micro_batch=1),
            Case(shares=ALIKE[3], load=SAVED),
            Case(shares=UNLIKE),
            Case(shares=UNLIKE, zero=1, micro_batch=1),
            Case(shares=UNLIKE, load=UNTRAINED),
        ],
        [Case(shares=ALIKE[4], zero=1), Case(shares=ALIKE[4], zero=1, load=SAVED)],
    ],
    ids=["1 rank", "2 ranks", "3 ranks", "4 ranks"],
)
def test_every_layout_trains_alike_to_rounding(checkpoints: str, undisturbed: Losses, cases: list[Case]) -> None:
    """From the beginning and from what another layout saved: shares, micro-batches and ZeRO stage are no matter."""
    for case, result in zip(cases, trained(checkpoints, *cases), strict=True):
        expected = {step: pair for step, pair in undisturbed.items() if step > case.load}
        assert_alike(losses_of(result), expected, 1e-5, case)


def test_a_replaced_attempt_cannot_commit(checkpoints: str, first_attempts: list[dict[str, Any]]) -> None:
    from orchestrator.train.checkpoints import read_commit

    assert "committed by another attempt" in first_attempts[1]["refused"]
    assert read_commit(checkpoints, SAVED).attempt == 1
