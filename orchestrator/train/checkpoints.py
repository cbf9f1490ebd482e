"""Checkpoints: fragments in torch.distributed.checkpoint's format, trusted only once committed.

    checkpoints/step-00000100/attempt-001/   __0_0.distcp ... .metadata
    checkpoints/step-00000100/COMMITTED      names the attempt, every file with its size, and the hash of .metadata

COMMITTED is created conditionally and last, so a step is committed once, whole, or not at all. It is sealed with a hash
of its own; .metadata holds those of the fragments, which are checked as they are read. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator import storage
from orchestrator.errors import CheckpointDamaged, RunFailed, StorageError, UserError
from orchestrator.runs import last_before_start_over

if TYPE_CHECKING:
    from orchestrator.train.memory_copies import Copies

log = logging.getLogger(__name__)

COMMITTED = "COMMITTED"
FORMAT = 4

_STEP_DIRECTORY = re.compile(r"step-[0-9]{8,}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Position:
    """What training goes on from, besides the fragments."""

    step: int
    updates: int
    """Optimizer steps that were made: fewer than steps where some were passed over."""
    loss_scale: float | None = None
    """Of training in fp16."""
    past: dict[str, Any]
    """All that decided what the steps consumed (data.schedule.Schedule.past)."""
    watch: dict[str, Any] = field(default_factory=dict)
    """What the steps to come are judged by (train.watch.Watch.state)."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The content of COMMITTED."""

    format: int = FORMAT
    attempt: int
    parent: int | None = None
    """Step of the newest checkpoint that stood when this one was committed."""
    position: Position
    held_out_loss: float | None = None
    """In nats, where the loop evaluated at this step."""
    files: dict[str, int]
    """Bytes of every file, by name below the step's directory."""
    metadata_xxh3: str

    @property
    def step(self) -> int:
        return self.position.step

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def folder(self) -> str:
        return attempt_folder(self.attempt)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept."""

    last: int
    every: int | None = None
    """Those whose step this divides are kept for good."""
    best: bool = False
    """The one of the least held-out loss is kept, the newest of several."""

    def superfluous(self, losses: Mapping[int, float | None]) -> list[int]:
        """The steps to delete.

        Args:
            losses: held-out loss of every committed step, None where it was not measured.
        """
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and measured:
            kept.add(min(measured, key=lambda step: (measured[step], -step)))
        return [step for step in steps if step not in kept]


def attempt_folder(attempt: int) -> str:
    return f"attempt-{attempt:03d}"


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_directory(checkpoints: str, step: int) -> str:
    return storage.join(checkpoints, step_folder(step))


# --- reading ----------------------------------------------------------------------------------------------------------


def committed_steps(checkpoints: str) -> list[int]:
    """Steps with a commit that counts, in order."""
    after = last_before_start_over(checkpoints)
    return [step for step in all_steps(checkpoints) if not after or _attempt_of(checkpoints, step) > after]


def all_steps(checkpoints: str) -> list[int]:
    """Steps with a commit, in order, those from before the run began anew among them."""
    return sorted(step for step, name in _files_of_steps(checkpoints) if name == COMMITTED)


def _files_of_steps(checkpoints: str) -> Iterator[tuple[int, str]]:
    """(step, name below its directory) of every file; what others keep beside the steps, as copies, is passed over."""
    for path in storage.list_files(checkpoints):
        directory, _, name = path.partition("/")
        if name and _STEP_DIRECTORY.fullmatch(directory):
            yield int(directory.removeprefix("step-")), name


def _attempt_of(checkpoints: str, step: int) -> float:
    """Of a commit of any version; one that cannot be read counts, and is set aside where it is needed."""
    try:
        return float(storage.read_json(storage.join(step_directory(checkpoints, step), COMMITTED))["attempt"])
    except FileNotFoundError:
        return 0
    except (StorageError, TypeError, KeyError, ValueError):
        return math.inf


def read_commit(checkpoints: str, step: int) -> Commit:
    """
    Raises:
        CheckpointDamaged: COMMITTED is not as it was written, or was written for another step.
        UserError: another version of Terrane wrote it.
    """
    uri = storage.join(step_directory(checkpoints, step), COMMITTED)
    values = _unsealed(uri, storage.read(uri))
    if values["format"] != FORMAT:
        raise UserError(
            f"{uri} has format {values['format']}, and this version of Terrane reads {FORMAT}",
            "go on with the version that began the run, or begin anew with --start-over",
        )
    commit = Commit(**{**values, "position": Position(**values["position"])})
    if commit.step != step:
        raise CheckpointDamaged(f"{uri} is of step {commit.step}")
    return commit


def damage(checkpoints: str, commit: Commit, in_memory: Mapping[str, int] | None = None) -> str | None:
    """The first file of a checkpoint that is missing or cut short, in words; None if all are there.

    Args:
        in_memory: as `newest` has it.
    """
    directory, copies = step_directory(checkpoints, commit.step), in_memory or {}
    there = {entry.name: entry.bytes for entry in storage.list_entries(directory)}
    for name, size in commit.files.items():
        uri = storage.join(directory, name)
        if copies.get(storage.join(step_folder(commit.step), name)) == size:
            continue
        if name not in there:
            return f"{uri} is missing"
        if there[name] != size:
            return f"{uri} is damaged ({there[name]} bytes, {size} expected)"
    return None


def newest(
    checkpoints: str,
    on_damage: Callable[[int, str], object] | None = None,
    in_memory: Mapping[str, int] | None = None,
) -> Commit | None:
    """The newest checkpoint whose files are all there; what they hold is checked by who loads it.

    A damaged one is set aside under the name COMMITTED.damaged, so that its step can be committed again.

    Args:
        on_damage: called with (step, what is wrong).
        in_memory: bytes of files that survive in the memory of nodes, by name below the checkpoints; storage may lack
            them.
    """
    for step in reversed(committed_steps(checkpoints)):
        try:
            commit = read_commit(checkpoints, step)
            fault = damage(checkpoints, commit, in_memory)
        except FileNotFoundError:
            continue  # deleted since it was listed, by an attempt that still commits
        except StorageError as error:
            fault = error.message
        if fault is None:
            return commit
        if on_damage:
            on_damage(step, fault)
        set_aside(checkpoints, step, "damaged")
    return None


def load(checkpoints: str, commit: Commit, fragments: list[Any], copies: Copies | None = None) -> None:
    """Fill the fragments of this rank, whatever layout wrote the checkpoint. Every rank calls it.

    Args:
        copies: where files are read rather than on storage, as long as they are what was written.

    Raises:
        CheckpointDamaged: on every rank, when any has read what was not written; the fragments are not to be used.
        RunFailed: the checkpoint does not cover a fragment: it is of another model.
        RuntimeError: it could not be read for another reason.
    """
    from torch.distributed import checkpoint as dcp

    from orchestrator.train.fragment_files import FragmentReader, no_copies
    from orchestrator.train.fragment_memory import Save
    from orchestrator.train.planners import FragmentLoadPlanner

    uri = storage.join(step_directory(checkpoints, commit.step), commit.folder)
    in_memory = partial(copies.places, Save(commit.attempt, commit.step)) if copies else no_copies
    reader = FragmentReader(uri, commit.metadata_xxh3, in_memory)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # an export is one process
    try:
        dcp.load({}, storage_reader=reader, planner=FragmentLoadPlanner(fragments))
    except dcp.CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, CheckpointDamaged):
                raise CheckpointDamaged(cause.message, step=commit.step) from None
            if isinstance(cause, RunFailed):
                raise RunFailed(f"checkpoint of step {commit.step} does not fit the model: {cause.message}") from None
        raise RuntimeError(f"checkpoint of step {commit.step} could not be read: {error}") from error
    log.info("checkpoint of step %d read: %s", commit.step, reader.origin)


def set_aside(checkpoints: str, step: int, why: str) -> None:
    """Take a commit back; its files stay, under COMMITTED.<why>, until training has passed the step again."""
    marker = storage.join(step_directory(checkpoints, step), COMMITTED)
    with contextlib.suppress(FileNotFoundError):
        storage.write(f"{marker}.{why}", storage.read(marker))
    storage.delete(marker)


# --- writing ----------------------------------------------------------------------------------------------------------


def publish(checkpoints: str, commit: Commit) -> Commit:
    """Create COMMITTED, now that all files are on storage; returns the commit with its parent.

    Raises:
        StorageError: another attempt has committed this step or gone past it, or the run began anew: the attempt has
            been replaced.
    """
    after, steps = last_before_start_over(checkpoints), committed_steps(checkpoints)
    made = replace(commit, parent=steps[-1] if steps else None)
    if commit.attempt > after and not any(step > commit.step for step in steps):
        if 0 < _attempt_of(checkpoints, commit.step) <= after:  # of an attempt that went on for a moment
            set_aside(checkpoints, commit.step, "started-over")
        if storage.create(storage.join(step_directory(checkpoints, commit.step), COMMITTED), sealed(made)):
            return made
    raise StorageError(
        f"step {commit.step} is committed by another attempt: attempt {commit.attempt} has been replaced",
        "another driver works on this run: let it finish, or stop it first",
    )


def retain(checkpoints: str, retention: Retention) -> None:
    """Delete what is not to be kept, the commit first, so that none is ever half there; and what saves left behind that
    were ended before their commit."""
    steps = committed_steps(checkpoints)
    losses = {step: read_commit(checkpoints, step).held_out_loss if retention.best else None for step in steps}
    for step in retention.superfluous(losses):
        storage.delete(storage.join(step_directory(checkpoints, step), COMMITTED))
        storage.delete(step_directory(checkpoints, step))
    for step in _abandoned(checkpoints, before=steps[-1]):
        storage.delete(step_directory(checkpoints, step))


def _abandoned(checkpoints: str, before: int) -> list[int]:
    """Steps before a committed one, which nobody can commit any more, that hold files and neither a commit nor one that
    was set aside."""
    files = list(_files_of_steps(checkpoints))
    marked = {step for step, name in files if name.startswith(COMMITTED)}
    return sorted({step for step, _ in files if step < before} - marked)


def sealed(commit: Commit) -> bytes:
    """COMMITTED as it is stored."""
    return _seal(asdict(commit))


def _seal(values: dict[str, Any]) -> bytes:
    import xxhash

    seal = xxhash.xxh3_128_hexdigest(json.dumps(values).encode())
    return (json.dumps({**values, "seal": seal}, indent=2) + "\n").encode()


def _unsealed(uri: str, data: bytes) -> dict[str, Any]:
    """
    Raises:
        CheckpointDamaged: the data is not what `_seal` gave, nor of a version that had no seal.
    """
    try:
        values = json.loads(data)
        whole = values.pop("seal", None) and _seal(values) == data
        if whole or values["format"] in range(1, 4):
            return dict(values)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        pass
    raise CheckpointDamaged(f"{uri} is damaged")
