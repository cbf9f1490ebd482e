"""What the end of an attempt was: its cause, told from the consequences that were seen along with it.

Pure. The errors of Ray, torch and boto3 are known by the names of their classes and by their words: they arrive
wrapped, rebuilt by pickle without their causes, or as text alone; and telling them apart is to import none of these.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.errors import (
    CheckpointDamaged,
    LastingStorageError,
    LossSpike,
    NotFinite,
    PeerFailed,
    ShardLost,
    SilentCorruption,
    StepFailed,
    StorageError,
    UserError,
)
from orchestrator.failures import Outcome

CAUSE_S = 0.3
ALIKE_S = 30.0
"""Where every rank raises the same: another may have a save to finish before."""
LOST_PEER_S = 8.0
"""Where all that is known is a lost connection: Ray takes seconds to tell that a node is gone."""


@dataclass(frozen=True, kw_only=True)
class Death:
    """A worker's process that ended without a word, with what the agent of its node saw."""

    rank: int
    node_id: str
    oom_kills: int = 0
    """By how much the kernel's count of out-of-memory kills has grown since the attempt began."""
    node_memory_share: float = 0.0
    """Of the node's memory that was in use just before."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was seen of an attempt's end."""

    errors: Mapping[int, BaseException] = field(default_factory=dict)
    """By rank, as the workers raised them."""
    deaths: tuple[Death, ...] = ()
    lost_nodes: tuple[str, ...] = ()
    """Ids of the attempt's nodes that have left the cluster."""
    fit_error: Exception | None = None
    """What `TorchTrainer.fit()` raised."""
    hang: str = ""
    """In words, where the attempt was ended because it made no step."""
    yielded: str = ""
    """Why the workers were asked to commit and leave, if they were."""
    finished: bool = False
    """Every worker has returned."""
    failed_at: float | None = None
    """When the first sign of it was seen, in unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    message: str
    cause: UserError | None = None
    """The error that a user can act on, where it is one."""
    ranks: tuple[int, ...] = ()
    """Those that the cause was seen on."""
    node_ids: tuple[str, ...] = ()
    """Those that it lies with, as far as that is known."""


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What one piece of evidence says by itself."""

    outcome: Outcome
    what: str
    rank: int | None = None
    node_id: str = ""
    cause: UserError | None = None


_ORDER: tuple[Outcome, ...] = (
    "user_error",
    "corruption",
    "not_finite",
    "spike",
    "shard_lost",
    "checkpoint_damaged",
    "out_of_memory",
    "node_lost",
    "hang",
    "worker_lost",
    "storage",
    "error",
    "network",
)
"""Causes before what follows from them: a node takes its workers with it; those who wait for a rank that is gone lose a
connection; and what is ended for a hang dies of that."""


def judge(evidence: Evidence) -> Verdict:
    """The cause of an attempt's end."""
    if evidence.finished:
        return Verdict(outcome="yielded" if evidence.yielded else "finished", message=evidence.yielded)
    findings = list(_findings(evidence))
    if not findings:
        return Verdict(outcome="error", message="it ended without a word of why")
    outcome = min((finding.outcome for finding in findings), key=_ORDER.index)
    said = [finding for finding in findings if finding.outcome == outcome]
    ranks = sorted({finding.rank for finding in said if finding.rank is not None})
    cause = next((finding.cause for finding in said if finding.cause), None)
    return Verdict(
        outcome=outcome,
        message=cause.message if cause else f"{_in_words(ranks)}{said[0].what}",
        cause=cause,
        ranks=tuple(ranks),
        node_ids=tuple(dict.fromkeys(finding.node_id for finding in said if finding.node_id)),
    )


def of_storage(error: BaseException) -> bool:
    """Whether storage has failed, in a way that may pass, in a process that uses the network for nothing else."""
    outcome = judge(Evidence(errors={0: error})).outcome
    return outcome == "storage" or (outcome == "network" and isinstance(error, OSError))


def patience_s(evidence: Evidence) -> float:
    """How long to wait for more evidence after this: a cause may be seen after its consequence."""
    if not evidence.deaths and not evidence.lost_nodes:
        if evidence.errors and all(isinstance(error, _RAISED_ALIKE) for error in evidence.errors.values()):
            return ALIKE_S
        if judge(evidence).outcome == "network":
            return LOST_PEER_S
    return CAUSE_S


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _findings(evidence: Evidence) -> Iterator[_Finding]:
    for rank, error in _errors(evidence):
        yield _of_error(rank, error)
    for node_id in evidence.lost_nodes:
        yield _Finding(outcome="node_lost", what=f"node {node_id[:12]} left the cluster", node_id=node_id)
    for death in sorted(evidence.deaths, key=lambda death: death.rank):
        yield _of_death(death)
    if evidence.hang:
        yield _Finding(outcome="hang", what=evidence.hang)


