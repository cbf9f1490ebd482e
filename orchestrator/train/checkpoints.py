"""Checkpoints: fragments in torch.distributed.checkpoint's format, trusted only once committed.

    checkpoints/step-00000100/attempt-001/   __0_0.distcp ... .metadata
    checkpoints/step-00000100/COMMITTED      names the attempt and every file with its size and hash

COMMITTED is created conditionally and last, so a step is committed once, whole, or not at all. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import storage
from orchestrator.errors import RunFailed, StorageError, UserError
from orchestrator.runs import last_before_start_over

COMMITTED = "COMMITTED"
FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Position:
    """What training goes on from, besides the fragments."""

    step: int
    updates: int
    """Optimizer steps that were made: fewer than steps where some were passed over."""
    past: dict[str, Any]
    """All that decided what the steps consumed (data.schedule.Schedule.past)."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The content of COMMITTED."""

    format: int = FORMAT
    attempt: int
    parent: int | None
    """Step of the checkpoint that the attempt began from."""
    position: Position
    files: dict[str, dict[str, Any]]
    """Name below the step's directory -> {"bytes", "xxh3"}."""

    @property
    def step(self) -> int:
        return self.position.step

    @property
    def bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())

    @property
    def folder(self) -> str:
        return attempt_folder(self.attempt)


def attempt_folder(attempt: int) -> str:
    return f"attempt-{attempt:03d}"


def step_directory(checkpoints: str, step: int) -> str:
    return storage.join(checkpoints, f"step-{step:08d}")


# --- reading ----------------------------------------------------------------------------------------------------------


def committed_steps(checkpoints: str) -> list[int]:
    """Steps with a commit that counts, in order."""
    after = last_before_start_over(checkpoints)
    return [step for step in all_steps(checkpoints) if not after or _attempt_of(checkpoints, step) > after]


def all_steps(checkpoints: str) -> list[int]:
    """Steps with a commit, in order, those from before the run began anew among them."""
    found = [name.split("/") for name in storage.list_files(checkpoints)]
    return sorted(int(parts[0].removeprefix("step-")) for parts in found if parts[1:] == [COMMITTED])


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
        StorageError: COMMITTED cannot be read.
        UserError: another version of Terrane wrote it.
    """
    uri = storage.join(step_directory(checkpoints, step), COMMITTED)
    values = storage.read_json(uri)
    if not isinstance(values, dict):
        raise StorageError(f"{uri} is damaged")
    if values.get("format") != FORMAT:
        raise UserError(
            f"{uri} has format {values.get('format')}, and this version of Terrane reads {FORMAT}",
            "go on with the version that began the run, or begin anew with --start-over",
        )
    try:
        return Commit(**{**values, "position": Position(**values["position"])})
    except (TypeError, KeyError) as error:
        raise StorageError(f"{uri} is of another version of Terrane, or damaged: {error}") from None


def damage(checkpoints: str, commit: Commit) -> str | None:
    """The first file of a checkpoint that is missing, short or altered, in words; None if all are whole."""
    directory = step_directory(checkpoints, commit.step)
    for name, expected in commit.files.items():
        uri = storage.join(directory, name)
        try:
            size, digest = storage.size(uri), _hash(uri)
        except FileNotFoundError:
            return f"{uri} is missing"
        if (size, digest) != (expected["bytes"], expected["xxh3"]):
            return f"{uri} is damaged ({size} bytes, {expected['bytes']} expected)"
    return None


def newest(checkpoints: str, on_damage: Any = None) -> Commit | None:
    """The newest checkpoint whose files are all as committed.

    A damaged one is set aside under the name COMMITTED.damaged, so that its step can be committed again.

    Args:
        on_damage: called with (step, what is wrong).
    """
    for step in reversed(committed_steps(checkpoints)):
        try:
            commit = read_commit(checkpoints, step)
            fault = damage(checkpoints, commit)
        except StorageError as error:
            fault = error.message
        if fault is None:
            return commit
        if on_damage:
            on_damage(step, fault)
        set_aside(checkpoints, step, "damaged")
    return None


def set_aside(checkpoints: str, step: int, why: str) -> None:
    """Take a commit back; its files stay, under COMMITTED.<why>, until training has passed the step again."""
    marker = storage.join(step_directory(checkpoints, step), COMMITTED)
    with contextlib.suppress(FileNotFoundError):
        storage.write(f"{marker}.{why}", storage.read(marker))
    storage.delete(marker)


# --- writing ----------------------------------------------------------------------------------------------------------


def save(checkpoints: str, attempt: int, parent: int | None, position: Position, fragments: list[Any]) -> Commit | None:
    """Write this rank's fragments, then commit. Every rank calls it; it returns when the commit stands.

    Returns:
        The commit on rank 0, None on the others.

    Raises:
        StorageError: on every rank, when another attempt has committed this step: this one has been replaced.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    from orchestrator.train.planners import FragmentSavePlanner

    directory = step_directory(checkpoints, position.step)
    target = storage.join(directory, attempt_folder(attempt))
    rank = dist.get_rank()
    with _staging(target) as local:
        writer = dcp.FileSystemWriter(local, sync_files=True)
        dcp.save({}, storage_writer=writer, planner=FragmentSavePlanner(fragments))
        mine = [
            f for f in storage.list_files(str(local)) if f.startswith(f"__{rank}_") or (rank == 0 and f == ".metadata")
        ]
        if storage.is_s3(target):
            for name in mine:
                storage.upload(local / name, storage.join(target, name))
        facts = {
            f"{attempt_folder(attempt)}/{n}": {"bytes": (local / n).stat().st_size, "xxh3": _hash(str(local / n))}
            for n in mine
        }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    files = {name: fact for part in gathered for name, fact in part.items()}
    commit = Commit(attempt=attempt, parent=parent, position=position, files=files)
    verdict = [rank != 0 or _publish(checkpoints, commit)]
    dist.broadcast_object_list(verdict, src=0)
    if not verdict[0]:
        raise StorageError(
            f"step {position.step} is committed by another attempt: attempt {attempt} has been replaced",
            "another driver works on this run: let it finish, or stop it first",
        )
    return commit if rank == 0 else None


