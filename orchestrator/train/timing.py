"""How long the forward passes of a step take on this rank alone, so that slow ranks can be told from fast ones.

A synchronous step takes equally long on all ranks: who is fast waits for who is slow, in the backward pass or the
update. The forward pass waits for nobody, but under tensor parallelism for the ranks of the same replica, and under
ZeRO-3, which fetches the parameters of every layer from all ranks, for everybody: there it tells nothing. Imports
no Ray.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn


class ForwardTimer:
    """Times every call of a module. On a GPU it takes events of the stream, and waits for none."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._sequences = 0
        self._started: list[Any] = []
        self._ended: list[Any] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def restart(self) -> None:
        """Forget what was timed."""
        self._sequences = 0
        self._started, self._ended = [], []

    def seconds_a_sequence(self) -> float:
        """Of the calls since the restart; NaN where there was none, or the device has not come to its end."""
        if not self._sequences or (self._on_gpu and not self._ended[-1].query()):
            return math.nan
        return sum(map(self._seconds, self._started, self._ended)) / self._sequences

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        values = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        self._sequences += len(values)
        self._started.append(self._now())

    def _end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._ended.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self._on_gpu else float(end - start)
