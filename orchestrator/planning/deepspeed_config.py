"""The DeepSpeed configuration of a plan: what the engine starts with, and what `terrane plan` shows."""

from __future__ import annotations

from typing import Any, Protocol

from orchestrator.train_config import TrainConfig


class Laid(Protocol):
    """A plan, of whatever kind."""

    @property
    def accelerator(self) -> str: ...
    @property
    def zero_stage(self) -> int: ...
    @property
    def offload(self) -> bool: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def dtype(self) -> str: ...


def deepspeed_config(config: TrainConfig, plan: Laid, numel: int) -> dict[str, Any]:
    """
    Args:
        numel: elements of the parameters of one rank, before ZeRO splits them.
    """
    bucket = min(numel, 2 * 10**8)
    on_gpu = plan.accelerator != "cpu"
    zero_optimization: dict[str, Any] = {
        "stage": plan.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": on_gpu,
    }
    if plan.offload:
        zero_optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # ZeRO-0 clips without telling the norm: orchestrator.train.zero does it there.
        "gradient_clipping": config.clip_norm if plan.zero_stage else 0.0,
        "zero_optimization": zero_optimization,
        "bf16": {"enabled": plan.dtype == "bf16"},
        "fp16": {"enabled": plan.dtype == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
