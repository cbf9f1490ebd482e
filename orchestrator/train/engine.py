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
from orchestrator.planning.search import Plan
from orchestrator.train import checkpoints, fragments
from orchestrator.train.models import parameter_groups, token_loss_sum

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
        self._targets = config.global_batch_size * (config.sequence_length - 1)

    def step(self, tokens: np.ndarray, lr: float, flag: bool = False) -> StepResult:
        """One optimizer step on this rank's share of the global batch.

        Args:
            tokens: [global_batch / data_parallel, sequence_length].
            flag: true on any rank comes back true on all, on the collective that sums the loss.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over ranks and accumulation steps: undo both, so that the loss is a plain sum over targets.
        scale = self._plan.data_parallel * self._plan.accumulation / self._targets
        total = torch.zeros((), dtype=torch.float64)
        for micro_batch in self._micro_batches(tokens):
            loss = token_loss_sum(self._engine, micro_batch)
            self._engine.backward(loss * scale)
            self._engine.step()
            total += loss.detach().to("cpu", torch.float64)
        summed = torch.tensor([float(total), float(flag)], dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        norm = self._engine.get_global_grad_norm()
        loss_sum, flags = summed.tolist()
        return StepResult(
            loss=loss_sum / self._targets, grad_norm=math.nan if norm is None else float(norm), flag=flags > 0
        )

    def save(self, directory: str, attempt: int, parent: int | None, position: checkpoints.Position) -> Any:
        """Commit a checkpoint; see checkpoints.save."""
        state = fragments.engine_fragments(self._engine)
        return checkpoints.save(directory, attempt, parent, position, state)

    def load(self, directory: str, commit: checkpoints.Commit) -> None:
        """Take over the state of a checkpoint that any layout wrote."""
        with torch.no_grad():
            checkpoints.load(directory, commit, fragments.engine_fragments(self._engine))
            fragments.set_step(self._engine, commit.step)
            fragments.refresh_parameters(self._engine)

    def _micro_batches(self, tokens: np.ndarray) -> Iterator[torch.Tensor]:
        for part in np.split(tokens.astype(np.int64), self._plan.accumulation):
            yield torch.from_numpy(part).to(self._device)


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