def _errors(evidence: Evidence) -> Iterator[tuple[int | None, BaseException]]:
    """By rank; what a worker said itself goes before what Ray Train says of it."""
    failures: Mapping[int, BaseException] = getattr(evidence.fit_error, "worker_failures", {})
    yield from sorted({**failures, **evidence.errors}.items())
    if evidence.fit_error is not None and not failures:
        yield None, evidence.fit_error


def _in_words(ranks: list[int]) -> str:
    if not ranks:
        return ""
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}: "


# --- a death ----------------------------------------------------------------------------------------------------------

FULL = 0.95
"""Share of a node's memory in use from which Ray's memory monitor, too, ends workers."""


def _of_death(death: Death) -> _Finding:
    place = f"on node {death.node_id[:12]}"
    if not death.oom_kills and death.node_memory_share < FULL:
        what = f"its process {place} ended without a word"
        return _Finding(outcome="worker_lost", what=what, rank=death.rank, node_id=death.node_id)
    signs = ["the kernel has killed for want of memory"] * bool(death.oom_kills)
    signs += [f"{death.node_memory_share:.0%} of the memory was in use"] * (death.node_memory_share >= FULL)
    what = f"out of memory: its process {place} was killed ({', '.join(signs)})"
    return _Finding(outcome="out_of_memory", what=what, rank=death.rank, node_id=death.node_id)


# --- an error ---------------------------------------------------------------------------------------------------------

_RAISED_ALIKE = (StepFailed, SilentCorruption, CheckpointDamaged)

_KNOWN: tuple[tuple[type[UserError], Outcome], ...] = (
    (ShardLost, "shard_lost"),
    (CheckpointDamaged, "checkpoint_damaged"),
    (LastingStorageError, "user_error"),
    (StorageError, "storage"),
    (SilentCorruption, "corruption"),
    (NotFinite, "not_finite"),
    (LossSpike, "spike"),
    (UserError, "user_error"),
)
"""The first that fits. All but the last end the attempt alone."""


def _of_error(rank: int | None, error: BaseException) -> _Finding:
    chain = _chain(error)
    for inner in chain:
        if isinstance(inner, UserError):
            outcome = next(outcome for kind, outcome in _KNOWN if isinstance(inner, kind))
            return _Finding(outcome=outcome, what=inner.message, rank=rank, cause=inner)
    for sign in _SIGNS:
        found = next((inner for inner in chain if sign.fits(inner)), None)
        if found:
            return _Finding(outcome=sign.outcome, what=sign.tell(found), rank=rank)
    return _Finding(outcome="error", what=_named(chain[-1]), rank=rank)


_WRAPPED = ("_base_exc", "health_check_failure", "controller_failure", "cause", "__cause__")
"""Where Ray Train, Ray and Python keep the error that another is about."""


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it wraps or comes from, outermost first; an error of the user's is the last word."""
    found: list[BaseException] = []
    pending = [error]
    while pending:
        outer = pending.pop(0)
        if any(outer is known for known in found):
            continue
        inner = [getattr(outer, name, None) for name in _WRAPPED]
        # torch.distributed.checkpoint: (error, traceback) by rank
        failures = getattr(outer, "failures", None)
        inner += [failure[0] for failure in failures.values()] if isinstance(failures, Mapping) else []
        inside = [each for each in inner if isinstance(each, BaseException)]
        if isinstance(outer, UserError):
            rays_copy = _is(outer, "RayTaskError")  # of the class of what it wraps
            return [*found, *inside[:1]] if rays_copy and inside else [*found, outer]
        found.append(outer)
        pending += inside
    return found


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """What an error of some kind is known by: any of these."""

    outcome: Outcome
    classes: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    errnos: frozenset[int] = frozenset()
    words: tuple[str, ...] = ()
    telling: str = ""
    """What to say before the error's own first line."""
    instead: str = ""
    """What to say in place of it."""

    def fits(self, error: BaseException) -> bool:
        return (
            _is(error, *self.classes)
            or type(error).__module__.split(".")[0] in self.packages
            or (isinstance(error, OSError) and error.errno in self.errnos)
            or any(word in str(error) for word in self.words)
        )

    def tell(self, error: BaseException) -> str:
        return self.instead or f"{self.telling}{first_line(_named(error))}"


