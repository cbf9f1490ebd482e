"""The supervisor: plan, attempt, decide, repeat. It alone restarts; Ray Train runs one attempt at a time for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

from orchestrator import failures, nodes, rollback, storage
from orchestrator.attempt import Attempt, Command, OnStep
from orchestrator.capacity import Capacity
from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.schedule import Schedule
from orchestrator.drivers import Driver
from orchestrator.endings import Evidence, first_line, judge, of_storage
from orchestrator.errors import (
    CheckpointDamaged,
    Interrupted,
    RunFailed,
    ShardLost,
    SilentCorruption,
    StepFailed,
)
from orchestrator.evaluation.held_out import sequences_of
from orchestrator.failures import Decision, Ending
from orchestrator.lease import Lease
from orchestrator.planning.plan import Plan
from orchestrator.resume import (
    begin_attempt,
    check_lost_shards,
    check_past,
    data_schedule,
    lose,
    lost_shards,
    lost_shards_hint,
    record_schedule,
    resume_point,
    set_aside_damaged,
    take_back,
)
from orchestrator.runs import RunDir
from orchestrator.standby import Standby
from orchestrator.stop_requests import asked_to_stop, take_back_request
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit
from orchestrator.train.fragment_memory import Held
from orchestrator.train.memory_copies import Places, found, sizes

log = logging.getLogger(__name__)


OUTAGE_S = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 600.0, 900.0, 900.0)
"""Waits between tries when the supervisor's own storage calls fail, which have been retried for a while by then: 50
minutes in all. A wait counts anew after an attempt."""


def supervise(run: RunDir, recipe: Recipe, driver: Driver, on_step: OnStep, own_cluster: bool = False) -> Commit:
    """Train to the last step, through any number of attempts.

    Args:
        on_step: called with each new record of the metrics, in the driver.
        own_cluster: whether the cluster was started for this command, so that nobody will add nodes to it.

    Returns:
        The commit of the last step.

    Raises:
        RunFailed: the run was given up, or another driver has taken it over; says why.
        Interrupted: it was asked to stop, and its state is committed.
        StorageError: the storage has failed for long, or in a way that does not pass.
    """
    storage.delete(run.stop_request)
    endings: list[Ending] = []
    outage, known = _Outage(run), 0
    while True:
        try:
            return _supervise(run, recipe, driver, on_step, own_cluster, endings)
        except Exception as error:
            if len(endings) > known:
                outage, known = _Outage(run), len(endings)
            outage.wait(error)


class _Outage:
    """The storage fails; more and more time is left to it between tries."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._waits = iter(OUTAGE_S)

    def wait(self, error: Exception) -> None:
        """Wait, and look for a request to stop as far as the storage can be asked.

        Raises:
            Interrupted: there is one.
            Exception: the error, where it is not of storage, or waiting has not helped.
        """
        wait_s = next(self._waits, None)
        if not of_storage(error) or wait_s is None:
            raise error
        log.warning("the supervisor waits for its storage, for %.0f s: %s", wait_s, first_line(str(error)))
        try:
            _wait(self._run, wait_s)
        except Interrupted:
            raise
        except Exception:  # of the storage that is waited for
            time.sleep(wait_s)


def _supervise(
    run: RunDir, recipe: Recipe, driver: Driver, on_step: OnStep, own_cluster: bool, endings: list[Ending]
) -> Commit:
    """See `supervise`. It may be left at any point, and begun again."""
    take_back_request(run)
    manifest = _checked_manifest(run, recipe)
    with (
        Lease(_wants_copies(run, recipe)) as lease,
        closing(Standby(run, recipe, manifest.vocab_size, lease)) as standby,
    ):
        capacity = Capacity(run, recipe, lease, driver, own_cluster)
        command = Command(
            run=run, recipe=recipe, driver=driver, lease=lease, capacity=capacity, standby=standby, on_step=on_step
        )
        while True:
            resume = resume_point(run, sizes(lease.copies()))
            if resume and resume.step >= recipe.train.steps:
                return resume
            schedule = data_schedule(run, recipe, manifest)
            chosen = capacity.plan(standby.node_ids)
            group, ready = standby.take(chosen)
            if group.examination.found_fault():
                group.dismiss()
                continue
            number = run.claim_attempt(_as_json(chosen))
            driver.check()
            copies = lease.copies()
            resume = begin_attempt(run, number, sizes(copies))
            if resume and resume.step >= recipe.train.steps:
                group.dismiss()
                return resume
            _record(run, recipe, number, chosen, schedule, resume, ready)
            group.go(_job(command, chosen, number, schedule, resume, copies))
            attempt = Attempt(command, number, chosen, group)
            evidence = attempt.follow()
            driver.check()
            ending = _ending(run, recipe, number, chosen, resume, attempt.last_step, evidence)
            endings.append(ending)
            _act(run, recipe, ending, _decide(run, recipe, manifest, endings))


def _checked_manifest(run: RunDir, recipe: Recipe) -> Manifest:
    """What the run trains on, after seeing that the recipe goes with what it has trained."""
    manifest = load_manifest(run.corpus)
    assert manifest is not None, "training follows the corpus stage"
    rollback.finish(run)
    check_past(run, recipe)
    if recipe.train.evaluate_every:
        sequences_of(recipe, manifest)
    take_back(run, manifest)
    check_lost_shards(run, recipe)
    return manifest


def _wants_copies(run: RunDir, recipe: Recipe) -> bool:
    wanted = recipe.train.memory_copies
    return storage.is_s3(run.uri) if wanted is None else wanted


