"""The supervisor: plan, attempt, decide, repeat. It alone restarts; Ray Train runs one attempt at a time for it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from orchestrator import cluster, failures, rollback, storage, suspects
from orchestrator.accelerators import ACCELERATORS
from orchestrator.config import Recipe
from orchestrator.data import tokenizer
from orchestrator.data.manifest import load_manifest
from orchestrator.data.schedule import Schedule
from orchestrator.errors import (
    CheckpointDamaged,
    Interrupted,
    LossSpike,
    NotFinite,
    RunFailed,
    ShardLost,
    SilentCorruption,
    StepFailed,
    UserError,
)
from orchestrator.evaluation.held_out import sequences_of
from orchestrator.failures import Ending, Outcome
from orchestrator.planning.search import Plan
from orchestrator.planning.shape import model_shape
from orchestrator.resume import (
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
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit

log = logging.getLogger(__name__)

POLL_S = 0.2
# What a rank says when a peer went away before Ray noticed: the peer's death is the cause, not this rank.
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Broken pipe")

_OUTCOMES: dict[type[UserError], Outcome] = {
    ShardLost: "shard_lost",
    CheckpointDamaged: "checkpoint_damaged",
    SilentCorruption: "corruption",
    NotFinite: "not_finite",
    LossSpike: "spike",
}
"""Of errors that end an attempt and not the run; any other error of the user's ends both."""


def supervise(run: RunDir, recipe: Recipe, on_step: Callable[[dict[str, Any]], None]) -> Commit:
    """Train to the last step, through any number of attempts.

    Args:
        on_step: called with each new record of the metrics, in the driver.

    Returns:
        The commit of the last step.

    Raises:
        RunFailed: the run was given up; says why.
        Interrupted: it was asked to stop, and its state is committed.
    """
    storage.delete(run.stop_request)
    manifest = load_manifest(run.corpus)
    assert manifest is not None, "training follows the corpus stage"
    rollback.finish(run)
    check_past(run, recipe)
    if recipe.train.evaluate_every:
        sequences_of(recipe, manifest)
    take_back(run, manifest)
    check_lost_shards(run, recipe)
    endings: list[Ending] = []
    while True:
        resume = resume_point(run)
        if resume and resume.step >= recipe.train.steps:
            return resume
        schedule = data_schedule(run, recipe, manifest)
        chosen = make_plan(run, recipe)
        attempt = run.claim_attempt(_as_json(chosen))
        record_schedule(run, attempt, schedule, chosen.shares, resume.step if resume else 0)
        _announce(run, recipe, attempt, chosen, resume)
        ending = _attempt(run, recipe, chosen, attempt, schedule, resume, on_step)
        endings.append(ending)
        if ending.lost_shard:
            lost = lose(run, manifest, ending.lost_shard, ending.message)
            run.log_event("shard_lost", attempt=attempt, shards=[shard.name for shard in lost])
        decision = failures.decide(
            endings,
            recipe.train.max_restarts,
            shard_allowance=recipe.train.max_lost_shards - len(lost_shards(run)),
            rollback_allowance=recipe.train.spikes.max_rollbacks - len(run.rollbacks()),
        )
        run.log_event("attempt_ended", **asdict(ending))
        run.log_event("decided", attempt=attempt, action=decision.action, reason=decision.reason)
        if ending.outcome == "stopped":
            raise Interrupted(
                f"stopped at step {ending.committed_step}, its state is committed", "run the same command"
            )
        if decision.action == "give_up":
            hint = ending.hint or f"terrane logs {run.uri} shows the workers' last words"
            if ending.lost_shard:
                hint = lost_shards_hint(run)
            raise RunFailed(f"attempt {attempt} ended: {_first_line(ending.message)}; {decision.reason}", hint)
        if decision.action == "restart":
            log.warning("attempt %d: %s", attempt, decision.reason)
            if ending.outcome == "error":
                log.warning("attempt %d ended with %s", attempt, _first_line(ending.message))
            if ending.outcome == "spike":
                rollback.roll_back(run, recipe, attempt, ending.failed_step)


