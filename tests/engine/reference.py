"""What the engine must equal: a plain loop over one whole model of Transformers, in one process."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orchestrator.data.schedule import Role, Share
from tests.engine.cases import CONFIG, FILLER, HELD_OUT, SCHEDULE, STEPS, model, share_of

NOT_COUNTED = -100


@dataclass
class Reference:
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    """(loss, gradient norm) by step."""
    sequences: dict[int, list[float]] = field(default_factory=dict)
    """Mean losses of the sequences of the global batch, by step."""
    held_out: tuple[float, int] = (0.0, 0)
    """Sum of the losses and number of the targets of HELD_OUT, after the last step."""


@functools.cache
def reference(family: str = "galactica", apart: bool = False, dropped: tuple[int, ...] = ()) -> Reference:
    """
    Args:
        apart: documents do not see each other.
        dropped: steps without an update.
    """
    plain, told = copy.deepcopy(model(family)), Reference()
    matrices, vectors = ([p for p in plain.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=CONFIG.betas)
    for step in range(1, STEPS + 1):
        if not SCHEDULE.targets(step):
            continue
        losses, targets = _losses(plain, share_of(step, Role(0, (1,))), apart)
        loss = losses.sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CONFIG.clip_norm)
        if step not in dropped:
            optimizer.step()
        told.losses[step] = (loss.item(), norm.item())
        told.sequences[step] = (losses.detach() / targets.clamp(min=1)).tolist()
    with torch.no_grad():
        losses, targets = _losses(plain, share_of(HELD_OUT, Role(0, (1,))), apart)
    told.held_out = (losses.sum().item(), int(targets.sum()))
    return told


def _losses(plain: Any, share: Share, apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses, number of targets) of each sequence."""
    assert share.tokens is not None
    tokens = torch.from_numpy(share.tokens.astype(np.int64))
    labels = tokens if share.counted is None else tokens.masked_fill(~torch.from_numpy(share.counted), NOT_COUNTED)
    window = getattr(plain.config, "sliding_window", None) or tokens.shape[1]
    given = {"attention_mask": _visible(tokens, window)} if apart else {}
    positions = torch.arange(tokens.shape[1])[None]
    logits = plain(input_ids=tokens, position_ids=positions, **given).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=NOT_COUNTED, reduction="none"
    )
    return losses.sum(1), (labels[:, 1:] != NOT_COUNTED).sum(1)


def _visible(tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Whether a position sees another, bool [sequences, 1, positions, positions]: no document ends between them."""
    length = tokens.shape[1]
    sees = [
        [[i - window < j <= i and FILLER not in row[j:i] for j in range(length)] for i in range(length)]
        for row in tokens.tolist()
    ]
    return torch.tensor(sees)[:, None]
