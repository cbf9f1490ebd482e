"""Devices that compute wrong numbers without an error: found by comparing replicas, before anything is reduced.

A check has two parts. A probe: every stage goes forward and backward on inputs that are the same on all replicas, with
the weights as they are, and what comes out is compared. And checksums of the parameters that several ranks hold.
Neither touches the state of training. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from orchestrator.data.schedule import Share
from orchestrator.errors import NotFinite, SilentCorruption
from orchestrator.train import verdicts
from orchestrator.train.engine import Engine, StepResult
from orchestrator.train.stage import Stage
from orchestrator.train.tensor_parallel import ROWS, VocabularyHead, watched
from orchestrator.train.verdicts import INNOCENT, TOLERANCE, Measure, Place, Verdict

_CHUNK = 2**20
"""Elements that are measured at a time: measuring needs no memory to speak of."""
_ENDS = 3
"""Of a probe: the output, the gradient of the input, and the gradient of a layer."""
_EXACT = 2**48 - 1
"""Checksums are cut to what a float64 holds."""


@dataclass(frozen=True)
class Node:
    host: str
    id: str = ""
    """Ray's, where there is one."""

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:12]})" if self.id else self.host


class Integrity:
    """One rank's checks of an attempt. Every rank makes one, and calls the same methods at the same steps.

    Args:
        length: tokens of a probe.
        node: where this rank runs.
    """

    def __init__(self, engine: Engine, length: int, node: Node | None = None) -> None:
        self._engine = engine
        self._length = length
        self._ranks = range(dist.get_world_size())
        self._places = [Place(*engine.plan.coordinates(rank)) for rank in self._ranks]
        self._tolerance = TOLERANCE[engine.plan.dtype]
        self.nodes: list[Node] = self._of_all(node or Node(socket.gethostname()))

    def check(self, step: int) -> None:
        """
        Raises:
            SilentCorruption: on every rank: names those whose numbers are not those of their replicas.
        """
        verdict = self._of_probe(step) | self._of_copies()
        if verdict.ranks:
            raise corruption(verdict, self.nodes, step)

    def _of_probe(self, step: int) -> Verdict:
        trace = probe(self._engine, self._length, step)
        numbers = self._engine.gathered(*torch.stack(trace.ends).flatten())
        ends = [[Measure(numbers[2 * n][r], numbers[2 * n + 1][r]) for n in range(_ENDS)] for r in self._ranks]
        if not verdicts.of_probe(ends, self._places, self._tolerance).ranks:
            return INNOCENT
        return self._named(trace, step)

    def _named(self, trace: Trace, step: int) -> Verdict:
        """Who it was, now that replicas are known to differ: this may take its time."""
        errors: list[float] = []
        traces = self._of_all(trace.measures())
        again = self._of_all(probe(self._engine, self._length, step).measures())
        with _compared_with_host(self._engine.stage, errors.append):
            probe(self._engine, self._length, step)
        verdict = verdicts.of_probe(traces, self._places, self._tolerance)
        verdict = verdicts.reproduced(verdict, traces, again)
        return verdicts.judged(verdict, self._of_all(max(errors, default=0.0)), self._tolerance)

    def _of_copies(self) -> Verdict:
        if self._engine.plan.zero_stage == 3:
            return INNOCENT  # nobody holds a copy
        stage, places = self._engine.stage, self._places
        tied = stage.tied_copy
        every, whole, projection, norm = self._engine.gathered(
            checksum(stage.parameters()),
            checksum(parameter for part, parameter in stage.parts() if part.box.lengths == part.shape),
            *(measure(tied) if tied is not None else (0.0, 0.0)),
        )
        copies = [Measure(*pair) for pair in zip(projection, norm, strict=True)]
        verdict = verdicts.of_copies(verdicts.replicas(places), lambda one, other: every[one] == every[other])
        verdict |= verdicts.of_copies(verdicts.stages(places), lambda one, other: whole[one] == whole[other])
        return verdict | verdicts.of_copies(
            verdicts.ends(places), lambda one, other: copies[one].agrees(copies[other], verdicts.TIED_TOLERANCE)
        )

    def explain(self, share: Share, result: StepResult) -> None:
        """Say where the gradient of a step broke whose losses are finite. In fp16 it may overflow now and then.

        Raises:
            NotFinite: on every rank: names ranks and parameters. Nothing, where it did not happen again.
        """
        if math.isfinite(result.grad_norm) or result.broken_ranks or self._engine.plan.dtype == "fp16":
            return
        if broken := self.broken_gradients(share):
            where = "; ".join(map(str, broken))
            hint = "the losses are finite: a device that breaks one gradient again and again is to be tested"
            raise NotFinite(f"gradient norm is {result.grad_norm} at step {share.step}: {where}", hint, share.step)

    def broken_gradients(self, share: Share) -> list[BrokenGradient]:
        """Where gradients that are not finite began, after a step whose gradient was not and whose losses were.

        Computes the step again, and drops it. Every rank calls it with the share of that step.

        Returns:
            by rank, on all ranks alike; empty where it did not happen again.
        """
        found: list[tuple[int, str]] = []
        with _watched_gradients(self._engine.stage, found):
            self._engine.step(share, 0.0, accept=lambda loss, norm: False)
        first = self._of_all(found[0] if found else None)
        return [
            BrokenGradient(rank=rank, node=self.nodes[rank], parameter=first[rank][1])
            for rank in verdicts.origins([place and place[0] for place in first], self._places)
        ]

    def _of_all(self, value: Any) -> list[Any]:
        """The value of every rank."""
        values: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(values, value)
        return values


