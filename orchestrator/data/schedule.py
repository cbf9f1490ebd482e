"""The data schedule of an attempt: the order, the steps that are passed over, and what is excluded. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from orchestrator.data.exclusions import Exclusions
from orchestrator.data.order import Batches, Order, Pool, Stage, slice_of

FORMAT = 1


@dataclass(frozen=True)
class Role:
    """Which part of every step a worker takes."""

    rank: int
    """Among the data-parallel replicas."""
    shares: tuple[int, ...]
    """Of each replica, relative to the others."""
    pipeline_stage: int = 0
    pipeline_stages: int = 1
    tensor_rank: int = 0

    @property
    def reads(self) -> bool:
        """Whether the worker needs data of its own: inputs on the first pipeline stage, targets on the last; under
        tensor parallelism one rank hands them on to the others."""
        return self.tensor_rank == 0 and self.pipeline_stage in (0, self.pipeline_stages - 1)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A worker's part of one step."""

    step: int
    tokens: np.ndarray | None
    """uint16 or uint32 [sequences, sequence_length]; None for a role that reads none, and for a step passed over."""
    counted: np.ndarray | None
    """bool like tokens: False for what is excluded. None: all are counted."""
    targets: int
    """Of the global batch, excluded ones left out. 0: nothing is learned in this step."""
    largest: int
    """Sequences of the largest share of the step."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    order: Order
    sequence_length: int
    corpus_hash: str
    skip_steps: tuple[tuple[int, int], ...] = ()
    """First and last step of ranges that are passed over: their samples are not seen, and nothing is learned."""
    exclusions: Exclusions = field(default_factory=Exclusions)

    def skips(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.skip_steps)

    def stretches(self, first: int, last: int) -> Iterator[range]:
        """The steps from first to last that are not passed over, cut where the batch size changes."""
        edges = {first, last + 1}
        edges |= {edge for bounds in self.skip_steps for edge in (bounds[0], bounds[1] + 1)}
        edges |= set(self.order.changes())
        inner = sorted(edge for edge in edges if first <= edge <= last + 1)
        for begin, end in itertools.pairwise(inner):
            if not self.skips(begin):
                yield range(begin, end)

    def targets(self, step: int) -> int:
        """Of the global batch, 0 for a step that is passed over."""
        if self.skips(step):
            return 0
        if not self.exclusions:
            return self.order.batch_size(step) * (self.sequence_length - 1)
        return self.exclusions.targets(self.order.step(step), self.sequence_length)

    def size(self, step: int, role: Role) -> int:
        """Sequences of a worker in a step."""
        first, end = slice_of(self.order.batch_size(step), role.rank, role.shares)
        return end - first

    def largest(self, step: int, shares: tuple[int, ...]) -> int:
        """Sequences of the largest share of a step."""
        return _largest(self.order.batch_size(step), shares)

    def ids(self, steps: Iterable[int], role: Role) -> np.ndarray:
        """Sample ids of a worker for some steps, one after the other, int64."""
        return self.order.of_rank(steps, role.rank, role.shares)

    def share(self, step: int, role: Role, tokens: np.ndarray | None) -> Share:
        """A worker's part of a step, of its tokens as the shards hold them: the filler stands for excluded ones."""
        counted = None
        if tokens is not None and self.exclusions:
            counted = self.exclusions.counted(self.ids([step], role), self.sequence_length)
        if tokens is not None and counted is not None:
            tokens = np.where(counted, tokens, tokens.dtype.type(self.exclusions.filler))
        return Share(
            step=step,
            tokens=tokens,
            counted=counted,
            targets=self.targets(step),
            largest=self.largest(step, role.shares),
        )

    def past(self, step: int) -> dict[str, Any]:
        """All that decided what the steps up to this one consumed. Exclusions are no part of it: they come as things
        break, and every attempt records its own."""
        passed = sorted(s for first, last in self.skip_steps for s in range(first, min(last, step) + 1))
        return {"corpus": self.corpus_hash, **self.order.past(step), "skipped": _ranges(passed)}

    def as_json(self) -> dict[str, Any]:
        values = asdict(self.order)
        return {
            "format": FORMAT,
            "corpus": self.corpus_hash,
            "sequence_length": self.sequence_length,
            "order": values,
            "skip_steps": [list(bounds) for bounds in self.skip_steps],
            "exclusions": self.exclusions.as_json(),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> Schedule:
        order = values["order"]
        return Schedule(
            order=Order(
                pools=tuple(Pool(**pool) for pool in order["pools"]),
                stages=tuple(Stage(tuple(stage["weights"]), stage["samples"]) for stage in order["stages"]),
                batches=tuple(Batches(**batches) for batches in order["batches"]),
                seed=order["seed"],
                block=order["block"],
                window=order["window"],
            ),
            sequence_length=values["sequence_length"],
            corpus_hash=values["corpus"],
            skip_steps=tuple((first, last) for first, last in values["skip_steps"]),
            exclusions=Exclusions.from_json(values["exclusions"]),
        )


@functools.lru_cache(maxsize=64)
def _largest(batch_size: int, shares: tuple[int, ...]) -> int:
    bounds = [slice_of(batch_size, rank, shares) for rank in range(len(shares))]
    return max(end - first for first, end in bounds)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two pasts, in words a user knows. Of another corpus all else is other, too."""
    keys = [key for key in _NAMES if differs(key, before, after)]
    return [
        f"{_NAMES[key]} was {_short(before[key])}, is {_short(after[key])}"
        for key in (keys if "corpus" not in keys else ["corpus"])
    ]


def differs(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a value of two pasts differs. Of mixtures, as far as both go: with other batches one goes further."""
    one, other = before[key], after[key]
    if key == "mixture":
        drawn = min(sum(samples for samples, _ in mixture) for mixture in (one, other))
        one, other = _first(one, drawn), _first(other, drawn)
    return bool(one != other)


def _first(mixture: list[list[Any]], samples: int) -> list[list[Any]]:
    """As much of a mixture as draws so many samples."""
    found = []
    for drawn, shares in mixture:
        if samples > 0:
            found.append([min(drawn, samples), shares])
        samples -= drawn
    return found


_NAMES = {
    "corpus": "the corpus",
    "seed": "train.seed",
    "batches": "train.global_batch_size, as [steps, sequences],",
    "mixture": "corpus.mixture, as [samples, shares in 1/10000],",
    "skipped": "train.skip_steps",
    "pools": "the samples of the sources",
    "shuffle": "the shuffle",
}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _ranges(steps: list[int]) -> list[list[int]]:
    """[1, 2, 3, 7] -> [[1, 3], [7, 7]]."""
    found: list[list[int]] = []
    for step in steps:
        if found and step <= found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return found
