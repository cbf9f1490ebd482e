"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from orchestrator.train_config import TrainConfig

DECAY_SHARE = 0.2
"""Of a run, for the decay of wsd (Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", 2024)."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step counted from 1, whose own tokens count as seen: linear warm-up, then the schedule."""
    by_tokens = config.rates_by_tokens
    at, end = (config.tokens(step), config.tokens(config.steps)) if by_tokens else (step, config.steps)
    warmup = (config.warmup_tokens if by_tokens else config.warmup_steps) or 0
    if at < warmup:
        return config.lr * at / warmup
    if config.schedule == "constant":
        return config.lr
    decay = end - warmup
    if config.schedule == "wsd":
        decay = (config.decay_tokens if by_tokens else config.decay_steps) or min(math.ceil(end * DECAY_SHARE), decay)
    progress = max(at - (end - decay), 0) / max(decay, 1)
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * _left(config.schedule, progress))


def _left(schedule: str, progress: float) -> float:
    """How much of the way down is still to go, from 1 to 0."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - math.sqrt(progress)  # better than linear at every length that Haegele et al. (2024) tried
