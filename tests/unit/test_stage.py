"""Stages of a model: together the ranks of any layout hold every parameter, and compute what the model computes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from orchestrator.planning.shape import shape_of
from orchestrator.train.models import meta_model, parameter_shapes
from orchestrator.train.stage import NOT_A_TARGET, Stage, document_numbers
from orchestrator.train.tensor_parallel import VOCABULARY_MULTIPLE, TensorGroup
from tests.engine.cases import LAYERS, LENGTH, VOCAB, configuration, model

FAMILIES = ("galactica", "opt", "llama", "qwen2", "qwen3", "mistral")
CUTS = {1: [range(LAYERS)], 2: [range(1), range(1, LAYERS)], 3: [range(1), range(1, 3), range(3, LAYERS)]}


def stages(family: str, number: int, ranks: int = 1, **values: Any) -> list[Stage]:
    """Every stage of every tensor-parallel rank, without storage."""
    groups = [TensorGroup(None, rank, ranks) for rank in range(ranks)]
    made = itertools.product(CUTS[number], groups)
    return [Stage(configuration(family), cut, dtype=torch.float32, tensor=group, **values) for cut, group in made]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "ranks"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_the_planner_counts_exactly_what_a_rank_holds(family: str, number: int, ranks: int) -> None:
    shape = shape_of(configuration(family).to_dict())
    for stage in stages(family, number, ranks):
        held = sum(parameter.numel() for parameter in stage.parameters())
        counted = shape.rank_parameters(len(stage.blocks), first=stage.first, last=stage.last, tensor_parallel=ranks)
        assert counted == held, (family, stage.first, stage.last)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "ranks"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_the_ranks_hold_every_element_once_or_all_of_a_parameter(family: str, number: int, ranks: int) -> None:
    expected = parameter_shapes(meta_model(configuration(family)))
    held = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in expected.items()}
    copies: Counter[str] = Counter()
    for stage in stages(family, number, ranks):
        for part, parameter in stage.parts():
            assert part.shape == expected[part.name]
            assert tuple(parameter.shape) == part.box.lengths
            held[part.name][part.box.slices] += 1
            copies[part.name] += part.box.lengths == part.shape
        if stage.tied_copy is not None:
            copies["tied"] += 1
    tied = configuration(family).tie_word_embeddings and number > 1
    assert copies.pop("tied", 0) == (2 * ranks if tied else 0), "the first stage and the last"
    for name, count in held.items():
        times = count.unique().tolist()
        twice = 2 if tied and "embed_tokens" in name else 1
        assert times == [ranks if copies[name] else 1] or times == [twice * (ranks if ranks == 1 else 1)], name


def test_the_vocabulary_is_padded_to_whole_tiles_on_every_rank() -> None:
    assert [TensorGroup(None, 0, size).rows(VOCAB) for size in (1, 2, 4)] == [VOCAB, 2 * VOCABULARY_MULTIPLE, 128]
    assert TensorGroup(None, 1, 2).rows(256) == VOCABULARY_MULTIPLE
    first, last = (stage.embed_tokens.weight for stage in stages("llama", 1, ranks=2))
    assert first.shape == last.shape == (2 * VOCABULARY_MULTIPLE, 32)


def test_a_part_is_an_even_cut() -> None:
    parts = [TensorGroup(None, rank, 4).part((6, 8), dim=1) for rank in range(4)]
    assert [part.offsets for part in parts] == [(0, 0), (0, 2), (0, 4), (0, 6)]
    assert {part.lengths for part in parts} == {(6, 2)}


def filled(family: str, number: int, **values: Any) -> list[Stage]:
    weights = dict(model(family).named_parameters())
    made = stages(family, number, **values)
    for stage in made:
        stage.materialize(torch.device("cpu"))
        with torch.no_grad():
            for part, parameter in stage.parts():
                parameter.copy_(weights[part.name][part.box.slices])
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "recompute"), [(1, False), (3, True)])
def test_stages_one_after_the_other_compute_what_the_model_computes(family: str, number: int, recompute: bool) -> None:
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    values: Any = tokens
    for stage in filled(family, number, recompute=recompute):
        values = stage(values)
    torch.testing.assert_close(values, model(family)(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)


def test_losses_are_sums_over_the_targets_of_a_sequence() -> None:
    (stage,) = filled("llama", 1)
    labels = torch.arange(3 * 8).view(3, 8)
    labels[1, 4:], labels[2] = NOT_A_TARGET, NOT_A_TARGET
    losses = stage.losses(torch.zeros(3, 8, VOCAB), labels)
    assert losses.tolist() == pytest.approx([7 * math.log(VOCAB), 3 * math.log(VOCAB), 0])


def test_the_token_that_ends_a_document_belongs_to_it() -> None:
    tokens = torch.tensor([[5, 6, 2, 7, 2, 2, 8], [2, 5, 6, 7, 8, 9, 9]])
    assert document_numbers(tokens, 2).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", ["galactica", "mistral"])
def test_a_document_does_not_depend_on_those_beside_it(family: str) -> None:
    (stage,) = filled(family, 1)
    tokens = torch.arange(10, 10 + LENGTH)[None].repeat(2, 1)
    tokens[:, 11] = 2
    tokens[1, :11] += 100
    logits = stage((tokens, document_numbers(tokens, 2)))
    assert torch.equal(logits[0, 12:], logits[1, 12:])
    assert not torch.equal(logits[0, :11], logits[1, :11])
    assert not torch.equal(stage(tokens)[0, 12:], stage(tokens)[1, 12:]), "they do where they are not kept apart"
