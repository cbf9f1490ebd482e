"""What an attempt's end was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import (
    CheckpointDamaged,
    LossSpike,
    NotFinite,
    ShardLost,
    SilentCorruption,
    UserError,
)
from orchestrator.failures import Outcome

_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Broken pipe")
_OUTCOMES = {
    ShardLost: "shard_lost",
    CheckpointDamaged: "checkpoint_damaged",
    SilentCorruption: "corruption",
    NotFinite: "not_finite",
    LossSpike: "spike",
}


@dataclass(frozen=True, kw_only=True)
class Death:
    rank: int
    node_id: str
    oom_kills: int
    node_memory_share: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    errors: Mapping[int, BaseException]
    deaths: tuple[Death, ...]
    lost_nodes: tuple[str, ...]
    fit_error: Exception | None
    hang: str = ""
    yielded: str = ""
    finished: bool = False
    failed_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    message: str
    cause: UserError | None = None


def raised_alike(errors: Mapping[int, BaseException]) -> bool:
    return bool(errors) and all(isinstance(e, UserError) for e in errors.values())


def judge(evidence: Evidence) -> Verdict:
    if evidence.finished:
        return Verdict(outcome="finished", message="")
    for e in evidence.errors.values():
        if isinstance(e, UserError):
            known = (o for k, o in _OUTCOMES.items() if isinstance(e, k))
            return Verdict(outcome=next(known, "user_error"), message=e.message, cause=e)
    if evidence.deaths:
        return Verdict(outcome="worker_lost", message=f"rank {evidence.deaths[0].rank}: its process ended")
    if evidence.lost_nodes:
        return Verdict(outcome="node_lost", message=f"{evidence.lost_nodes}")
    for rank, e in evidence.errors.items():
        if any(sign in str(e) for sign in _PEER_LOST):
            return Verdict(outcome="worker_lost", message=f"rank {rank} lost a peer: {e}")
    for rank, e in evidence.errors.items():
        return Verdict(outcome="error", message=f"rank {rank}: {type(e).__name__}: {e}")
    return Verdict(outcome="error", message=f"{type(evidence.fit_error).__name__}: {evidence.fit_error}")


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