_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_STORAGE_ERRNOS = (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO)
_REFUSED_ERRNOS = (errno.EACCES, errno.EPERM)
_NETWORK_ERRNOS = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN)


def _said(*errnos: int) -> tuple[str, ...]:
    """How they read where only the words are left."""
    return tuple(f"[Errno {number}] {os.strerror(number)}" for number in errnos)


_SIGNS = (
    _Sign(
        outcome="out_of_memory",
        classes=frozenset({"OutOfMemoryError", "MemoryError"}),
        errnos=frozenset({errno.ENOMEM}),
        words=(
            "CUDA out of memory",
            "HIP out of memory",
            "CUDA error: out of memory",
            "HIP error: out of memory",
            "DefaultCPUAllocator: can't allocate memory",
            "DefaultCPUAllocator: not enough memory",
            "OutOfMemoryError: ",
            "MemoryError: ",
            "std::bad_alloc",
            "Worker exit type: NODE_OUT_OF_MEMORY",  # Ray's texts on any other death name the OOM killer, too
            "due to the node running low on memory",
            *_said(errno.ENOMEM),
        ),
        telling="out of memory: ",
    ),
    _Sign(
        outcome="node_lost",
        classes=frozenset({"NodeDiedError", "LocalRayletDiedError", "PreemptionError"}),
        words=("The actor died because its node has died", "the actor's node was"),
        instead="its node left the cluster",
    ),
    _Sign(
        outcome="worker_lost",
        classes=frozenset({"RayActorError", "WorkerCrashedError"}),
        instead="its process ended without a word",
    ),
    _Sign(
        outcome="storage",
        classes=frozenset({"OutOfDiskError"}),
        errnos=frozenset(_FULL_ERRNOS),
        words=tuple(os.strerror(number) for number in _FULL_ERRNOS),
        telling="the disk is full: ",
    ),
    _Sign(
        outcome="error",  # no wait makes it right: the second time the run stops
        errnos=frozenset(_REFUSED_ERRNOS),
        words=(
            *_said(*_REFUSED_ERRNOS),
            "An error occurred (AccessDenied)",
            "An error occurred (InvalidAccessKeyId)",
            "An error occurred (SignatureDoesNotMatch)",
            "An error occurred (NoSuchBucket)",
            "Unable to locate credentials",
        ),
        telling="access refused: ",
    ),
    _Sign(
        outcome="storage",
        packages=frozenset({"botocore", "boto3", "s3transfer"}),
        errnos=frozenset(_STORAGE_ERRNOS),
        words=(
            "botocore.exceptions.",
            "endpoint URL: ",
            "AWS Error ",
            ") when calling the ",  # boto3's ClientError: An error occurred (SlowDown) when calling the PutObject ...
            *_said(*_STORAGE_ERRNOS),
        ),
        telling="storage: ",
    ),
    _Sign(
        outcome="network",
        classes=frozenset(
            {"ConnectionError", "TimeoutError", "DistNetworkError", "DistStoreError", PeerFailed.__name__}
        ),
        errnos=frozenset(_NETWORK_ERRNOS),
        words=(
            # gloo
            "Connection closed by peer",
            "Timed out waiting",
            "Application timeout caused pair closure",
            "Connect timeout",
            "Read timeout",
            "Gloo connectFullMesh failed",
            # torch's store
            "Socket Timeout",
            "The client socket has ",
            "wait timeout after",
            "recvValue failed",
            "recvValueWithTimeout failed",
            "sendBytes failed",
            # NCCL and RCCL
            "ncclRemoteError",
            "ncclSystemError",
            "unhandled system error",
            "NCCL timeout",
            "Watchdog caught collective operation timeout",
            "NCCL communicator was aborted",
            # any of them
            *(os.strerror(number) for number in (errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EPIPE)),
            *(os.strerror(number) for number in _NETWORK_ERRNOS),
        ),
        telling="lost a peer: ",
    ),
    _Sign(outcome="storage", classes=frozenset({"SaveFailed"}), telling="storage: "),  # the words had no better cause
    _Sign(
        outcome="worker_lost",
        classes=frozenset({"ControllerError", "RaySystemError", "ObjectLostError", "ActorUnschedulableError"}),
        telling="Ray could not go on: ",
    ),
)
"""The first that fits any error of a chain, in this order: what names a cause goes before what may be a consequence."""


def _is(error: BaseException, *names: str) -> bool:
    """Whether it is of a class of such a name, or of a child of one."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