def _record(
    run: RunDir, recipe: Recipe, number: int, chosen: Plan, schedule: Schedule, resume: Commit | None, standby: bool
) -> None:
    """Put on record what an attempt is to do."""
    step = resume.step if resume else 0
    record_schedule(run, number, schedule, chosen.shares, step)
    trial = str(chosen) if chosen.trial else ""
    run.log_event("planned", attempt=number, plan=_as_json(chosen), reason=chosen.reason, trial=trial)
    run.log_event("attempt_started", attempt=number, workers=chosen.workers, resume_step=step, standby=standby)
    log.info("attempt %d: %s (%s), from step %d of %d", number, chosen, chosen.reason, step, recipe.train.steps)
    how = "sending off the workers that stand by" if standby else f"starting {chosen.workers} workers"
    log.info("attempt %d: %s", number, how)


def _job(
    command: Command,
    chosen: Plan,
    number: int,
    schedule: Schedule,
    resume: Commit | None,
    copies: Mapping[str, list[Held]],
) -> dict[str, Any]:
    from orchestrator.train.worker import Job

    lease = command.lease
    places = Places(
        token=lease.token, ring=lease.memories(chosen.node_ids), found=found(copies, resume) if resume else {}
    )
    job = Job(
        run=command.run.uri,
        recipe=command.recipe.model_dump(mode="json"),
        plan=_as_json(chosen),
        attempt=number,
        schedule=schedule.as_json(),
        resume=asdict(resume) if resume else None,
        devices=lease.device_ids,
        copies=places.as_json() if lease.token else None,
    )
    return asdict(job)


def _ending(
    run: RunDir, recipe: Recipe, number: int, chosen: Plan, resume: Commit | None, last_step: int, evidence: Evidence
) -> Ending:
    """What an attempt's end was, put on record."""
    verdict = judge(evidence)
    outcome, message, cause = verdict.outcome, verdict.message, verdict.cause
    committed = checkpoints.committed_steps(run.checkpoints)
    if isinstance(cause, CheckpointDamaged) and cause.step is not None:
        set_aside_damaged(run, cause.step, cause.message)
        committed = checkpoints.committed_steps(run.checkpoints)
    if isinstance(cause, SilentCorruption):
        nodes.note_corruption(run, number, cause)
    step = committed[-1] if committed else 0
    if outcome in ("finished", "yielded") and step < recipe.train.steps:
        ours = outcome == "yielded" and not asked_to_stop(run)
        outcome, message = ("yielded", evidence.yielded) if ours else ("stopped", "asked to stop")
    ending = Ending(
        attempt=number,
        outcome=outcome,
        message=message,
        resumed_from=resume.step if resume else 0,
        last_step=max(last_step, step),
        committed_step=step,
        lost_shard=cause.shard if isinstance(cause, ShardLost) else "",
        failed_step=cause.step if isinstance(cause, StepFailed) else 0,
        hint=cause.hint if cause else "",
        failed_at=evidence.failed_at,
        plan=chosen.in_full,
    )
    _record_ending(run, ending)
    return ending


def _record_ending(run: RunDir, ending: Ending) -> None:
    """However long the storage fails, as when its failure is what has ended the attempt: what follows counts on it."""
    outage = _Outage(run)
    while True:
        try:
            if ending.outcome not in ("finished", "yielded", "stopped"):
                error = {"outcome": ending.outcome, "message": ending.message}
                run.write_json(run.attempt_error(ending.attempt), error)
            return run.log_event("attempt_ended", **asdict(ending))
        except Exception as error:
            outage.wait(error)


def _decide(run: RunDir, recipe: Recipe, manifest: Manifest, endings: list[Ending]) -> Decision:
    last = endings[-1]
    if last.lost_shard:
        lost = lose(run, manifest, last.lost_shard, last.message)
        run.log_event("shard_lost", attempt=last.attempt, shards=[shard.name for shard in lost])
    decision = failures.decide(
        endings,
        recipe.train.max_restarts,
        shard_allowance=recipe.train.max_lost_shards - len(lost_shards(run)),
        rollback_allowance=recipe.train.spikes.max_rollbacks - len(run.rollbacks()),
    )
    run.log_event("decided", attempt=last.attempt, **asdict(decision))
    return decision


def _act(run: RunDir, recipe: Recipe, ending: Ending, decision: Decision) -> None:
    """
    Raises:
        RunFailed, Interrupted: as `supervise`.
    """
    if ending.outcome == "stopped":
        log.info("stopped at step %d, its state is committed", ending.committed_step)
        raise Interrupted(f"stopped at step {ending.committed_step}, its state is committed", "run the same command")
    if decision.action == "give_up":
        hint = ending.hint or f"terrane logs {run.uri} shows the workers' last words"
        if ending.lost_shard:
            hint = lost_shards_hint(run)
        raise RunFailed(f"attempt {ending.attempt} ended: {first_line(ending.message)}; {decision.reason}", hint)
    if decision.action == "restart":
        say = log.info if ending.outcome == "yielded" else log.warning
        say("attempt %d: %s", ending.attempt, decision.reason)
        if ending.outcome == "error":
            log.warning("attempt %d ended with %s", ending.attempt, first_line(ending.message))
        if ending.outcome == "spike":
            rollback.roll_back(run, recipe, ending.attempt, ending.failed_step)
        take_back_request(run)
        _wait(run, decision.wait_s)


def _wait(run: RunDir, wait_s: float) -> None:
    """
    Raises:
        Interrupted: the run was asked to stop meanwhile.
    """
    end = time.monotonic() + wait_s
    while (left_s := end - time.monotonic()) > 0:
        if asked_to_stop(run):
            raise Interrupted("stopped before the next attempt; all is committed", "run the same command")
        time.sleep(min(left_s, 2.0))


def _as_json(chosen: Plan) -> dict[str, Any]:
    return {**asdict(chosen), "node_ids": list(chosen.node_ids), "losers": list(chosen.losers)}
