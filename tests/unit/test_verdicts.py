from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.train.verdicts import (
    INNOCENT,
    Measure,
    Place,
    Trace,
    Verdict,
    ends,
    judged,
    of_copies,
    of_probe,
    origins,
    replicas,
    reproduced,
    stages,
)

RIGHT, WRONG = Measure(0.5, 1.0), Measure(0.6, 1.0)


def places(stages: int = 1, replicas: int = 1, tensor: int = 1) -> list[Place]:
    """In the order of the ranks: those of a tensor-parallel group are neighbours."""
    return [Place(s, d, t) for s in range(stages) for d in range(replicas) for t in range(tensor)]


def traces(ranks: int, first_wrong: dict[int, int], length: int = 4) -> list[Trace]:
    """Of ranks that are wrong from a point on."""
    return [[WRONG if at >= first_wrong.get(rank, length) else RIGHT for at in range(length)] for rank in range(ranks)]


@pytest.mark.parametrize("culprit", range(3))
def test_a_majority_of_three_names_the_culprit(culprit: int) -> None:
    assert of_probe(traces(3, {culprit: 2}), places(replicas=3), 1e-5) == Verdict(ranks=(culprit,))


def test_nobody_is_named_where_all_agree_to_rounding() -> None:
    found = traces(3, {})
    found[1] = [Measure(0.5 + 5e-6, 1.0 - 5e-6)] * 4
    assert of_probe(found, places(replicas=3), 1e-5) == INNOCENT
    assert of_probe(found, places(replicas=3), 1e-6) == Verdict(ranks=(1,))


def test_of_two_both_are_suspects_until_one_contradicts_itself_or_the_host() -> None:
    before = traces(2, {1: 0})
    both = of_probe(before, places(replicas=2), 1e-5)
    assert both == Verdict(ranks=(0, 1), sure=False)
    assert reproduced(both, before, before) == both
    assert reproduced(both, before, traces(2, {1: 1})) == Verdict(ranks=(1,))
    assert reproduced(both, before, traces(2, {0: 3, 1: 1})) == both, "neither can be trusted"
    assert judged(both, [1e-7, 1e-7], 1e-5) == both
    assert judged(both, [1e-7, 0.3], 1e-5) == Verdict(ranks=(1,))
    assert judged(both, [math.nan, 1e-7], 1e-5) == Verdict(ranks=(0,))
    sure = Verdict(ranks=(0,))
    assert judged(sure, [0.0, 1.0], 1e-5) == reproduced(sure, before, traces(2, {1: 1})) == sure


def test_two_against_two_is_no_majority() -> None:
    assert of_probe(traces(4, {0: 1, 3: 1}), places(replicas=4), 1e-5) == Verdict(ranks=(0, 1, 2, 3), sure=False)


def test_in_a_tensor_parallel_group_the_first_to_differ_began() -> None:
    """Rank 3 is wrong before a sum over its group, and rank 2 after it."""
    three = places(replicas=3, tensor=2)
    assert of_probe(traces(6, {3: 1, 2: 2}), three, 1e-5) == Verdict(ranks=(3,))
    two = places(replicas=2, tensor=2)
    assert of_probe(traces(4, {3: 1, 2: 2}), two, 1e-5) == Verdict(ranks=(1, 3), sure=False)


def test_stages_are_compared_with_their_like_only() -> None:
    four = places(stages=2, replicas=2)
    found = [[RIGHT] * 4, [RIGHT] * 4, [RIGHT] * 7, [*[RIGHT] * 6, WRONG]]
    assert of_probe(found, four, 1e-5) == Verdict(ranks=(2, 3), sure=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_differs_from_a_number_and_not_from_its_like(value: float) -> None:
    broken = Measure(value, value)
    assert not broken.agrees(RIGHT, 1e-5)
    assert broken.agrees(Measure(math.nan, math.inf), 1e-5)


def test_a_wrong_copy_is_named_by_the_other_copies() -> None:
    sums = [7, 7, 7, 9]
    place = places(replicas=2, tensor=2)

    def same(one: int, other: int) -> bool:
        return sums[one] == sums[other]

    assert of_copies(stages(place), same) == Verdict(ranks=(3,))
    assert of_copies(replicas(place), same) == Verdict(ranks=(1, 3), sure=False)
    assert of_copies(replicas(place), same) | of_copies(stages(place), same) == Verdict(ranks=(3,))
    assert INNOCENT | of_copies(replicas(place), same) == Verdict(ranks=(1, 3), sure=False)


def test_who_holds_copies_of_what() -> None:
    place = places(stages=3, replicas=2, tensor=2)
    assert replicas(place)[:2] == [[0, 2], [1, 3]]
    assert stages(place) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert ends(place) == [[0, 2, 8, 10], [1, 3, 9, 11]]
    assert ends(places(replicas=2)) == []


@pytest.mark.parametrize(
    ("layout", "broken", "named"),
    [
        ({"replicas": 3}, {1: 4}, [1]),
        ({"replicas": 3}, {0: 1, 2: 9}, [0, 2]),
        ({"stages": 3, "replicas": 2}, {0: 0, 2: 3}, [2]),
        ({"replicas": 2, "tensor": 2}, {2: 5, 3: 4}, [3]),
        ({"replicas": 2}, {}, []),
    ],
    ids=["one", "two of three", "a later stage", "first of its group", "none"],
)
def test_a_broken_gradient_is_named_where_it_began(
    layout: dict[str, Any], broken: dict[int, int], named: list[int]
) -> None:
    of = places(**layout)
    assert origins([broken.get(rank) for rank in range(len(of))], of) == named