def _publish(checkpoints: str, commit: Commit) -> bool:
    """Create COMMITTED, unless another attempt has committed this step or gone past it, or the run began anew."""
    after = last_before_start_over(checkpoints)
    if commit.attempt <= after or any(step > commit.step for step in committed_steps(checkpoints)):
        return False
    if _attempt_of(checkpoints, commit.step) <= after:  # of an attempt that went on for a moment
        set_aside(checkpoints, commit.step, "started-over")
    return storage.create(storage.join(step_directory(checkpoints, commit.step), COMMITTED), _dump(commit))


def retain(checkpoints: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, the commit first, so that none is ever half there."""
    for step in committed_steps(checkpoints)[:-keep]:
        directory = step_directory(checkpoints, step)
        storage.delete(storage.join(directory, COMMITTED))
        storage.delete(directory)


def load(checkpoints: str, commit: Commit, fragments: list[Any]) -> None:
    """Fill the fragments of this rank, whatever layout wrote the checkpoint. Every rank calls it.

    Raises:
        RunFailed: the checkpoint does not cover a fragment: it is of another model.
    """
    from torch.distributed import checkpoint as dcp

    from orchestrator.train.planners import FragmentLoadPlanner

    uri = storage.join(step_directory(checkpoints, commit.step), commit.folder)
    with storage.local_directory(uri) as local:
        try:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # an export is one process
            dcp.load({}, storage_reader=dcp.FileSystemReader(local), planner=FragmentLoadPlanner(fragments))
        except dcp.CheckpointException as error:
            raise RunFailed(f"checkpoint of step {commit.step} does not fit the model: {error}") from error


def _dump(commit: Commit) -> bytes:
    return (json.dumps(asdict(commit), indent=2) + "\n").encode()


@contextlib.contextmanager
def _staging(target: str) -> Iterator[Path]:
    """Where torch writes: the target itself on a file system, a temporary directory for S3."""
    if storage.is_s3(target):
        with tempfile.TemporaryDirectory(prefix="terrane-") as folder:
            yield Path(folder)
    else:
        Path(target).mkdir(parents=True, exist_ok=True)
        yield Path(target)


def _hash(uri: str) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    if storage.is_s3(uri):
        digest.update(storage.read(uri))
    else:
        with Path(uri).open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return str(digest.hexdigest())
