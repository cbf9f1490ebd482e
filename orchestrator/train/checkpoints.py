"""Checkpoints: fragments in torch.distributed.checkpoint's format, trusted only once committed.

    checkpoints/step-00000100/attempt-001/   __0_0.distcp ... .metadata
                                             COMMITTED: every file with its size, and the hash of .metadata
    checkpoints/succession/                  which attempt may commit, and which commits count (train.succession)

COMMITTED is created last, so that an attempt commits a step whole or not at all. It is sealed with a hash of its own;
.metadata holds those of the fragments, which are checked as they are read. Of several attempts that have committed a
step one counts, or none; an attempt never touches what another has written, so that one which wakes up late does no
harm. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator import storage
from orchestrator.errors import CheckpointDamaged, RunFailed, StorageError, UserError
from orchestrator.runs import STARTED_OVER, last_before_start_over
from orchestrator.train.succession import FOLDER, Succession, mark_back, mark_begun, mark_resumed, succession

if TYPE_CHECKING:
    from orchestrator.train.memory_copies import Copies

log = logging.getLogger(__name__)

COMMITTED = "COMMITTED"
FORMAT = 5

_FILE_OF_STEP = re.compile(r"step-([0-9]{8,})/(?:attempt-([0-9]{3,})/)?(.+)", re.ASCII)


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
    aside: int | None = None
    """How many of those that no longer count are kept at most; None: as many as `last`."""

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


def marker(checkpoints: str, step: int, attempt: int) -> str:
    """COMMITTED of an attempt's save of a step."""
    return storage.join(step_directory(checkpoints, step), attempt_folder(attempt), COMMITTED)


# --- reading ----------------------------------------------------------------------------------------------------------


def committed_steps(checkpoints: str) -> list[int]:
    """Steps with a commit that counts, in order."""
    return list(committed(checkpoints))


def committed(checkpoints: str) -> dict[int, int]:
    """The attempt of each commit that counts, by step, in order.

    Raises:
        UserError: another version of Terrane wrote them.
    """
    return _look(checkpoints).committed


@dataclass(frozen=True, kw_only=True)
class _Save:
    """What an attempt has stored of a step."""

    step: int
    attempt: int
    mark: str
    """COMMITTED, or COMMITTED.<why> for one that was set aside; empty without a commit."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What one look at the names shows."""

    saves: list[_Save]
    succession: Succession

    @property
    def committed(self) -> dict[int, int]:
        """See `committed`. Attempts that nobody recorded all count; the newest one's commit is taken."""
        found = sorted((save.step, save.attempt) for save in self.saves if self.counts(save))
        return dict(found)

    def counts(self, save: _Save) -> bool:
        return save.mark == COMMITTED and self.succession.counts(save.step, save.attempt)

    def has_replaced(self, attempt: int) -> bool:
        return self.succession.has_replaced(attempt) or any(by > attempt for by in self.committed.values())


def _look(checkpoints: str) -> _Stored:
    """One listing; what others keep beside the steps, as copies, is passed over."""
    names = storage.list_files(checkpoints)
    marks = [name.removeprefix(f"{FOLDER}/") for name in names if name.startswith(f"{FOLDER}/")]
    before = last_before_start_over(checkpoints) if STARTED_OVER in names else 0
    saves: dict[tuple[int, int], str] = {}
    for found in filter(None, map(_FILE_OF_STEP.fullmatch, names)):
        if found[2] is not None:
            mark = found[3] if found[3].startswith(COMMITTED) else ""
            place = int(found[1]), int(found[2])
            saves[place] = mark if mark == COMMITTED else saves.get(place) or mark
        elif found[3] == COMMITTED and not before:
            raise UserError(
                f"{storage.join(checkpoints, found[0])} is of an earlier version of Terrane",
                "go on with the version that began the run, or begin anew with --start-over",
            )
    return _Stored(
        saves=[_Save(step=step, attempt=attempt, mark=mark) for (step, attempt), mark in saves.items()],
        succession=succession(marks, before),
    )


def read_commit(checkpoints: str, step: int, attempt: int | None = None) -> Commit:
    """
    Args:
        attempt: whose commit; without it the one that counts.

    Raises:
        FileNotFoundError: there is none.
        CheckpointDamaged: COMMITTED is not as it was written, or was written for another step.
        UserError: another version of Terrane wrote it.
    """
    uri = marker(checkpoints, step, committed(checkpoints).get(step, 0) if attempt is None else attempt)
    values = _unsealed(uri, storage.read(uri))
    if values["format"] != FORMAT:
        raise UserError(
            f"{uri} has format {values['format']}, and this version of Terrane reads {FORMAT}",
            "go on with the version that began the run, or begin anew with --start-over",
        )
    commit = Commit(**{**values, "position": Position(**values["position"])})
    if marker(checkpoints, commit.step, commit.attempt) != uri:
        raise CheckpointDamaged(f"{uri} is of step {commit.step} and attempt {commit.attempt}")
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
    for step, attempt in reversed(committed(checkpoints).items()):
        try:
            commit = read_commit(checkpoints, step, attempt)
            fault = damage(checkpoints, commit, in_memory)
        except FileNotFoundError:
            continue  # deleted since it was listed, by an attempt that still commits
        except StorageError as error:
            fault = error.message
        if fault is None:
            return commit
        if on_damage:
            on_damage(step, fault)
        set_aside(checkpoints, step, "damaged", attempt)
    return None


