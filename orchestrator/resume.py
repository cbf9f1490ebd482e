"""What a run goes on from: its newest checkpoint, and the data schedule, whose past may not change under it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import inspection
from orchestrator.data.encoding import end_of_document
from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.manifest import Manifest, load_manifest, schedule
from orchestrator.data.schedule import Schedule, changes, differs
from orchestrator.errors import RunFailed, ShardLost, StorageError, UserError
from orchestrator.rollback import quarantined, rollbacks
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position
from orchestrator.train.learning_rate import learning_rate
from orchestrator.train_config import TrainConfig

log = logging.getLogger(__name__)

_RATES = {
    "steps",
    "lr",
    "schedule",
    "warmup_steps",
    "warmup_tokens",
    "decay_steps",
    "decay_tokens",
    "final_lr_share",
    "batch_ramp",
    "global_batch_size",
}
"""What of the recipe's `train` decides learning rates."""


def resume_point(run: RunDir, in_memory: Mapping[str, int] | None = None) -> Commit | None:
    """The newest checkpoint that is there; those with files missing or cut short are set aside, and said to be.

    Args:
        in_memory: files that survive in the memory of nodes (memory_copies.sizes).
    """
    return checkpoints.newest(run.checkpoints, lambda step, what: _tell_damage(run, step, what), in_memory)


def begin_attempt(run: RunDir, attempt: int, in_memory: Mapping[str, int] | None = None) -> Commit | None:
    """From here on this attempt may commit, and none before it; returns what it goes on from.

    To be called with the number that `RunDir.claim_attempt` gave, and only then looking for the checkpoint: what an
    attempt before it commits later does not count.
    """
    return checkpoints.begin(run.checkpoints, attempt, lambda step, what: _tell_damage(run, step, what), in_memory)


def set_aside_damaged(run: RunDir, step: int, what: str) -> None:
    """Take back the commit of a checkpoint whose reader found damage: the one before counts."""
    _tell_damage(run, step, what)
    checkpoints.set_aside(run.checkpoints, step, "damaged")


def _tell_damage(run: RunDir, step: int, what: str) -> None:
    log.warning("checkpoint of step %d set aside: %s", step, what)
    run.log_event("checkpoint_damaged", step=step, message=what)


def check_past(run: RunDir, recipe: Recipe) -> None:
    """See that a recipe leaves the steps that were trained as they were.

    Raises:
        UserError: it does not; says what differs, and how to change only what comes.
    """
    manifest, position = load_manifest(run.corpus), _position(run)
    if manifest is None or position is None:
        return
    if recipe.corpus.mixture and not any(shard.source for shard in manifest.shards("train")):
        raise UserError(
            f"{run.uri} is at step {position.step}, and its corpus was packed without corpus.mixture, as one",
            "take it back, or begin anew with --start-over",
        )
    before, after = position.past, data_schedule(run, recipe, manifest).past(position.step)
    found = changes(before, after)
    if found:
        kept = _kept(before, after, recipe, manifest) if position.step < recipe.train.steps else []
        change = f"to change only what comes, begin with {' and '.join(kept)}; else " if kept else ""
        raise UserError(
            f"{run.uri} is at step {position.step}, and what its steps consumed would change: {'; '.join(found)}",
            f"{change}take it back, or begin anew with --start-over",
        )
    _check_rates(run, recipe.train, position.step)


def _check_rates(run: RunDir, config: TrainConfig, last: int) -> None:
    """See that the steps up to one were trained at the learning rates that a recipe gives them."""
    before = run.recipe().train
    if before.model_dump(include=_RATES) == config.model_dump(include=_RATES):
        return
    for step in range(1, last + 1):
        was, now = learning_rate(before, step), learning_rate(config, step)
        if not math.isclose(was, now):
            changed = " and ".join(
                f"train.{key}" for key in sorted(_RATES) if getattr(before, key) != getattr(config, key)
            )
            raise UserError(
                f"{run.uri} is at step {last}, and with another {changed} the learning rates of its steps would "
                f"change: step {step} had {was:.10g}, and would have {now:.10g}",
                "take it back, or begin anew with --start-over; train.schedule=wsd can be made longer before its decay",
            )


