"""A worker's watch over its steps: what is not finite ends the attempt, a loss spike is named and acted upon.

All ranks see the same loss and gradient norm, so that they judge alike and take part in the same collectives.
Imports no Ray.
"""

from __future__ import annotations

import io
import logging
import math
import socket
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data.order import Order
from orchestrator.errors import LossSpike, NotFinite
from orchestrator.runs import RunDir
from orchestrator.train.sample_losses import SampleLosses, Samples, gathered, rank, unique
from orchestrator.train.spikes import Detector, Spike, suspects
from orchestrator.train_config import SpikesConfig

log = logging.getLogger("terrane.worker")

NAMED = 8
"""Suspects of a spike that are named, at most."""


class Watch:
    """Judges every step before its update is made, and acts after it."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        config: SpikesConfig,
        order: Order,
        samples: SampleLosses,
        *,
        fp16: bool,
        state: dict[str, Any],
    ) -> None:
        """Every rank makes one, at once.

        Args:
            fp16: gradient norms may overflow now and then.
            state: of the watch that went before, empty at the beginning.
        """
        self._run = run
        self._attempt = attempt
        self._config = config
        self._order = order
        self._samples = samples
        self._fp16 = fp16
        self._detector = Detector(config.threshold, config.window, state)
        self._stage = state.get("stage")
        self._spike: Spike | None = None
        self._hosts = gathered(socket.gethostname())
        self._writes = rank() == 0

    def accepts(self, step: int) -> Callable[[float, float], bool]:
        """What the engine asks before it makes the update of a step: may it, by loss and gradient norm?"""
        stage = self._order.stage(step)
        if stage != self._stage:  # another mixture has another loss
            self._detector.forget()
            self._stage = stage
        return self._accept

    def _accept(self, loss: float, grad_norm: float) -> bool:
        self._spike = self._detector.judge(loss, grad_norm)
        if not self._finite(loss, grad_norm):
            return False
        return self._spike is None or self._config.action == "record"

    def _finite(self, loss: float, grad_norm: float) -> bool:
        return math.isfinite(loss) and (self._fp16 or math.isfinite(grad_norm))

    def follow(self, step: int, result: Any) -> None:
        """Act on a step, once it is recorded. Every rank calls it.

        Args:
            result: the engine's StepResult.

        Raises:
            NotFinite: its loss or gradient norm is no number; names ranks, hosts and documents.
            LossSpike: it is a spike, and training is to go back behind it.
        """
        self._samples.add(step, result.sample_losses)
        if not self._finite(result.loss, result.grad_norm):
            raise self._not_finite(step, result)
        if self._spike:
            self._act(step, self._spike)

    def state(self) -> dict[str, Any]:
        """What the next attempt needs to judge as this one would have, as JSON values."""
        return {**self._detector.state(), "stage": self._stage}

    def _not_finite(self, step: int, result: Any) -> NotFinite:
        what, value = ("gradient norm", result.grad_norm) if math.isfinite(result.loss) else ("loss", result.loss)
        message = f"{what} is {value} at step {step}"
        if result.broken_ranks:
            message += ", from " + ", ".join(
                f"rank {number} on {self._hosts[number]}" for number in result.broken_ranks
            )
        samples = self._samples.everyone().of_step(step)
        names = gathered(self._culprits(samples) if self._writes else [])
        if documents := unique(chain(*names)):
            message += f"; what is not finite is of {', '.join(documents)}"
        hint = (
            f"train.skip_steps=[[{step}, {step}]] passes over the step; train.quarantine leaves out documents, which "
            f"terrane corpus {self._run.uri} --trace {step} names"
        )
        return NotFinite(message, hint, step)

    def _culprits(self, samples: Samples) -> list[str]:
        """The documents of samples that are not finite; none where all are not, since then it is not for a document."""
        wrong = samples.ids[~np.isfinite(samples.losses)]
        if not 0 < len(wrong) < len(samples.ids):
            return []
        return unique(chain(*self._samples.documents(wrong[:NAMED].tolist())))[:NAMED]

    def _act(self, step: int, spike: Spike) -> None:
        samples = self._samples.everyone()
        if self._writes:
            self._tell(step, spike, samples)
        gathered(None)  # the first rank that ends ends all, and one of them still writes
        if self._config.action == "rollback":
            message = f"loss spike at step {step}: {_in_words(spike)}"
            hint = f"terrane status {self._run.uri} names the documents behind it; lower train.lr, or let the run go "
            raise LossSpike(message, f"{hint}back more often (train.spikes.max_rollbacks)", step)

    def _tell(self, step: int, spike: Spike, samples: Samples) -> None:
        """Keep what is known of a spike: its measure, the samples whose losses stand out, and their documents."""
        worst = suspects(samples.steps, samples.ids, samples.losses, self._config.threshold, NAMED)
        documents = self._samples.documents([suspect.sample for suspect in worst])
        named = unique(chain(*documents))
        facts = {
            "attempt": self._attempt,
            "step": step,
            **vars(spike),
            "action": self._config.action,
            "documents": named,
            "quarantined": named[: self._config.most_quarantined],
        }
        storage.write(self._run.sample_losses(self._attempt, step), _packed(samples))
        told = [{**vars(suspect), "documents": names} for suspect, names in zip(worst, documents, strict=True)]
        self._run.write_json(self._run.spike(self._attempt, step), {**facts, "suspects": told})
        self._run.log_event("spike", **facts)
        by = f"; suspected: {', '.join(named)}" if named else "; no sample stands out"
        log.warning("step %d: loss spike (%s): %s%s", step, self._config.action, _in_words(spike), by)


def _in_words(spike: Spike) -> str:
    return f"loss {spike.loss:.4g} (z {spike.loss_z:.1f}), gradient norm {spike.grad_norm:.3g} (z {spike.norm_z:.1f})"


def _packed(samples: Samples) -> bytes:
    """As a file of numpy."""
    with io.BytesIO() as file:
        np.savez(file, **vars(samples))
        return file.getvalue()
