"""A rank that is slow holds all of them up alike; its forward pass gives it away."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.engine.cases import Case
from tests.engine.launching import torchrun

DELAY_S = 0.03
"""Of rank 1, for every sequence: many times what the forward pass takes."""
LAYOUTS = {
    "replicas with unequal shares": Case(shares=(1, 2)),
    "pipeline": Case(shares=(1,), stages=(2, 2), zero=1),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """Medians over some steps, by layout: the forward pass of a sequence as every rank knows it, and its own step."""
    cases = json.dumps([asdict(case) for case in LAYOUTS.values()])
    return dict(zip(LAYOUTS, torchrun("straggler_rank.py", 2, str(DELAY_S), cases), strict=True))


@pytest.mark.parametrize("layout", ["replicas with unequal shares", "pipeline"])
def test_the_forward_pass_tells_who_is_slow(measured: dict[str, dict[str, Any]], layout: str) -> None:
    fast, slow = measured[layout]["forward_s"]
    assert slow > DELAY_S and slow > 1.5 * fast
    assert max(measured[layout]["step_s"]) < 1.5 * min(measured[layout]["step_s"]), "the step is as long for both"