def make_plan(run: RunDir, recipe: Recipe) -> Plan:
    """The plan for the devices alive now."""
    manifest = load_manifest(run.corpus)
    vocab_size = manifest.vocab_size if manifest else tokenizer.planned_vocabulary(recipe)
    return suspects.plan_around(run, recipe, model_shape(recipe, vocab_size), cluster.node_pools())


def request_stop(run: RunDir, reason: str) -> None:
    """Ask a run's workers to commit after the step they are in, and return."""
    run.write_json(run.stop_request, {"reason": reason, "time": time.time()})


def _announce(run: RunDir, recipe: Recipe, attempt: int, chosen: Plan, resume: Commit | None) -> None:
    step = resume.step if resume else 0
    run.log_event("planned", attempt=attempt, plan=_as_json(chosen), reason=chosen.reason)
    run.log_event("attempt_started", attempt=attempt, workers=chosen.workers, resume_step=step)
    log.info("attempt %d: %s (%s), from step %d of %d", attempt, chosen, chosen.reason, step, recipe.train.steps)
    log.info("attempt %d: starting %d workers", attempt, chosen.workers)


def _attempt(
    run: RunDir,
    recipe: Recipe,
    chosen: Plan,
    attempt: int,
    schedule: Schedule,
    resume: Commit | None,
    on_step: Callable[[dict[str, Any]], None],
) -> Ending:
    """Run one attempt to its end, following its metrics meanwhile."""
    follower = _Follower(run, attempt, on_step)
    fit = _Fit(run, recipe, chosen, attempt, schedule, resume)
    fit.start()
    interrupts = 0
    while not fit.ended.is_set():
        try:
            fit.ended.wait(POLL_S)
            follower.poll()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise Interrupted(
                    "stopped at once; what the last checkpoint holds is safe", "run the same command"
                ) from None
            log.warning("stopping: the workers commit after this step (Ctrl-C again to drop it)")
            request_stop(run, "Ctrl-C")
    follower.poll()
    outcome, message, cause = _judge(fit.error)
    if fit.error is not None:
        run.write_json(run.attempt_error(attempt), {"outcome": outcome, "message": message})
    if isinstance(cause, CheckpointDamaged) and cause.step is not None:
        set_aside_damaged(run, cause.step, cause.message)
    if isinstance(cause, SilentCorruption):
        suspects.note(run, attempt, cause)
    committed = checkpoints.committed_steps(run.checkpoints)
    step = committed[-1] if committed else 0
    if outcome == "finished" and step < recipe.train.steps:
        outcome, message = "stopped", "asked to stop"
    return Ending(
        attempt=attempt,
        outcome=outcome,
        message=message,
        resumed_from=resume.step if resume else 0,
        last_step=max(follower.last_step, step),
        committed_step=step,
        lost_shard=cause.shard if isinstance(cause, ShardLost) else "",
        failed_step=cause.step if isinstance(cause, StepFailed) else 0,
        hint=cause.hint if cause else "",
    )


class _Fit(threading.Thread):
    """`TorchTrainer.fit()` beside the main thread, which stays free for Ctrl-C and the metrics.

    Wait on `ended`, not in `join`: Python 3.11 takes a thread for dead when Ctrl-C comes during its join.
    """

    def __init__(
        self, run: RunDir, recipe: Recipe, chosen: Plan, attempt: int, schedule: Schedule, resume: Commit | None
    ) -> None:
        super().__init__(name=f"attempt-{attempt}", daemon=True)
        self._trainer = _trainer(run, recipe, chosen, attempt, schedule, resume)
        self.error: Exception | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # judged by the caller: this is the one place where an attempt's end is caught
            self.error = error
        finally:
            self.ended.set()


