"""The engine at several ranks, under torchrun, without Ray: every layout trains as a plain loop over the whole model
does, and goes on from what any other layout saved."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.schedule import Role
from tests.engine.cases import HELD_OUT, LAYERS, SAVED, SCHEDULE, STEPS, UNTRAINED, Case, share_of
from tests.engine.launching import torchrun
from tests.engine.reference import reference

ALIKE = {ranks: (1,) * ranks for ranks in (1, 2, 3, 4)}
UNLIKE = (2, 1, 1)
UNEVEN = (1, 3)
FAMILIES = ("opt", "llama", "qwen2", "qwen3", "mistral")

BF16 = 2**-8
"""A number in bf16 is off by 2**-9 of itself at the most, a logit by a little more; in a mean over targets, of which a
loss is one, roundings are not all to the same side."""
BF16_NORM = 2**-6
"""Roundings of the weights, the activations and the logits all go into a gradient."""

Losses = dict[int, tuple[float, float]]
"""(loss, gradient norm) by step."""


class Runs:
    """What became of cases; those of one batch are of one world size, and share the seconds that a start takes."""

    def __init__(self, directory: Path, batches: Iterable[Iterable[Case]]) -> None:
        self.directory = directory
        self._batches = [tuple(batch) for batch in batches]
        self._done: dict[Case, dict[str, Any]] = {}

    def of(self, case: Case) -> dict[str, Any]:
        batch = next((batch for batch in self._batches if case in batch), None)
        if batch:
            self._batches.remove(batch)  # what fails is not tried again
            told = torchrun("rank.py", case.ranks, str(self.directory), json.dumps([asdict(case) for case in batch]))
            self._done |= dict(zip(batch, told, strict=True))
        return self._done[case]

    def losses(self, case: Case) -> Losses:
        return {int(step): tuple(pair) for step, pair in self.of(case)["losses"].items()}


def by_world_size(cases: Iterable[Case]) -> list[list[Case]]:
    ordered = sorted(dict.fromkeys(cases), key=lambda case: case.ranks)
    return [list(batch) for _, batch in itertools.groupby(ordered, key=lambda case: case.ranks)]


def assert_alike(found: Losses, expected: Losses, case: Case, rel: float) -> None:
    """
    Args:
        rel: of the losses, in fp32 of the norms too.
    """
    assert found.keys() == expected.keys(), case
    for step, (loss, norm) in found.items():
        of_norm = BF16_NORM if rel == BF16 else rel
        assert loss == pytest.approx(expected[step][0], rel=rel), f"{case}, step {step}"
        assert norm == pytest.approx(expected[step][1], rel=of_norm), f"{case}, step {step}, gradient norm"


# --- what is trained --------------------------------------------------------------------------------------------------

SAVERS = {
    case.folder: replace(case, save=(UNTRAINED, SAVED))
    for case in (
        Case(folder="zero-2", shares=ALIKE[2]),
        Case(folder="zero-3", shares=ALIKE[2], zero=3),
        Case(folder="zero-0", shares=ALIKE[2], zero=0),
        Case(folder="tensor", shares=ALIKE[1], tensor=2, zero=1),
        Case(folder="pipeline", shares=ALIKE[1], stages=UNEVEN, zero=1),
        Case(folder="bf16", shares=ALIKE[2], zero=1, dtype="bf16"),
        Case(folder="both", shares=ALIKE[1], stages=UNEVEN, tensor=2, zero=1),
    )
}
REPLACED = Case(folder="zero-2", shares=ALIKE[2], last=SAVED, save=(SAVED,), attempt=2)

LAYOUTS = [
    *SAVERS.values(),
    Case(shares=ALIKE[1]),
    Case(shares=ALIKE[1], zero=1, recompute=True),
    Case(shares=ALIKE[2], zero=1, offload=True),
    Case(shares=ALIKE[2], zero=2, offload=True),
    Case(shares=ALIKE[2], zero=3, offload=True),
    Case(shares=ALIKE[2], zero=3, recompute=True),
    Case(shares=ALIKE[1], stages=(3, 1), zero=1, recompute=True),
    Case(shares=ALIKE[3], zero=1, micro_batch=1),
    Case(shares=UNLIKE),
    Case(shares=UNLIKE, zero=3),
    Case(shares=ALIKE[1], stages=(1, 2, 1), zero=1),
    Case(shares=ALIKE[4], zero=1),
    Case(shares=(2, 1), stages=UNEVEN, zero=1, micro_batch=1),
    *(Case(shares=ALIKE[2], tensor=2, zero=stage, recompute=stage == 2) for stage in (1, 2, 3)),
]
APART = [
    *(Case(shares=ALIKE[2], zero=stage, apart=True) for stage in (0, 1, 2, 3)),
    Case(shares=ALIKE[1], tensor=2, zero=1, apart=True, recompute=True),
    Case(shares=ALIKE[1], stages=UNEVEN, zero=1, apart=True),
    Case(shares=ALIKE[2], apart=True, family="mistral"),
]
OF_FAMILIES = [
    case
    for family in FAMILIES
    for case in (
        Case(shares=ALIKE[2], zero=3, family=family),
        Case(shares=ALIKE[1], stages=UNEVEN, tensor=2, zero=1, family=family),
    )
]
IN_BF16 = [
    *(Case(shares=ALIKE[2], zero=stage, dtype="bf16") for stage in (2, 3)),
    Case(shares=ALIKE[1], tensor=2, zero=1, dtype="bf16"),
    Case(shares=ALIKE[1], stages=UNEVEN, zero=1, dtype="bf16"),
    SAVERS["bf16"],
]
UPDATES_DROPPED = [
    replace(case, family="llama", folder="checkpoints", save=(), dropped=(3, 6), poisoned=(4, 8))
    for case in (
        *(Case(shares=ALIKE[2], zero=stage) for stage in (0, 1, 2, 3)),
        *(Case(shares=ALIKE[2], zero=stage, offload=True) for stage in (1, 2, 3)),
        Case(shares=ALIKE[2], zero=1, dtype="bf16"),
        SAVERS["tensor"],
        SAVERS["pipeline"],
        Case(shares=ALIKE[2], tensor=2, zero=1),
        Case(shares=ALIKE[2], stages=UNEVEN, zero=1),
    )
]
IN_FP32 = [case for case in LAYOUTS if case.dtype == "fp32"]
FROM_THE_BEGINNING = [*LAYOUTS, *APART, *OF_FAMILIES, *IN_BF16, *UPDATES_DROPPED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = [*FROM_THE_BEGINNING, REPLACED]
    return Runs(tmp_path_factory.mktemp("engine"), by_world_size(cases))


def name(case: Case) -> str:
    """What is not as usual."""
    usual = asdict(Case(shares=(), folder=case.folder if not case.load else ""))
    values = {key: value for key, value in asdict(case).items() if value != usual[key] and key != "save"}
    return " ".join(f"{key}={value}" for key, value in values.items())


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=name)


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
    assert shares(HELD_OUT, ALIKE[2])[0].counted is not None
    assert len({len(share.tokens) for share in shares(HELD_OUT, ALIKE[2])}) == 2


def test_the_reference_learns_and_documents_apart_are_another_matter() -> None:
    together, apart = reference(), reference(apart=True)
    assert together.losses[STEPS][0] < together.losses[2][0]
    assert all(together.losses[step] != apart.losses[step] for step in together.losses)


@each([*IN_FP32, *APART, *OF_FAMILIES])
def test_losses_and_gradient_norms_equal_a_plain_transformers_loop(runs: Runs, case: Case) -> None:
    assert_alike(runs.losses(case), reference(case.family, case.apart).losses, case, 1e-5)
    assert all(runs.of(case)["applied"].values())
    assert not any(runs.of(case)["broken"].values())


@each(IN_BF16)
def test_bf16_differs_from_fp32_by_its_roundings(runs: Runs, case: Case) -> None:
    assert_alike(runs.losses(case), reference().losses, case, BF16)


@each([*IN_FP32, *APART, *IN_BF16])
def test_losses_of_samples_come_in_the_order_of_the_batch(runs: Runs, case: Case) -> None:
    expected = reference(case.family, case.apart).sequences
    found = {int(step): losses for step, losses in runs.of(case)["sequences"].items()}
    assert found.keys() == expected.keys()
    rel = 4 * BF16 if case.dtype == "bf16" else 1e-5  # of a few targets, sometimes
    for step, losses in found.items():
        assert losses == pytest.approx(expected[step], rel=rel), f"step {step}"


@each([*IN_FP32, *APART, *OF_FAMILIES, *IN_BF16])
def test_held_out_losses_equal_a_plain_loop(runs: Runs, case: Case) -> None:
    total, targets = runs.of(case)["held_out"]
    expected, number = reference(case.family, case.apart).held_out
    assert targets == number
    assert total == pytest.approx(expected, rel=BF16 if case.dtype == "bf16" else 1e-5)


@each(UPDATES_DROPPED)
def test_a_dropped_update_leaves_no_trace(runs: Runs, case: Case) -> None:
    """Neither one that is not accepted nor one of a gradient that is not finite, which is dropped in any case."""
    told = runs.of(case)
    assert [int(step) for step, applied in told["applied"].items() if not applied] == sorted(
        case.dropped + case.poisoned
    )
    clean = {step: pair for step, pair in runs.losses(case).items() if step not in case.poisoned}
    expected = reference("llama", dropped=tuple(sorted(case.dropped + case.poisoned))).losses
    rel = BF16 if case.dtype == "bf16" else 1e-5
    assert_alike(clean, {step: expected[step] for step in clean}, case, rel)


@each(UPDATES_DROPPED)
def test_the_rank_whose_loss_is_not_finite_is_named(runs: Runs, case: Case) -> None:
    """The last replica's: under a pipeline its last stage, under tensor parallelism the first rank of its group."""
    broken = {int(step): ranks for step, ranks in runs.of(case)["broken"].items()}
    expected = case.ranks - case.tensor
    assert broken == {step: [expected] if step in case.poisoned else [] for step in broken}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def loaded(layout: Case, saved: Case, step: int = SAVED, last: int = STEPS) -> Case:
    return replace(layout, folder=saved.folder, save=(), load=step, last=last)


