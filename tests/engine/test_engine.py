"""The engine and its checkpoints at several ranks, under torchrun, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

RANK = Path(__file__).with_name("rank.py")
STEPS, SAVED = 8, 4


def torchrun(ranks: int, *arguments: object) -> dict[int, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(RANK)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))
    return {int(step): value for step, value in json.loads(line.removeprefix("LOSSES")).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def undisturbed(checkpoints: str) -> dict[int, Any]:
    """Two ranks, ZeRO-2, eight steps; a checkpoint after the fourth."""
    return torchrun(2, checkpoints, STEPS, "--save", SAVED)


def after_save(losses: dict[int, Any]) -> list[Any]:
    return [losses[step] for step in range(SAVED + 1, STEPS + 1)]


def test_losses_equal_a_plain_transformers_loop(undisturbed: dict[int, Any]) -> None:
    import torch

    from tests.engine.rank import BATCH, CONFIG, LENGTH, batch, model

    reference = model()
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=CONFIG.weight_decay
    )
    for step in range(1, STEPS + 1):
        tokens = torch.from_numpy(batch(step))
        loss = reference(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.clip_norm)
        optimizer.step()
        assert undisturbed[step] == pytest.approx((loss.item(), norm.item()), rel=1e-4), (step, BATCH, LENGTH)
    assert undisturbed[STEPS][0] < undisturbed[1][0], "it learns"


def test_resuming_at_the_same_world_size_is_bitwise_equal(checkpoints: str, undisturbed: dict[int, Any]) -> None:
    assert after_save(torchrun(2, checkpoints, STEPS, "--load")) == after_save(undisturbed)


@pytest.mark.parametrize(("ranks", "zero"), [(4, 1), (1, 2), (3, 2)])
def test_resuming_at_another_layout_is_equal_to_rounding(
    checkpoints: str, undisturbed: dict[int, Any], ranks: int, zero: int
) -> None:
    resumed = after_save(torchrun(ranks, checkpoints, STEPS, "--load", "--zero", zero))
    for found, expected in zip(resumed, after_save(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_replaced_attempt_cannot_commit(checkpoints: str, undisturbed: dict[int, Any]) -> None:
    before = Path(checkpoints, f"step-{SAVED:08d}", "COMMITTED").read_bytes()
    losses = torchrun(2, checkpoints, SAVED, "--save", SAVED, "--attempt", 2)
    verdict, why = losses[SAVED]
    assert verdict == "refused"
    assert "committed by another attempt" in why
    assert Path(checkpoints, f"step-{SAVED:08d}", "COMMITTED").read_bytes() == before
