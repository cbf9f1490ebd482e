"""Tensor parallelism: layers of a Transformers model cut over the ranks of a group, after Shoeybi et al.,
"Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019).

A column-parallel linear layer keeps some of its outputs, the row-parallel one after it the inputs that belong to them,
so that attention and feed-forward cost one all-reduce each way. Layers are cut on the meta device. Imports no Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.train.fragments import Box

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
ROWS = ("o_proj", "out_proj", "down_proj", "fc2")
SHARED_INPUT = ("self_attn", "mlp", "fc1")
"""Modules whose input goes to column-parallel layers: its gradient is a sum over the group."""
OF_EACH_HEAD = ("q_norm", "k_norm")
"""Layers that stand on every rank and see the heads of that rank only."""
VOCABULARY_MULTIPLE = 128
"""Rows of the embedding a rank are a multiple of it: matrix units like whole tiles (as Megatron pads)."""


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share the layers of a replica."""

    group: Any
    """torch.distributed group; None for one rank."""
    rank: int
    size: int

    def part(self, shape: torch.Size | tuple[int, ...], dim: int) -> Box:
        """What this rank holds of a tensor that is cut evenly along a dimension."""
        width = shape[dim] // self.size
        offsets, lengths = [0] * len(shape), list(shape)
        offsets[dim], lengths[dim] = self.rank * width, width
        return Box(tuple(offsets), tuple(lengths))

    def rows(self, vocab_size: int) -> int:
        """Rows of the vocabulary that a rank holds, padding included."""
        if self.size == 1:
            return vocab_size
        return -(-vocab_size // (self.size * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE


ALONE = TensorGroup(None, 0, 1)


def shard_block(block: nn.Module, tensor: TensorGroup) -> dict[str, Box]:
    """Cut a decoder block of the meta device in place; returns what this rank holds of the parameters that are cut."""
    parts: dict[str, Box] = {}
    for path, module in block.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name in COLUMNS:
            parts |= _cut(module, path, tensor, weight=0, bias=0)
        elif isinstance(module, nn.Linear) and name in ROWS:
            parts |= _cut(module, path, tensor, weight=1)
            _sum_output(module, tensor)
        if name == "self_attn" and hasattr(module, "num_heads"):
            module.num_heads //= tensor.size
        if name in SHARED_INPUT:
            _share_input(module, tensor)
    return parts


def _cut(module: nn.Linear, path: str, tensor: TensorGroup, **dims: int) -> dict[str, Box]:
    parts = {}
    for name, dim in dims.items():
        whole = getattr(module, name)
        if whole is not None:
            box = parts[f"{path}.{name}"] = tensor.part(whole.shape, dim)
            setattr(module, name, nn.Parameter(whole.new_empty(box.lengths)))
    return parts


def reduce_gradients_of_each_head(block: nn.Module, tensor: TensorGroup) -> None:
    """Sum over the group what its ranks learn of parameters that each of them applies to its own heads."""
    for path, module in block.named_modules():
        if path.rpartition(".")[2] in OF_EACH_HEAD:
            for parameter in module.parameters():
                parameter.register_hook(lambda gradient: _all_reduced(gradient, tensor))


def _share_input(module: nn.Module, tensor: TensorGroup) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": _shared(kwargs["hidden_states"], tensor)}
        return (_shared(args[0], tensor), *args[1:]), kwargs

    module.register_forward_pre_hook(before, with_kwargs=True)


def _sum_output(module: nn.Linear, tensor: TensorGroup) -> None:
    def forward(values: torch.Tensor) -> torch.Tensor:
        summed = _summed(nn.functional.linear(values, module.weight), tensor)
        return summed if module.bias is None else summed + module.bias

    module.forward = forward  # type: ignore[method-assign, assignment]


def _shared(values: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
    same: torch.Tensor = _Shared.apply(values, tensor)  # type: ignore[no-untyped-call]
    return same


def _summed(values: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
    total: torch.Tensor = _Summed.apply(values, tensor)  # type: ignore[no-untyped-call]
    return total


class _Shared(torch.autograd.Function):
    """The same values on every rank; their gradient is the sum of what the ranks make of them."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
        context.tensor = tensor
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduced(gradient, context.tensor), None


class _Summed(torch.autograd.Function):
    """The sum over the ranks; each gets the gradient of the sum."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
        return _all_reduced(values, tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _all_reduced(values: torch.Tensor, tensor: TensorGroup, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    for look in _watchers:
        look(values)
    values = values.contiguous().clone()
    dist.all_reduce(values, op, group=tensor.group)
    return values


_watchers: list[Callable[[torch.Tensor], object]] = []


@contextlib.contextmanager
def watched(look: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Show what this rank gives to every reduction over its group, forward and backward, to a function."""
    _watchers.append(look)
    try:
        yield
    finally:
        _watchers.remove(look)


class VocabularyEmbedding(nn.Module):
    """The rows of an embedding that a rank holds: looked up where they are, summed over the group."""

    def __init__(self, weight: nn.Parameter, tensor: TensorGroup) -> None:
        super().__init__()
        self.weight = weight
        self._tensor = tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._tensor.size == 1:
            return nn.functional.embedding(tokens, self.weight)
        rows = len(self.weight)
        local = tokens - self._tensor.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = nn.functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return _summed(found.masked_fill(elsewhere[..., None], 0), self._tensor)


class VocabularyHead(nn.Module):
    """The logits of the rows that a rank holds."""

    def __init__(self, weight: nn.Parameter, tensor: TensorGroup) -> None:
        super().__init__()
        self.weight = weight
        self._tensor = tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._tensor.size > 1:
            hidden = _shared(hidden, self._tensor)
        return nn.functional.linear(hidden, self.weight)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, tensor: TensorGroup) -> torch.Tensor:
    """Of every position, in fp32, 0 where the target is negative.

    Args:
        logits: [positions, rows of this rank].
        targets: int64 [positions].
    """
    if tensor.size == 1:
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
    losses: torch.Tensor = _VocabularyCrossEntropy.apply(logits, targets, vocab_size, tensor)  # type: ignore[no-untyped-call]
    return losses


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, tensor: TensorGroup
    ) -> torch.Tensor:
        rows = logits.shape[-1]
        logits = logits.float()
        logits[:, max(vocab_size - tensor.rank * rows, 0) :] = float("-inf")  # padding is no token
        highest = _all_reduced(logits.amax(-1), tensor, dist.ReduceOp.MAX)
        exponents = (logits - highest[:, None]).exp_()
        local = targets - tensor.rank * rows
        here = (local >= 0) & (local < rows) & (targets >= 0)
        local = local.masked_fill(~here, 0)
        own = logits.gather(1, local[:, None])[:, 0].masked_fill(~here, 0)
        sums = _all_reduced(torch.stack([exponents.sum(-1), own]), tensor)
        counted = targets >= 0
        context.save_for_backward(exponents.div_(sums[0][:, None]), local, here, counted)
        return (sums[0].log() + highest - sums[1]).masked_fill(~counted, 0)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        shares, local, here, counted = context.saved_tensors
        shares[torch.arange(len(local), device=local.device)[here], local[here]] -= 1
        return shares.mul_((gradient * counted)[:, None]), None, None, None