def checkpoint_bytes(checkpoints: str) -> int:
    """Of the newest checkpoint, 0 without one."""
    for step, attempt in reversed(committed(checkpoints).items()):
        return read_commit(checkpoints, step, attempt).bytes
    return 0


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


# --- who may commit ---------------------------------------------------------------------------------------------------


def begin(
    checkpoints: str,
    attempt: int,
    on_damage: Callable[[int, str], object] | None = None,
    in_memory: Mapping[str, int] | None = None,
) -> Commit | None:
    """From here on this attempt may commit, and none before it; returns what it goes on from, as `newest` does.

    To be called once an attempt's number is claimed, before any of its workers trains. The first mark comes before the
    look at what stands, and `publish` looks for marks after it has committed: so a commit that was told of is seen
    here, and one that comes too late is told of by nobody and deletes nothing.
    """
    storage.create(storage.join(checkpoints, FOLDER, mark_begun(attempt)), _mark_content(attempt))
    found = newest(checkpoints, on_damage, in_memory)
    step = found.step if found else 0
    storage.create(storage.join(checkpoints, FOLDER, mark_resumed(attempt, step)), _mark_content(attempt))
    return found


def go_back(checkpoints: str, attempt: int, step: int) -> None:
    """Steps after this one no longer count, of attempts up to this one."""
    storage.create(storage.join(checkpoints, FOLDER, mark_back(attempt, step)), _mark_content(attempt))


def _mark_content(attempt: int) -> bytes:
    return f"attempt {attempt}\n".encode()  # nobody reads it: the name says all


def set_aside(checkpoints: str, step: int, why: str, attempt: int | None = None) -> None:
    """Take a commit back, the one that counts unless an attempt is given; its files stay for a while (`retain`)."""
    uri = marker(checkpoints, step, committed(checkpoints).get(step, 0) if attempt is None else attempt)
    with contextlib.suppress(FileNotFoundError):
        storage.write(f"{uri}.{why}", storage.read(uri))
    storage.delete(uri)


# --- writing ----------------------------------------------------------------------------------------------------------


def publish(checkpoints: str, commit: Commit) -> Commit:
    """Create COMMITTED, now that all files are on storage; returns the commit, which counts, with its parent.

    Raises:
        StorageError: another attempt has begun or gone past this step, or the run began anew: the attempt has been
            replaced, and the commit does not count.
    """
    stored = _look(checkpoints)
    steps = list(stored.committed)
    made = replace(commit, parent=steps[-1] if steps else None)
    late = stored.has_replaced(commit.attempt) or any(step >= commit.step for step in steps)
    if not late and storage.create(marker(checkpoints, commit.step, commit.attempt), sealed(made)):
        late = _look(checkpoints).has_replaced(commit.attempt)
        if not late:
            return made
    raise StorageError(
        f"attempt {commit.attempt} has been replaced: its commit of step {commit.step} does not count",
        "another driver works on this run: let it finish, or stop it first",
    )


def retain(checkpoints: str, retention: Retention, attempt: int) -> None:
    """Delete what is not to be kept, the commit first, so that none is ever half there; and what saves left behind that
    were ended before their commit. An attempt that has been replaced deletes nothing."""
    stored = _look(checkpoints)
    if stored.has_replaced(attempt):
        return
    counting = stored.committed
    losses = {
        step: read_commit(checkpoints, step, by).held_out_loss if retention.best else None
        for step, by in counting.items()
    }
    gone = {(step, counting[step]) for step in retention.superfluous(losses)}
    gone |= {(save.step, save.attempt) for save in _left_over(stored, retention, attempt)}
    for step, by in sorted(gone):
        storage.delete(marker(checkpoints, step, by))
        storage.delete(storage.join(step_directory(checkpoints, step), attempt_folder(by)))
        storage.delete_empty(step_directory(checkpoints, step))


def _left_over(stored: _Stored, retention: Retention, attempt: int) -> list[_Save]:
    """Saves that do not count and are not to be kept.

    Of those that were committed and set aside, by damage, a rollback or a start-over, as many stay as of those that
    count, the newest, until training is as many commits past them. Those that were never committed go at once, but for
    the one that this attempt may be making.
    """
    steps = list(stored.committed)
    unfinished = [save for save in stored.saves if not save.mark and _is_over(save, attempt, steps)]
    aside = [save for save in stored.saves if save.mark and not stored.counts(save)]
    aside.sort(key=lambda save: (save.attempt, save.step), reverse=True)
    most = retention.last if retention.aside is None else retention.aside
    kept = [save for save in aside[:most] if sum(step > save.step for step in steps) < retention.last]
    return unfinished + [save for save in aside if save not in kept]


def _is_over(save: _Save, attempt: int, committed: list[int]) -> bool:
    return save.attempt < attempt or any(step > save.step for step in committed)


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
        CheckpointDamaged: the data is not what `_seal` gave.
    """
    try:
        values = json.loads(data)
        if values.pop("seal", None) and _seal(values) == data:
            return dict(values)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        pass
    raise CheckpointDamaged(f"{uri} is damaged")
