"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from orchestrator.config import TrainConfig

FINAL_SHARE = 0.1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step counted from 1: linear warm-up, then the schedule down to a tenth at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    share = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * share)