def corruption(verdict: Verdict, nodes: list[Node], step: int) -> SilentCorruption:
    """The error that says whose numbers were wrong."""
    where = " and ".join(f"rank {rank} on {nodes[rank]}" for rank in verdict.ranks)
    if verdict.sure:
        message = f"silent corruption at step {step}: {where} computes other numbers than its replicas"
    else:
        message = f"silent corruption at step {step}: {where} differ, and no majority says which of them is wrong"
    suspects = tuple(
        {"rank": rank, "host": nodes[rank].host, "node_id": nodes[rank].id, "sure": verdict.sure}
        for rank in verdict.ranks
    )
    return SilentCorruption(message, "test the device, or leave the node out", step=step, suspects=suspects)


# --- the probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """Float64 pairs (projection, norm), in the order of the computation."""

    all: list[torch.Tensor]
    ends: list[torch.Tensor]

    def measures(self) -> list[Measure]:
        return [Measure(*pair) for pair in torch.stack(self.all).tolist()]


def probe(engine: Engine, length: int, seed: int) -> Trace:
    """One sequence through the stage of this rank, forward and backward, with what it measures on its way.

    Every rank of a tensor-parallel group takes part, and under ZeRO-3 every replica. The gradient is taken of the input
    and of one layer, another one with every seed: together they would need as much memory as the whole stage.
    """
    stage = engine.stage
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(stage.config.vocab_size, (1, length), generator=random).to(engine.device)
    values = tokens if stage.first else _hidden(stage, length, random)
    seen: list[torch.Tensor] = []
    with torch.enable_grad(), watched(lambda given: seen.append(measure(given))), _input(stage, values) as inputs:
        output = stage((values, torch.zeros_like(tokens)) if engine.keeps_documents_apart else values)
        output = output[0] if isinstance(output, tuple) else output
        seen.append(of_output := measure(output))
        result = stage.losses(output, tokens).sum() if stage.last else output.float().square().sum()
        layer = [] if engine.plan.zero_stage == 3 else _any_layer(stage, random)
        of_input, *of_layer = torch.autograd.grad(result, [*inputs, *layer], allow_unused=True)
    gradients = [measure(of_input), _together([measure(found) for found in of_layer if found is not None])]
    gradients = [pair.to(engine.device) for pair in gradients]
    return Trace([*seen, *gradients], [of_output, *gradients])


def _hidden(stage: Stage, length: int, random: torch.Generator) -> torch.Tensor:
    """What a stage before might hand on."""
    like = next(stage.parameters())
    values = torch.randn((1, length, stage.config.hidden_size), generator=random)
    return values.to(device=like.device, dtype=like.dtype).requires_grad_()


