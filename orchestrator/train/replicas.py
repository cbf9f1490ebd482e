"""Model replicas of several ranks: all of a tensor-parallel group get the same data, and one of them reads it.

Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.data.schedule import Role, Share
from orchestrator.errors import PeerFailed, RunFailed
from orchestrator.planning.plan import Plan

_DATA, _FAILED = 1, 2
_HEADER = 6
"""int64 each: what comes, the step, sequences, tokens a sequence, bytes a token, whether a mask of counted tokens."""


def replicated(shares: Iterator[Share], role: Role, group: Any, source: int) -> Iterator[Share]:
    """The shares of a rank, with the tokens that the source of its tensor-parallel group has read.

    Every rank of the group goes through the same steps. A step that is passed over costs no communication, and neither
    does a pipeline stage that needs no data.

    Args:
        shares: with tokens where the role reads.
        group: the torch.distributed group of the tensor-parallel ranks, of a backend that takes CPU tensors; one of its
            own, since other collectives must not come in between. None where the rank is alone.
        source: global rank of the group's tensor rank 0.

    Raises:
        PeerFailed: the source failed to read; it raises its own error.
    """
    of_stage = replace(role, tensor_rank=0)
    if group is None or dist.get_world_size(group) == 1 or not of_stage.reads:
        return shares
    return _handed_on(shares, group, source) if role.reads else _received(shares, group, source)


def reading_group(plan: Plan) -> tuple[Any, int]:
    """The tensor-parallel group of this rank, on a backend that takes CPU tensors, and its first rank. Every rank makes
    the groups of all."""
    size = plan.tensor_parallel
    own: tuple[Any, int] = (None, dist.get_rank())
    for first in range(0, plan.workers, size) if size > 1 else ():
        group = dist.new_group(list(range(first, first + size)), backend="gloo")
        if first <= dist.get_rank() < first + size:
            own = group, first
    return own


def _handed_on(shares: Iterator[Share], group: Any, source: int) -> Iterator[Share]:
    while True:
        try:
            share = next(shares, None)
            if share is None:
                return
            message = _packed(share) if share.targets else None
        except BaseException:
            # Whatever it is: the others wait for data, and would wait for ever.
            dist.broadcast(torch.tensor([_FAILED] + [0] * (_HEADER - 1)), source, group)
            raise
        if message:
            for part in message:
                dist.broadcast(torch.from_numpy(part), source, group)
        yield share


def _received(shares: Iterator[Share], group: Any, source: int) -> Iterator[Share]:
    for share in shares:
        if not share.targets:
            yield share
            continue
        header = torch.empty(_HEADER, dtype=torch.int64)
        dist.broadcast(header, source, group)
        kind, step, sequences, length, width, masked = header.tolist()
        if kind == _FAILED:
            raise PeerFailed(f"rank {source} failed to read the data of step {share.step}, which this rank shares")
        if step != share.step:
            raise RunFailed(f"rank {source} handed on the data of step {step} where step {share.step} was due")
        size = sequences * length
        payload = np.empty(size * (width + masked), np.uint8)
        dist.broadcast(torch.from_numpy(payload), source, group)
        tokens = payload[: size * width].view(f"u{width}").reshape(sequences, length)
        counted = payload[size * width :].view(bool).reshape(sequences, length) if masked else None
        yield replace(share, tokens=tokens, counted=counted)


def _packed(share: Share) -> tuple[np.ndarray, np.ndarray]:
    """(header, payload as bytes: gloo knows no unsigned integers but those)."""
    tokens, counted = share.tokens, share.counted
    assert tokens is not None and tokens.dtype.kind == "u", "the source reads"
    sequences, length = tokens.shape
    header = [_DATA, share.step, sequences, length, tokens.itemsize, counted is not None]
    parts = [tokens] if counted is None else [tokens, counted]
    payload = np.concatenate([np.frombuffer(part.tobytes(), np.uint8) for part in parts])
    return np.array(header, np.int64), payload
