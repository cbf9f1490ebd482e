"""What a run goes on from: its newest checkpoint, and the data schedule, whose past may not change under it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import inspection
from orchestrator.data.encoding import end_of_document
from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.manifest import Manifest, load_manifest, schedule
from orchestrator.data.schedule import Schedule, changes
from orchestrator.data.shard_cache import LOST_HINT
from orchestrator.errors import ShardLost, StorageError, UserError
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit

log = logging.getLogger(__name__)


def resume_point(run: RunDir) -> Commit | None:
    """The newest checkpoint that is whole; damaged ones are set aside, and said to be."""

    def set_aside(step: int, what: str) -> None:
        log.warning("checkpoint of step %d set aside: %s", step, what)
        run.log_event("checkpoint_damaged", step=step, message=what)

    return checkpoints.newest(run.checkpoints, set_aside)


def check_past(run: RunDir, recipe: Recipe) -> None:
    """See that a recipe leaves the steps that were trained as they were.

    Raises:
        UserError: it does not; says what differs, and how to change only what comes.
    """
    manifest, commit = load_manifest(run.corpus), _newest_readable(run)
    if manifest is None or commit is None:
        return
    before = commit.position.past
    found = changes(before, schedule(manifest, recipe).past(commit.step))
    if found:
        ways = [way for key in found if (way := _way_on(key, before, manifest, commit.step))]
        raise UserError(
            f"{run.uri} is at step {commit.step}, and what it has trained on would change: {'; '.join(found.values())}",
            "; ".join([*ways, "or take it back, or begin anew with --start-over"]).removeprefix("or "),
        )


def _newest_readable(run: RunDir) -> Commit | None:
    for step in reversed(checkpoints.committed_steps(run.checkpoints)):
        with contextlib.suppress(StorageError):  # damaged: it is set aside when training resumes
            return checkpoints.read_commit(run.checkpoints, step)
    return None


def _way_on(key: str, past: dict[str, Any], manifest: Manifest, step: int) -> str:
    """How to change a value for the steps to come only."""
    if key == "batches":
        ramp = ", ".join(f"{{steps: {steps}, sequences: {size}}}" for steps, size in past["batches"])
        return f"for another batch from here on write train.batch_ramp: [{ramp}] beside it"
    if key == "mixture":
        tokens = sum(samples for samples, _ in past["mixture"]) * manifest.sequence_length
        return f"for another mixture from here on let it begin as it was, for {tokens} tokens"
    return f"steps up to {step} can no longer be skipped, nor trained again" if key == "skipped" else ""


def data_schedule(run: RunDir, recipe: Recipe, manifest: Manifest) -> Schedule:
    """What the steps to come consume, without what the run has lost or quarantined.

    Raises:
        UserError: a quarantined document is not part of the corpus; more shards are lost than may be.
    """
    return schedule(manifest, recipe, _exclusions(run, recipe, manifest))


def record_schedule(run: RunDir, attempt: int, chosen: Schedule, shares: tuple[int, ...], resume_step: int) -> None:
    """Keep what an attempt's steps consume, and who takes what; a change since the attempt before is an event."""
    values = chosen.as_json()
    before = run.last_schedule()
    run.write_json(run.schedule(attempt), {"from_step": resume_step + 1, "shares": shares, **values})
    if before and (changed := sorted(key for key in values if values[key] != before.get(key))):
        run.log_event("schedule_changed", attempt=attempt, from_step=resume_step + 1, changed=changed)
        log.info("attempt %d: data schedule changed from step %d on: %s", attempt, resume_step + 1, ", ".join(changed))


def find_lost(run: RunDir, manifest: Manifest, shard: str, reason: str) -> list[LostShard]:
    """The shards lost before, this one, and every other that a listing shows to be missing or cut short."""
    lost = {found.name: found for found in lost_shards(run)}
    there = {entry.name: entry.bytes for entry in storage.list_entries(storage.join(run.corpus, "shards"))}
    first = 0
    for found in manifest.shards("train"):
        size = there.get(found.name.removeprefix("shards/"))
        why = reason if found.name == shard else "is missing" if size is None else "has another size"
        if found.name == shard or size != found.bytes:
            lost.setdefault(found.name, LostShard(name=found.name, first=first, samples=found.sequences, reason=why))
        first += found.sequences
    return list(lost.values())


def go_on_without(run: RunDir, lost: list[LostShard]) -> None:
    """Exclude shards from the attempts to come."""
    run.write_json(run.lost_shards, [vars(shard) for shard in lost])
    run.log_event("shards_lost", shards=[shard.name for shard in lost])


def take_back(run: RunDir, manifest: Manifest) -> None:
    """Shards that were lost and are whole again count from here on."""
    lost, still = lost_shards(run), []
    reader = manifest.reader(run.corpus, "train")
    for shard in lost:
        try:
            reader.take(np.array([shard.first]))
            log.info("corpus: shard %s is whole again", shard.name)
            run.log_event("shard_restored", shard=shard.name)
        except ShardLost:
            still.append(shard)
    if still != lost:
        run.write_json(run.lost_shards, [vars(shard) for shard in still])


def lost_shards(run: RunDir) -> list[LostShard]:
    return [LostShard(**values) for values in run.read_json(run.lost_shards) or []]


def _exclusions(run: RunDir, recipe: Recipe, manifest: Manifest) -> Exclusions:
    lost, wanted = lost_shards(run), recipe.train.quarantine
    if len(lost) > recipe.train.max_lost_shards:
        names = ", ".join(shard.name for shard in lost)
        raise UserError(f"{run.uri} goes on without {names}, and train.max_lost_shards is less", LOST_HINT)
    if not lost and not wanted:
        return Exclusions()
    before = run.last_schedule() or {}
    known = Exclusions.from_json(before["exclusions"]).quarantined if before.get("corpus") == manifest.hash else {}
    unknown = [document for document in wanted if document not in known]
    found = inspection.occurrences(run.corpus, manifest, unknown) if unknown else {}
    runs = {**known, **{document: tuple(Run(*place) for place in places) for document, places in found.items()}}
    for document in unknown:
        if not runs.get(document):
            raise UserError(
                f"train.quarantine: {document!r} is no training document of {run.corpus}",
                "terrane corpus RUN --trace STEP names documents",
            )
    return Exclusions(
        lost=tuple(lost),
        quarantined={document: runs[document] for document in wanted},
        filler=end_of_document(run.tokenizer),
    )


def start_over(run: RunDir) -> None:
    """Set aside what the run has trained, so that the next attempt begins at step 1. Nothing is deleted but markers."""
    for step in reversed(checkpoints.committed_steps(run.checkpoints)):
        checkpoints.set_aside(run.checkpoints, step, "started-over")
    attempts = run.attempts()
    place = run.path("set-aside", f"{max(attempts, default=0):03d}")
    for folder in ("evaluation", "serving"):
        for name in storage.list_files(run.path(folder)):
            storage.write(storage.join(place, folder, name), storage.read(run.path(folder, name)))
            storage.delete(run.path(folder, name))
    for uri in (run.model_manifest, run.lost_shards):
        storage.delete(uri)
    run.log_event("started_over", last_attempt=max(attempts, default=0))
    log.info("starting over: checkpoints and results up to attempt %d are set aside", max(attempts, default=0))
