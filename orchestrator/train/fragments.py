"""Fragments: training state in terms of parameter names, free of the layout that holds it.

A rank holds, of some parameters, a rectangle (tensor parallelism), and of that rectangle a range of its flattened
elements (ZeRO). A range of a rectangle is at most three rectangles of a matrix, in the coordinates of the whole
parameter: these are the fragments. Any layout is just another set of them over the same names. Imports no Ray.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

PARAM, MOMENTS = "param", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True))

    @staticmethod
    def whole(shape: tuple[int, ...] | torch.Size) -> Box:
        return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True, eq=False)
class Fragment:
    name: str
    """Parameter name in the Hugging Face model."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    box: Box
    """What of it this is."""
    tensors: dict[str, torch.Tensor]
    """`param` and, where there is an optimizer, `exp_avg` and `exp_avg_sq`: fp32 views of the live state, each of the
    shape of the box."""


def fragments_of(
    name: str, shape: tuple[int, ...], part: Box, start: int, tensors: dict[str, torch.Tensor]
) -> list[Fragment]:
    """The fragments of a range of a rank's part of a parameter.

    Args:
        part: what the rank holds of the parameter; what of it lies past the parameter's end (padding) is left out.
        start: of the range, in elements of the flattened part.
        tensors: 1-D, of the length of the range.
    """
    (length,) = {len(tensor) for tensor in tensors.values()}
    found = []
    for box, first in rectangles(part.lengths, start, length):
        offsets = tuple(p + o for p, o in zip(part.offsets, box.offsets, strict=True))
        inside = tuple(min(n, max(s - o, 0)) for n, s, o in zip(box.lengths, shape, offsets, strict=True))
        if math.prod(inside):
            cut = tuple(slice(n) for n in inside)
            views = {kind: t[first : first + box.numel].view(box.lengths)[cut] for kind, t in tensors.items()}
            found.append(Fragment(name, tuple(shape), Box(offsets, inside), views))
    return found


def rectangles(shape: tuple[int, ...], start: int, length: int) -> Iterator[tuple[Box, int]]:
    """A range of a flattened tensor as rectangles of it, each with where it begins within the range."""
    if not length:
        return
    if len(shape) <= 1:
        yield (Box((start,), (length,)) if shape else Box((), ())), 0
        return
    row = math.prod(shape[1:])
    first, end = start // row, (start + length - 1) // row + 1
    head, tail = start - first * row, end * row - (start + length)
    if end - first > 1 and (head or tail):  # a part of the first row, whole rows, a part of the last
        cuts = sorted({start, start + (row - head) % row, start + length - (row - tail) % row, start + length})
        for begin, stop in itertools.pairwise(cuts):
            for box, offset in rectangles(shape, begin, stop - begin):
                yield box, begin - start + offset
    elif head or tail:
        for box, offset in rectangles(shape[1:], head, length):
            yield Box((first, *box.offsets), (1, *box.lengths)), offset
    else:
        yield Box((first,) + (0,) * (len(shape) - 1), (end - first, *shape[1:])), 0
