"""Loss spikes: which steps are some, which samples stand behind them, and how far to go back. Pure.

A step is a spike when its loss or its gradient norm lies far above those of the steps before it, by a robust z-score: a
distance from a median in units of a median absolute deviation (Iglewicz and Hoaglin, "How to Detect and Handle
Outliers", 1993). A loss falls, fast at first: so the median is that of the newest steps, and the deviation that of the
differences from step to step, which a trend hardly touches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOSS_FLOOR = 0.005
NORM_FLOOR = 0.25
SAMPLE_FLOOR = 0.02
"""Least deviation, as a share of the median: what is smaller is no news, however smooth the curve. Gradient norms of
healthy runs double now and then; clipping takes care of that."""
IN_A_ROW = 5
"""Spikes that may follow each other. With the next one they are the new level, as after a change of the data."""
_MAD_OF_NORMAL = 1.4826


@dataclass(frozen=True, kw_only=True)
class Spike:
    loss: float
    grad_norm: float
    loss_z: float
    norm_z: float


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A sample whose loss stands out among those of its step."""

    sample: int
    step: int
    loss: float
    z: float


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Going back behind a spike: training resumes after `back_to`, and passes over first..last."""

    attempt: int
    """That ended with the spike; what it and those before it committed after `back_to` no longer counts."""
    step: int
    """Of the spike."""
    back_to: int
    first: int
    last: int

    @property
    def passed(self) -> tuple[int, int]:
        """First and last step that are passed over."""
        return self.first, self.last


class Detector:
    """Judges one step after the other. Equal losses and norms are judged equally on every rank, and after a restart."""

    def __init__(self, threshold: float, window: int, state: dict[str, Any] | None = None) -> None:
        """
        Args:
            threshold: z-score from which a step is a spike.
            window: steps that a step is compared with, at most; with less than half of them nothing is a spike.
            state: of the detector that went before.
        """
        self._threshold = threshold
        self._window = window
        self._past = _pairs((state or {}).get("past", []), window)
        self._spikes = _pairs((state or {}).get("spikes", []), IN_A_ROW)

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """Whether a step is a spike; remembers it, unless it is one. What is not finite is not judged."""
        if not np.isfinite([loss, grad_norm]).all():
            return None
        spike = self._compared(loss, grad_norm)
        if spike and len(self._spikes) < IN_A_ROW:
            self._spikes.append((loss, grad_norm))
            return spike
        if spike:
            self._past = _pairs(self._spikes, self._window)
        self._spikes.clear()
        self._past.append((loss, grad_norm))
        return None

    def forget(self) -> None:
        """The steps to come are not to be compared with those before."""
        self._past.clear()
        self._spikes.clear()

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"past": [list(pair) for pair in self._past], "spikes": [list(pair) for pair in self._spikes]}

    def _compared(self, loss: float, grad_norm: float) -> Spike | None:
        if len(self._past) < self._window / 2:
            return None
        losses, norms = np.array(self._past).T
        recent = self._window // 4
        loss_z, norm_z = _above(loss, losses, recent, LOSS_FLOOR), _above(grad_norm, norms, recent, NORM_FLOOR)
        if max(loss_z, norm_z) < self._threshold:
            return None
        return Spike(loss=loss, grad_norm=grad_norm, loss_z=loss_z, norm_z=norm_z)


def _above(value: float, past: np.ndarray, recent: int, floor: float) -> float:
    """How far a value lies above the newest of a series, by the noise of the whole."""
    median = float(np.median(past[-recent:]))
    deviation = _MAD_OF_NORMAL * float(np.median(np.abs(np.diff(past)))) / math.sqrt(2)
    return (value - median) / max(deviation, floor * abs(median), 1e-12)


def robust_scores(values: np.ndarray, floor: float) -> np.ndarray:
    """How far each of some values lies above them all, like values."""
    median = np.median(values)
    deviation = _MAD_OF_NORMAL * np.median(np.abs(values - median))
    found: np.ndarray = (values - median) / max(deviation, floor * abs(median), 1e-12)
    return found


def suspects(steps: np.ndarray, samples: np.ndarray, losses: np.ndarray, threshold: float, most: int) -> list[Suspect]:
    """The samples of some steps whose losses stand out, the worst first; one that is not finite is the worst there is.

    Each is compared with its own step: in a state that has gone wrong all losses are high, and no sample is to blame.

    Args:
        steps, samples, losses: of every sample, alike in length. A sample that stands there twice counts once.
    """
    _, first = np.unique(samples, return_index=True)
    steps, samples, losses = steps[first], samples[first], losses[first].astype(np.float64)
    scores = np.full(len(losses), np.inf)
    for step in np.unique(steps):
        here = np.flatnonzero((steps == step) & np.isfinite(losses))
        if len(here):
            scores[here] = robust_scores(losses[here], SAMPLE_FLOOR)
    worst = [place for place in np.argsort(-scores, kind="stable") if scores[place] >= threshold][:most]
    return [
        Suspect(sample=int(samples[n]), step=int(steps[n]), loss=float(losses[n]), z=float(scores[n])) for n in worst
    ]


def rollback(*, attempt: int, step: int, jump: int, committed: Sequence[int], steps: int) -> Rollback:
    """Where to go back to after a spike, and what to pass over then.

    PaLM (Chowdhery et al., 2022, 5.1) went back a hundred steps and passed over the batches around the spike, those
    before it included: the same batches did no harm from another state, so it is not they alone.

    Args:
        jump: steps to pass over on each side of the spike.
        committed: steps of the checkpoints that there are.
        steps: of the whole run.
    """
    before = [found for found in committed if found < step]
    clear = [found for found in before if found < step - jump]
    back_to = max(clear) if clear else min(before, default=0)
    return Rollback(
        attempt=attempt,
        step=step,
        back_to=back_to,
        first=max(step - jump, back_to + 1),
        last=min(step + jump, steps),
    )


def _pairs(values: Any, most: int) -> deque[tuple[float, float]]:
    return deque(((loss, norm) for loss, norm in values), maxlen=most)
