from __future__ import annotations

import pytest

from orchestrator.config import TrainConfig
from orchestrator.train.learning_rate import learning_rate


def rates(schedule: str, steps: int = 100, warmup: int = 10) -> list[float]:
    config = TrainConfig.model_validate({"steps": steps, "lr": 1.0, "warmup_steps": warmup, "schedule": schedule})
    return [learning_rate(config, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(schedule)[:10] == pytest.approx([n / 10 for n in range(1, 11)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_a_tenth(schedule: str) -> None:
    found = rates(schedule)
    assert found[-1] == pytest.approx(0.1)
    assert found[9:] == sorted(found[9:], reverse=True)
    assert rates(schedule, warmup=0)[-1] == pytest.approx(0.1)


def test_half_way_is_half_way() -> None:
    assert rates("linear")[54] == pytest.approx(0.55)
    assert rates("cosine")[54] == pytest.approx(0.55)


def test_constant_stays() -> None:
    assert set(rates("constant")[10:]) == {1.0}
