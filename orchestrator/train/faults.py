"""The faults of a recipe that strike inside a rank, each once over all attempts and drivers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.fault_config import BaseFault, ErrorRank, HangRank, KillRank, OomRank, RankFault, SlowRank
from orchestrator.runs import RunDir

log = logging.getLogger("terrane.worker")

ABSURD_BYTES = 2**60
_SLICE_S = 0.04
"""Of time that a slowed process runs in one go."""


class Faults:
    """
    Args:
        faults: of the recipe; those of other ranks, and those played from outside, are passed over.
        device: of this rank, as torch names it.
    """

    def __init__(self, run: RunDir, faults: Sequence[BaseFault], rank: int, workers: int, device: str) -> None:
        self._run = run
        self._rank = rank
        self._mine = [fault for fault in faults if isinstance(fault, RankFault) and fault.rank % workers == rank]
        self._device = device
        self._slowed: tuple[int, _Slowed] | None = None

    def strike(self, step: int, close_saver: Callable[[], None]) -> None:
        """Call it after every step.

        Args:
            close_saver: ends the saves in progress. A killed rank calls it first, so that a recipe always goes on from
                the same step.
        """
        if self._slowed and step >= self._slowed[0]:
            self.close()
        for fault in self._mine:
            if fault.step == step and self._run.claim_fault(fault):
                self._run.log_event("fault_injected", kind=fault.kind, name=fault.name, rank=self._rank, step=step)
                log.warning("step %d: %s of the recipe's faults strikes this rank", step, fault.kind)
                self._act(fault, close_saver)

    def _act(self, fault: RankFault, close_saver: Callable[[], None]) -> None:
        match fault:
            case KillRank():
                close_saver()
                os.kill(os.getpid(), signal.SIGKILL)
            case HangRank():
                os.kill(os.getpid(), signal.SIGSTOP)
            case OomRank():
                run_out_of_memory(self._device)
            case ErrorRank():
                raise RuntimeError(f"error_rank of the recipe's faults, at step {fault.step}")
            case SlowRank(factor=factor, steps=steps):
                self.close()
                self._slowed = fault.step + steps, _Slowed(os.getpid(), factor)

    def close(self) -> None:
        """A slowed rank is as fast as before."""
        if self._slowed:
            self._slowed[1].end()
            self._slowed = None


def run_out_of_memory(device: str) -> Any:
    """
    Raises:
        torch.OutOfMemoryError: on a GPU.
        RuntimeError: of torch's allocator, on a CPU.
    """
    import torch

    return torch.empty(ABSURD_BYTES, dtype=torch.uint8, device=device)


class _Slowed:
    """A process that is stopped for a part of the time, by another that ends with it."""

    _SCRIPT = """
        trap 'kill -CONT $1; exit' TERM
        while kill -STOP $1; do sleep $2; kill -CONT $1; sleep $3; done
    """

    def __init__(self, pid: int, factor: float) -> None:
        times = f"{_SLICE_S * (factor - 1):.3f}", f"{_SLICE_S:.3f}"
        command = ["sh", "-c", self._SCRIPT, "slow", str(pid), *times]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()
