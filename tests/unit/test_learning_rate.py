from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.train.learning_rate import learning_rate
from orchestrator.train_config import TrainConfig

DECAYING = ("linear", "cosine", "wsd")


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 100, "lr": 1.0, "sequence_length": 8, **values})


def rates(schedule: str, **values: Any) -> list[float]:
    chosen = config(schedule=schedule, **values)
    return [learning_rate(chosen, step) for step in range(1, chosen.steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", *DECAYING])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(schedule, warmup_steps=10)[:10] == pytest.approx([n / 10 for n in range(1, 11)])


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("warmup", [0, 10])
def test_decay_ends_at_its_final_share(schedule: str, warmup: int) -> None:
    found = rates(schedule, warmup_steps=warmup)
    assert found[-1] == pytest.approx(0.1)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert rates(schedule, warmup_steps=warmup, final_lr_share=0)[-1] == pytest.approx(0, abs=1e-12)


def test_half_way_is_half_way() -> None:
    assert rates("linear", warmup_steps=10)[54] == pytest.approx(0.55)
    assert rates("cosine", warmup_steps=10)[54] == pytest.approx(0.55)


def test_constant_stays() -> None:
    assert set(rates("constant", warmup_steps=10)[10:]) == {1.0}


def test_wsd_stays_until_its_decay_and_falls_by_the_root_of_the_progress() -> None:
    found = rates("wsd", warmup_steps=10, decay_steps=16, final_lr_share=0)
    assert found[9:84] == [1.0] * 75
    assert [found[84 + n] for n in (4, 9)] == pytest.approx([1 - (5 / 16) ** 0.5, 1 - (10 / 16) ** 0.5])
    assert rates("wsd")[:80] == [1.0] * 80, "a fifth of the run decays"
    assert rates("wsd")[80] < 1


def test_a_longer_wsd_run_has_the_same_rates_up_to_the_decay() -> None:
    assert rates("wsd", warmup_steps=10, decay_steps=20)[:80] == rates("wsd", warmup_steps=10, steps=200)[:80]


def test_by_tokens_a_ramp_of_the_batch_is_a_slower_start() -> None:
    """40 steps of 2 sequences and 60 of 10 are 680 sequences of 8 tokens; half of the tokens are seen at step 66."""
    ramp: dict[str, Any] = {"batch_ramp": [{"steps": 40, "sequences": 2}], "global_batch_size": 10}
    found = rates("linear", warmup_tokens=80 * 8, final_lr_share=0, **ramp)
    assert found[:40] == pytest.approx([n / 40 for n in range(1, 41)])
    assert found[40:] == pytest.approx([1 - n / 60 for n in range(1, 61)])
    decayed = rates("wsd", decay_tokens=100 * 8, **ramp)
    assert decayed[89] == 1
    assert decayed[90] < 1
    assert decayed[-1] == pytest.approx(0.1)


def test_without_a_ramp_tokens_and_steps_are_the_same() -> None:
    by_tokens = rates("cosine", warmup_tokens=10 * 4 * 8, global_batch_size=4)
    assert by_tokens == pytest.approx(rates("cosine", warmup_steps=10, global_batch_size=4))


def test_tokens_are_those_of_the_data_order() -> None:
    ramp = [{"steps": 3, "sequences": 2}, {"steps": 2, "sequences": 5}]
    chosen = config(batch_ramp=ramp, global_batch_size=7)
    batches = (*(Batches(stretch.sequences, stretch.steps) for stretch in chosen.batch_ramp), Batches(7))
    order = Order(pools=(Pool(0, 99),), stages=(Stage((1.0,)),), batches=batches, seed=0, block=8)
    assert [chosen.tokens(step) for step in range(12)] == [order.position(step + 1) * 8 for step in range(12)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"warmup_steps": 5, "warmup_tokens": 5}, "a schedule goes by tokens or by steps, not by both"),
        ({"schedule": "wsd", "warmup_steps": 5, "decay_tokens": 5}, "decay_tokens beside warmup_steps"),
        ({"warmup_steps": 101}, "warmup_steps=101: longer than the run, which has 100 steps"),
        ({"warmup_tokens": 10**7}, "warmup_tokens=10000000: longer than the run, which has 204800 tokens"),
        ({"schedule": "wsd", "warmup_steps": 60, "decay_steps": 41}, "warmup_steps=60 and decay_steps=41: longer"),
        ({"decay_steps": 5}, "decay_steps is for schedule=wsd, and does nothing with schedule=linear"),
        ({"schedule": "constant", "final_lr_share": 0.5}, "final_lr_share does nothing with schedule=constant"),
        ({"final_lr_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**values)