OTHERS = [
    Case(shares=ALIKE[1]),
    Case(shares=ALIKE[2], zero=2, offload=True),
    Case(shares=ALIKE[2], zero=3, dtype="bf16"),
    Case(shares=ALIKE[1], stages=(3, 1), zero=1),
    Case(shares=UNLIKE, zero=3),
    Case(shares=ALIKE[1], stages=(1, 2, 1), zero=1),
    Case(shares=ALIKE[2], tensor=2, zero=3),
]
"""Layouts that checkpoints go on in, besides those that saved them."""
ASIDE = [loaded(saver, saver, step) for saver in SAVERS.values() for step in (SAVED, UNTRAINED)]
PAIRS = [(saver, layout) for saver in SAVERS.values() for layout in (*SAVERS.values(), *OTHERS) if saver != layout]
"""Every kind of checkpoint in every other layout."""
SOME = PAIRS[::4]
"""Each layout and each kind of checkpoint several times."""


@pytest.fixture(scope="module")
def later(runs: Runs) -> Runs:
    """Starts that find the checkpoints there."""
    for saver in SAVERS.values():
        runs.of(saver)
    return Runs(runs.directory, by_world_size([*ASIDE, *(loaded(layout, saver) for saver, layout in SOME)]))


def expected_after(runs: Runs, case: Case) -> Losses:
    return {step: pair for step, pair in runs.losses(SAVERS[case.folder]).items() if case.load < step <= case.last}