def _position(run: RunDir) -> Position | None:
    """Of the newest commit that can be read; one that cannot is set aside later, with those of damaged files."""
    for step, attempt in reversed(checkpoints.committed(run.checkpoints).items()):
        with contextlib.suppress(StorageError, FileNotFoundError):
            return checkpoints.read_commit(run.checkpoints, step, attempt).position
    return None


def _kept(before: dict[str, Any], after: dict[str, Any], recipe: Recipe, manifest: Manifest) -> list[str]:
    """The recipe lines that keep the past as it was, of what may change after it."""
    kept = []
    if differs("batches", before, after):
        ramp = ", ".join(f"{{steps: {steps}, sequences: {size}}}" for steps, size in before["batches"])
        kept.append(f"train.batch_ramp: [{ramp}]")
    if differs("mixture", before, after) and before["pools"] == after["pools"]:
        names = [source.name for source in recipe.corpus.sources]
        stages = ", ".join(
            f"{{tokens: {samples * manifest.sequence_length}, weights: {{{_weights(names, shares)}}}}}"
            for samples, shares in before["mixture"]
        )
        kept.append(f"corpus.mixture: [{stages}]")
    return kept


def _weights(names: list[str], shares: list[int]) -> str:
    return ", ".join(f"{name}: {share / sum(shares)}" for name, share in zip(names, shares, strict=True) if share)


def data_schedule(run: RunDir, recipe: Recipe, manifest: Manifest) -> Schedule:
    """What the steps to come consume, without what the run has lost or quarantined, or passes over after a spike.

    Raises:
        UserError: a quarantined document is not part of the corpus.
    """
    chosen = schedule(manifest, recipe, _exclusions(run, recipe, manifest))
    spiked = tuple(found.passed for found in rollbacks(run))
    return replace(chosen, skip_steps=(*chosen.skip_steps, *spiked))


