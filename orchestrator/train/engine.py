"""The training engine: a model under DeepSpeed ZeRO behind four calls (step, save state, load state, close).

Imports no Ray: it runs in a Ray Train worker and under torchrun alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.accelerators import Accelerator
from orchestrator.config import TrainConfig
from orchestrator.data.schedule import Share
from orchestrator.planning.search import Plan
from orchestrator.train import checkpoints, zero
from orchestrator.train.models import parameter_groups, token_loss_sum
from orchestrator.train.saver import Saver, Timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean over the targets of the global batch, in nats."""
    grad_norm: float
    """Before clipping."""
    flag: bool
    """Whether any rank raised its flag."""


class Engine:
    """One rank's part of the training state.

    The loss is the sum over target tokens divided by the targets of the *global* batch: the same whatever the layout.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig, plan: Plan, accelerator: Accelerator) -> None:
        import deepspeed

        self._config = config
        self._plan = plan
        self._device = torch.device(accelerator.torch_device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, foreach=False
        )
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, plan, _numel(model))
        )

    def step(self, share: Share, lr: float, flag: bool = False) -> StepResult:
        """One optimizer step on this rank's share of the global batch.

        Args:
            flag: true on any rank comes back true on all, on the collective that sums the loss.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        accumulation = math.ceil(share.largest / self._plan.micro_batch_size)
        # DeepSpeed averages over ranks: undo that, so that the loss is a plain sum over targets.
        scale = self._plan.data_parallel / share.targets
        total = torch.zeros((), dtype=torch.float64)
        for number, (tokens, counted) in enumerate(micro_batches(share, accumulation), 1):
            self._engine.set_gradient_accumulation_boundary(number == accumulation)
            loss = token_loss_sum(self._engine, tokens.to(self._device), counted)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            self._engine.step()
            total += loss.detach().to("cpu", torch.float64)
        summed = torch.tensor([float(total), float(flag)], dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        norm = self._engine.get_global_grad_norm()
        loss_sum, flags = summed.tolist()
        return StepResult(
            loss=loss_sum / share.targets, grad_norm=math.nan if norm is None else float(norm), flag=flags > 0
        )

    def save(self, saver: Saver, position: checkpoints.Position, held_out_loss: float | None = None) -> Timing:
        """Begin to commit a checkpoint; see Saver.save."""
        return saver.save(position, zero.engine_fragments(self._engine), held_out_loss)

    def load(self, directory: str, commit: checkpoints.Commit) -> None:
        """Take over the state of a checkpoint that any layout wrote."""
        with torch.no_grad():
            checkpoints.load(directory, commit, zero.engine_fragments(self._engine))
            zero.set_step(self._engine, commit.position.updates)
            zero.refresh_parameters(self._engine)


def micro_batches(share: Share, accumulation: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(tokens, which of them are counted) of a share in as many parts as every other rank's share has.

    The parts differ by one sequence at most. A rank that has too few gives one that counts for nothing: each part is a
    collective that all ranks take part in.
    """
    assert share.tokens is not None, "the role reads data"
    parts = np.array_split(share.tokens.astype(np.int64), accumulation)
    counts = [None] * accumulation if share.counted is None else np.array_split(share.counted, accumulation)
    for tokens, counted in zip(parts, counts, strict=True):
        if len(tokens):
            yield torch.from_numpy(tokens), None if counted is None else torch.from_numpy(counted)
        else:
            nothing = torch.zeros((1, share.tokens.shape[1]), dtype=torch.int64)
            yield nothing, torch.zeros_like(nothing, dtype=torch.bool)


def deepspeed_config(config: TrainConfig, plan: Plan, numel: int) -> dict[str, Any]:
    bucket = min(numel, 2 * 10**8)
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {
            "stage": plan.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": plan.accelerator != "cpu",
        },
        "bf16": {"enabled": plan.dtype == "bf16"},
        "fp16": {"enabled": plan.dtype == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def _numel(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