@each(ASIDE)
def test_resuming_in_the_same_layout_is_bitwise_equal(runs: Runs, later: Runs, case: Case) -> None:
    """After a step that was passed over, too: Adam's bias correction goes by updates, not by steps."""
    assert later.losses(case) == expected_after(runs, case)


@each(loaded(layout, saver) for saver, layout in SOME)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(runs: Runs, later: Runs, case: Case) -> None:
    in_bf16 = "bf16" in (case.dtype, SAVERS[case.folder].dtype)
    assert_alike(later.losses(case), expected_after(runs, case), case, BF16 if in_bf16 else 1e-5)


def test_a_replaced_attempt_cannot_commit(runs: Runs) -> None:
    from orchestrator.train.checkpoints import read_commit

    assert "has been replaced: its commit of step" in runs.of(REPLACED)["refused"]
    assert read_commit(str(runs.directory / "zero-2"), SAVED).attempt == 1


# --- everything -------------------------------------------------------------------------------------------------------


SOAKED = [
    Case(shares=ALIKE[2], stages=UNEVEN, tensor=2, zero=1),
    Case(shares=ALIKE[2], stages=(2, 2), tensor=2, zero=1, recompute=True),
    *(
        Case(shares=ALIKE[1], family=family, apart=apart, recompute=apart, zero=1, **layout)
        for family in ("galactica", *FAMILIES)
        for apart in (False, True)
        for layout in ({"tensor": 2}, {"stages": UNEVEN}, {"stages": (LAYERS // 2, LAYERS // 2), "tensor": 2})
    ),
]


@pytest.mark.soak
def test_every_family_in_every_layout(tmp_path: Path) -> None:
    soaked = Runs(tmp_path, by_world_size(SOAKED))
    for case in SOAKED:
        assert_alike(soaked.losses(case), reference(case.family, case.apart).losses, case, 1e-5)


@pytest.mark.soak
def test_every_kind_of_checkpoint_in_every_layout(runs: Runs, later: Runs) -> None:
    cases = [loaded(layout, saver) for saver, layout in PAIRS]
    soaked = Runs(runs.directory, by_world_size(cases))
    for case in cases:
        in_bf16 = "bf16" in (case.dtype, SAVERS[case.folder].dtype)
        assert_alike(soaked.losses(case), expected_after(runs, case), case, BF16 if in_bf16 else 1e-5)