def record_schedule(run: RunDir, attempt: int, chosen: Schedule, shares: tuple[int, ...], resume_step: int) -> None:
    """Keep what an attempt's steps consume, and who takes what; a change since the attempt before is an event."""
    values, last = chosen.as_json(), run.last_schedule()
    before = Schedule.from_json(last).as_json() if last else values
    run.write_json(run.schedule(attempt), {"from_step": resume_step + 1, "shares": shares, **values})
    if changed := _changed(before, values):
        run.log_event("schedule_changed", attempt=attempt, from_step=resume_step + 1, changed=changed)
        log.info("attempt %d: data schedule changed from step %d on: %s", attempt, resume_step + 1, ", ".join(changed))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of a recipe, and the shards, that two recorded schedules differ in."""
    names = {
        ("order", "batches"): "train.global_batch_size",
        ("order", "stages"): "corpus.mixture",
        ("order", "pools"): "corpus.mixture",
        ("order", "seed"): "train.seed",
        ("skip_steps",): "train.skip_steps",
        ("exclusions", "quarantined"): "train.quarantine",
        ("exclusions", "lost"): "lost shards",
        ("corpus",): "corpus",
    }
    return sorted({name for path, name in names.items() if _at(before, path) != _at(after, path)})


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def lose(run: RunDir, manifest: Manifest, shard: str, reason: str) -> list[LostShard]:
    """Note a shard as lost, and with it every other that a listing shows to be missing or cut short."""
    lost = {found.name: found for found in lost_shards(run)}
    there = {entry.name: entry.bytes for entry in storage.list_entries(storage.join(run.corpus, "shards"))}
    first = 0
    for found in manifest.shards("train"):
        size = there.get(found.name.removeprefix("shards/"))
        why = reason if found.name == shard else "is missing" if size is None else "has another size"
        if found.name == shard or size != found.bytes:
            lost.setdefault(found.name, LostShard(name=found.name, first=first, samples=found.sequences, reason=why))
        first += found.sequences
    run.write_json(run.lost_shards, [vars(found) for found in lost.values()])
    return list(lost.values())


def take_back(run: RunDir, manifest: Manifest) -> None:
    """Shards that were lost and are whole again count from here on."""
    lost, still = lost_shards(run), []
    reader = manifest.reader(run.corpus, "train")
    sizes = {shard.name: shard.bytes for shard in manifest.shards("train")}
    for shard in lost:
        try:
            _look_at(storage.join(run.corpus, shard.name), sizes[shard.name])
            reader.take(np.array([shard.first]))
            log.info("corpus: shard %s is whole again", shard.name)
            run.log_event("shard_restored", shard=shard.name)
        except ShardLost:
            still.append(shard)
    if still != lost:
        run.write_json(run.lost_shards, [vars(shard) for shard in still])


def _look_at(uri: str, size: int) -> None:
    """See that a shard is stored: this node may hold it in its cache when it is nowhere else."""
    try:
        if storage.size(uri) == size:
            return
    except FileNotFoundError:
        pass
    raise ShardLost(f"shard {uri} is missing or cut short")


def check_lost_shards(run: RunDir, recipe: Recipe) -> None:
    """See that no more shards are lost than may be.

    Raises:
        RunFailed: there are; names them.
    """
    lost, allowed = lost_shards(run), recipe.train.max_lost_shards
    if len(lost) > allowed:
        which = "; ".join(s.reason if s.name in s.reason else f"{s.name} {s.reason}" for s in lost)
        raise RunFailed(
            f"lost shards: {len(lost)}, and train.max_lost_shards is {allowed}: {which}", lost_shards_hint(run)
        )


def lost_shards_hint(run: RunDir) -> str:
    """What to do when more shards are lost than may be."""
    lost, steps = len(lost_shards(run)), checkpoints.committed_steps(run.checkpoints)
    them = "it" if lost == 1 else "them"
    return (
        f"restore {them} and run the same command, or let training go on without {them} "
        f"(train.max_lost_shards={lost}); the state of step {max(steps, default=0)} is committed"
    )


def lost_shards(run: RunDir) -> list[LostShard]:
    return [LostShard(**values) for values in run.read_json(run.lost_shards) or []]


def _exclusions(run: RunDir, recipe: Recipe, manifest: Manifest) -> Exclusions:
    lost, wanted = lost_shards(run), list(dict.fromkeys((*recipe.train.quarantine, *quarantined(run))))
    if not lost and not wanted:
        return Exclusions()
    before = run.last_schedule() or {}
    known = Exclusions.from_json(before["exclusions"]).quarantined if before.get("corpus") == manifest.hash else {}
    unknown = [document for document in wanted if document not in known]
    found = inspection.occurrences(run.corpus, manifest, unknown, {shard.name for shard in lost}) if unknown else {}
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


def start_over(run: RunDir, recipe: Recipe) -> None:
    """Begin anew: the next attempt starts at step 1, and nothing that the attempts so far have committed counts.

    That holds from one write on, so that neither a kill nor an attempt that is still running brings the past back. The
    checkpoints stay until training is past them (`checkpoints.retain`).

    Raises:
        UserError: the recipe does not go with the corpus; nothing is set aside then.
    """
    if manifest := load_manifest(run.corpus):
        data_schedule(run, recipe, manifest)
    last = max(run.attempts(), default=0)
    run.write_json(run.started_over, {"last_attempt": last, "set_aside": False})
    finish_start_over(run)
    log.info("starting over: checkpoints and results up to attempt %d are set aside", last)


def finish_start_over(run: RunDir) -> None:
    """Set aside what was made before a run was begun anew, where that was not done to its end."""
    begun = run.read_json(run.started_over)
    if begun is None or begun["set_aside"]:
        return
    last = begun["last_attempt"]
    for folder in ("evaluation", "serving"):
        for name in storage.list_files(run.path(folder)):
            place = run.path("set-aside", f"{last:03d}", folder, name)
            storage.write(place, storage.read(run.path(folder, name)))
            storage.delete(run.path(folder, name))
    for uri in (run.model_manifest, run.lost_shards):
        storage.delete(uri)
    run.log_event("started_over", last_attempt=last)
    run.write_json(run.started_over, {"last_attempt": last, "set_aside": True})