@contextlib.contextmanager
def _input(stage: Stage, values: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """What the first layer hands to the others: of the first stage the embeddings, once they are computed."""
    if not stage.first:
        yield [values]
        return
    inputs: list[torch.Tensor] = []
    hook = stage.embed_tokens.register_forward_hook(lambda module, args, output: inputs.append(output))
    try:
        yield inputs
    finally:
        hook.remove()


def _any_layer(stage: Stage, random: torch.Generator) -> list[nn.Parameter]:
    """The parameters of one layer."""
    layers = [list(layer.parameters()) for layer in stage.layers()]
    layers = [parameters for parameters in layers if parameters]
    return layers[int(torch.randint(len(layers), (1,), generator=random))]


def measure(tensor: torch.Tensor) -> torch.Tensor:
    """(projection on fixed random signs, norm) of a tensor, float64 [2]."""
    signs = _signs(tensor.device)
    sums = [torch.zeros(2, dtype=torch.float64, device=tensor.device)]
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        exact = chunk.double()
        sums.append(torch.stack([exact @ signs[: len(chunk)], exact @ exact]))
    return _norm_of(torch.stack(sums).sum(0))


def _together(pairs: list[torch.Tensor]) -> torch.Tensor:
    """The measure of tensors as one, of theirs."""
    squares = [torch.stack([projection, norm.square()]) for projection, norm in pairs]
    return _norm_of(torch.stack([torch.zeros(2, dtype=torch.float64), *(pair.cpu() for pair in squares)]).sum(0))


def _norm_of(pair: torch.Tensor) -> torch.Tensor:
    return torch.stack([pair[0], pair[1].sqrt()])


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return (torch.randint(2, (_CHUNK,), generator=random) * 2 - 1).to(device=device, dtype=torch.float64)


def checksum(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of the bit patterns, so that a flipped bit shows; int64, less than 2**48."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64)
    for parameter in parameters:
        for chunk in torch.split(parameter.detach().reshape(-1), _CHUNK):
            total = total.to(parameter.device) + chunk.view(kinds[chunk.element_size()]).sum(dtype=torch.int64)
    return total & _EXACT


@contextlib.contextmanager
def _compared_with_host(stage: Stage, error: Callable[[float], object]) -> Iterator[None]:
    """Compute linear layers on the host's processor too, and tell the error of each."""

    def compare(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        error(linear_error(args[0], module.weight, getattr(module, "bias", None), output))

    summed = ROWS if stage.tensor.size > 1 else ()  # what these give is no longer this rank's alone
    hooks = [
        module.register_forward_hook(compare, prepend=True)  # before ZeRO-3 takes the weight away
        for path, module in stage.named_modules()
        if isinstance(module, (nn.Linear, VocabularyHead)) and path.rpartition(".")[2] not in summed
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linear_error(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> float:
    """The largest difference between outputs of a linear layer and what NumPy computes, relative to the lengths of the
    two vectors of which each is the product."""
    rows, columns, found = (_on_host(tensor.flatten(0, -2)) for tensor in (values, weight, output))
    expected = rows @ columns.T
    if bias is not None:
        expected += _on_host(bias)
    lengths = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=1) + np.abs(expected)
    return float(np.nan_to_num(np.abs(found - expected) / np.maximum(lengths, 1e-30), nan=np.inf).max())


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values


# --- gradients that are not finite ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BrokenGradient:
    rank: int
    node: Node
    parameter: str
    """The first in the order of the backward pass whose gradient on this rank is not finite."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}, gradient of {self.parameter}"


@contextlib.contextmanager
def _watched_gradients(stage: Stage, found: list[tuple[int, str]]) -> Iterator[None]:
    """Note (how many came before, name) of parameters whose gradient is not finite, before any reduction."""
    counter = itertools.count()

    def look(name: str, gradient: torch.Tensor) -> None:
        number = next(counter)
        if not gradient.isfinite().all():
            found.append((number, name))

    hooks: list[Any] = [
        parameter.register_hook(functools.partial(look, part.name))  # type: ignore[no-untyped-call]
        for part, parameter in stage.parts()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