def _trainer(run: RunDir, recipe: Recipe, chosen: Plan, attempt: int, schedule: Schedule, resume: Commit | None) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.train.worker import Job, job_values, train_worker

    accelerator = ACCELERATORS[chosen.accelerator]
    resources = {"CPU": recipe.train.cpus_per_worker}
    if accelerator.ray_resource != "CPU":
        resources[accelerator.ray_resource] = 1
    job = Job(
        run=run.uri,
        recipe=recipe.model_dump(mode="json"),
        plan=_as_json(chosen),
        attempt=attempt,
        schedule=schedule.as_json(),
        resume=asdict(resume) if resume else None,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config=job_values(job),
        torch_config=TorchConfig(backend=accelerator.backend),
        scaling_config=ScalingConfig(
            num_workers=chosen.workers,
            use_gpu=accelerator.ray_resource == "GPU",
            resources_per_worker=resources,
            label_selector=[cluster.on_node(node_id) for node_id, count in chosen.placement for _ in range(count)],
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=run.attempt(attempt),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )


class _Follower:
    """Hands on the lines that rank 0 appends to an attempt's metrics."""

    def __init__(self, run: RunDir, attempt: int, on_step: Callable[[dict[str, Any]], None]) -> None:
        self._run = run
        self._attempt = attempt
        self._uri = run.metrics(attempt)
        self._on_step = on_step
        self._seen = 0
        self._next = 0.0
        self.last_step = 0

    def poll(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (5.0 if storage.is_s3(self._uri) else 0.0)
        try:
            text = storage.read(self._uri)
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole[self._seen :].splitlines():
            record = {"attempt": self._attempt, **json.loads(line)}
            if not self.last_step:
                self._run.log_event("first_step", attempt=self._attempt, step=record["step"])
            self.last_step = record["step"]
            self._on_step(record)
        self._seen = len(whole)


def _judge(error: Exception | None) -> tuple[Outcome, str, UserError | None]:
    """What an attempt's end was, from what `fit()` raised: its kind, in words, and the error that a user can act on."""
    from ray.exceptions import RayActorError, RayError
    from ray.train import ControllerError, WorkerGroupError

    if error is None:
        return "finished", "", None
    if isinstance(error, WorkerGroupError):
        causes = {rank: _cause(failure) for rank, failure in sorted(error.worker_failures.items())}
        for cause in causes.values():
            if isinstance(cause, UserError):
                known = (outcome for kind, outcome in _OUTCOMES.items() if isinstance(cause, kind))
                return next(known, "user_error"), cause.message, cause
        for rank, cause in causes.items():
            if isinstance(cause, RayActorError):
                return "worker_lost", f"rank {rank}: {_first_line(str(cause))}", None
        for rank, cause in causes.items():
            if any(sign in str(cause) for sign in _PEER_LOST):
                return "worker_lost", f"rank {rank} lost a peer: {_first_line(str(cause))}", None
        rank, cause = next(iter(causes.items()), (0, error))
        return "error", f"rank {rank}: {type(cause).__name__}: {cause}", None
    if isinstance(error, ControllerError):
        return "worker_lost", _first_line(str(error.controller_failure)), None
    return ("worker_lost" if isinstance(error, RayError) else "error"), f"{type(error).__name__}: {error}", None


def _cause(failure: BaseException) -> BaseException:
    """Under the wrappers of Ray Train and Ray Data: the exception that was raised, or the death of the worker."""
    for attribute in ("_base_exc", "health_check_failure", "cause", "__cause__"):
        inner = getattr(failure, attribute, None)
        if isinstance(inner, BaseException) and not isinstance(failure, UserError):
            return _cause(inner)
    return failure


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _as_json(chosen: Plan) -> dict[str, Any]:
    return {**asdict(chosen), "node_ids": list(chosen.node_ids), "losers": list(chosen.losers)}
