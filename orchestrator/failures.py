"""What to do when an attempt ends: a pure function of how it ended and what came before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "finished",
    "stopped",
    "yielded",
    "worker_lost",
    "out_of_memory",
    "node_lost",
    "network",
    "storage",
    "hang",
    "shard_lost",
    "checkpoint_damaged",
    "corruption",
    "not_finite",
    "spike",
    "error",
    "user_error",
]
"""stopped: the user asked. yielded: the supervisor asked, to go on with another plan."""


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
    plan: str = ""
    """What it ran as: `Plan.in_full`."""
    failed_at: float | None = None
    """When it failed, in unix seconds."""


@dataclass(frozen=True)
class Decision:
    action: Literal["finish", "restart", "give_up"]
    reason: str
    wait_s: float = 0.0
    """Before the next attempt."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What failures of one kind may cost, in a row without a new checkpoint."""

    restarts: int | None = None
    """None: as many as there may be of all kinds."""
    at_once: int = 0
    """Restarts before which there is nothing to wait for."""
    wait_s: float = 0.0
    """Before the first restart after those; doubles with each."""
    longest_s: float = 300.0

    def wait(self, failures: int) -> float:
        """Seconds, after so many in a row, of which the newest is one."""
        doublings = failures - 1 - self.at_once
        if doublings < 0 or not self.wait_s:
            return 0.0
        return min(self.wait_s * 2.0 ** min(doublings, 32), self.longest_s)


BUDGETS: dict[Outcome, Budget] = {
    # Nothing is mended by waiting, unless it goes on.
    "worker_lost": Budget(at_once=2, wait_s=5),
    # The cluster knows by then that the node is gone; if others follow, something larger is going on.
    "node_lost": Budget(at_once=1, wait_s=5),
    # Ray takes from seconds to a minute to notice a node behind a cut link.
    "network": Budget(wait_s=5),
    # boto3 has retried for a while; an outage lasts from minutes to an hour.
    "storage": Budget(wait_s=5, longest_s=900),
    # Every restart asks for less memory.
    "out_of_memory": Budget(restarts=5),
    # Each costs the time after which a hang is called one.
    "hang": Budget(restarts=3, wait_s=5),
    # Most likely a bug: what is worth a few tries, and not a night of them.
    "error": Budget(restarts=5, at_once=1, wait_s=5),
}
"""Ten restarts in a row, which `train.max_restarts` allows unless told otherwise, wait for a quarter of an hour in all
after lost workers, 25 minutes after a cut network, and 50 minutes after errors of storage."""

WITHOUT_COUNT: frozenset[Outcome] = frozenset({"yielded", "shard_lost", "checkpoint_damaged", "spike"})
"""Endings that are no failure in a row: they were asked for, or what caused them is out of the next attempt's way."""


def decide(
    endings: Sequence[Ending], max_restarts: int, shard_allowance: int = 0, rollback_allowance: int = 0
) -> Decision:
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
    if last.outcome == "user_error":
        return Decision("give_up", "a restart would meet it again")
    if last.outcome == "yielded":
        return Decision("restart", f"{last.message or 'asked to'}: goes on at step {last.committed_step}")
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
    return _after_a_failure(endings, max_restarts)


def _after_a_failure(endings: Sequence[Ending], max_restarts: int) -> Decision:
    last = endings[-1]
    if again := _came_again(endings):
        return Decision("give_up", again)
    in_a_row = _failures_in_a_row(endings)
    alike = [ending for ending in in_a_row if ending.outcome == last.outcome]
    budget = BUDGETS.get(last.outcome, Budget())
    if len(in_a_row) > max_restarts:
        return Decision("give_up", f"{len(in_a_row)} attempts in a row without a new checkpoint (train.max_restarts)")
    if budget.restarts is not None and len(alike) > budget.restarts:
        times = f"{len(alike)} times without a new checkpoint"
        return Decision("give_up", f"{last.outcome} {times}, and more of the same will not help")
    wait_s = budget.wait(max(len(alike), 1))
    repeat = max(last.last_step - last.committed_step, 0)
    less = " with less memory" if last.outcome == "out_of_memory" else ""
    later = f", in {wait_s:.0f} s" if wait_s else ""
    steps = f"resume{less} at step {last.committed_step}, {repeat} steps to repeat{later}"
    return Decision("restart", f"{last.outcome}: {steps}", wait_s)


def _failures_in_a_row(endings: Sequence[Ending]) -> list[Ending]:
    """Since the last attempt that left a new checkpoint."""
    found: list[Ending] = []
    for ending in reversed(endings):
        if ending.committed_step > ending.resumed_from:
            break
        if ending.outcome not in WITHOUT_COUNT:
            found.append(ending)
    return found


# --- the same twice ---------------------------------------------------------------------------------------------------


def _came_again(endings: Sequence[Ending]) -> str:
    """Why another try would end as this one did, if it would."""
    last = endings[-1]
    if last.outcome == "not_finite":
        if any(_where(before) == _where(last) for before in endings[:-1]):
            return f"step {last.failed_step} came to the same again, so that no device is to blame"
    elif last.outcome in ("error", "hang", "out_of_memory"):
        for before in reversed(endings[:-1]):
            if before.last_step > last.last_step:
                break  # it was passed in between
            if _where(before) == _where(last):
                return f"the same {last.outcome.replace('_', ' ')} twice after step {last.last_step}"
    return ""


def _where(ending: Ending) -> tuple[object, ...]:
    """What two endings share that are the same."""
    match ending.outcome:
        case "not_finite":
            return ending.outcome, ending.failed_step
        case "error":
            return ending.outcome, ending.last_step, _PASSING.sub("", ending.message)
        case _:
            return ending.outcome, ending.last_step, ending.plan


_PASSING = re.compile(r"^ranks? [^:]*: |\b0x[0-9a-f]+\b|\bpid=\d+\b")
"""What differs between two messages of the same error: who told it first, and addresses."""
