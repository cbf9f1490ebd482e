"""Fragments: any range of any part of a parameter, as rectangles of the whole."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.train.fragments import PARAM, Box, fragments_of, rectangles

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """(shape, start, length) of a range of a flattened tensor."""
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(0, math.prod(shape) - start))


@given(ranges())
def test_rectangles_cover_a_range_once_and_in_order(of: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, length = of
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = list(rectangles(shape, start, length))
    assert [number for box, _ in found for number in numbers[box.slices].flatten().tolist()] == list(
        range(start, start + length)
    )
    assert [first for _, first in found] == [sum(box.numel for box, _ in found[:n]) for n in range(len(found))]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_range_of_a_matrix_is_three_rectangles_at_most(rows: int, width: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * width))
    length = data.draw(st.integers(0, rows * width - start))
    assert len(list(rectangles((rows, width), start, length))) <= 3


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """(shape of a parameter, a part of it), which may reach past its end."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple))
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return shape, Box(offsets, tuple(draw(st.integers(1, 5)) for _ in shape))


@given(parts(), st.data())
def test_fragments_are_views_of_what_lies_inside_the_parameter(
    of: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    shape, part = of
    cuts = sorted({0, part.numel, *data.draw(st.lists(st.integers(0, part.numel), max_size=3))})
    held = torch.zeros(part.numel)
    fragments = [
        fragment
        for start, end in itertools.pairwise(cuts)
        for fragment in fragments_of("weight", shape, part, start, {PARAM: held[start:end]})
    ]
    whole = torch.zeros(shape)
    for fragment in fragments:
        assert fragment.shape == shape
        assert fragment.tensors[PARAM].shape == fragment.box.lengths
        fragment.tensors[PARAM] += 1
        whole[fragment.box.slices] += 1
    expected = torch.zeros(shape)
    expected[part.slices] = 1
    assert torch.equal(whole, expected), "each element of the part once, and nothing else"
    assert held.sum() == expected.sum(), "what is written to fragments is written to the rank's own memory"
