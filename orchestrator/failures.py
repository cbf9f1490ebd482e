"""What to do when an attempt ends: a pure function of how it ended and what came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "finished",
    "stopped",
    "yielded",
    "worker_lost",
    "node_lost",
    "shard_lost",
    "checkpoint_damaged",
    "corruption",
    "not_finite",
    "spike",
    "user_error",
    "error",
]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended."""

    attempt: int
    outcome: Outcome
    message: str
    resumed_from: int
    """Step of the checkpoint it began from, 0 without one."""
    last_step: int
    """The last step that it recorded."""
    committed_step: int
    """Step of the newest checkpoint at its end."""
    lost_shard: str = ""
    """Name of the shard that it could not read."""
    failed_step: int = 0
    """The step whose loss was not finite, or jumped."""
    hint: str = ""
    """What its error says to do."""
    failed_at: float | None = None
    """When it failed, in unix seconds."""


@dataclass(frozen=True)
class Decision:
    action: Literal["finish", "restart", "give_up"]
    reason: str


def decide(endings: list[Ending], max_restarts: int, shard_allowance: int = 0, rollback_allowance: int = 0) -> Decision:
    """
    Args:
        endings: of every attempt so far, the newest last.
        max_restarts: in a row without a new checkpoint.
        shard_allowance: how many shards more could be lost; negative when more are lost than may be.
        rollback_allowance: how many times more the run may go back behind a spike.
    """
    last = endings[-1]
    if last.outcome in ("finished", "stopped"):
        return Decision("finish", last.outcome)
    if last.outcome == "yielded":
        return Decision("restart", f"makes way at step {last.committed_step}: {last.message}")
    if last.outcome == "user_error":
        return Decision("give_up", "a restart would meet it again")
    if last.outcome == "shard_lost":
        if shard_allowance < 0:
            return Decision("give_up", "training may not go on without it (train.max_lost_shards)")
        return Decision("restart", f"goes on without {last.lost_shard}: resume at step {last.committed_step}")
    if last.outcome == "checkpoint_damaged":
        return Decision("restart", f"goes on from the checkpoint before: resume at step {last.committed_step}")
    if last.outcome == "spike":
        if rollback_allowance <= 0:
            return Decision("give_up", "the run has gone back often enough (train.spikes.max_rollbacks)")
        return Decision("restart", f"goes back behind step {last.failed_step}")
    if last.outcome == "not_finite" and any(_same_step(before, last) for before in endings[:-1]):
        return Decision("give_up", f"step {last.failed_step} came to the same again, so that no device is to blame")
    if last.outcome == "error" and len(endings) > 1 and _same_error(endings[-2], last):
        return Decision("give_up", f"the same error twice after step {last.last_step}")
    fruitless = _restarts_without_progress(endings)
    if fruitless > max_restarts:
        return Decision("give_up", f"{fruitless} attempts in a row without a new checkpoint (train.max_restarts)")
    repeat = max(last.last_step - last.committed_step, 0)
    return Decision("restart", f"{last.outcome}: resume at step {last.committed_step}, {repeat} steps to repeat")


def _same_error(before: Ending, last: Ending) -> bool:
    return (before.outcome, before.message, before.last_step) == (last.outcome, last.message, last.last_step)


def _same_step(before: Ending, last: Ending) -> bool:
    return (before.outcome, before.failed_step) == (last.outcome, last.failed_step)


def _restarts_without_progress(endings: list[Ending]) -> int:
    count = 0
    for ending in reversed(endings):
        if ending.committed_step > ending.resumed_from:
            break
        count += 1
    return count
