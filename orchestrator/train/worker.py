"""One rank's life in an attempt: build the engine, load, then batch, step, record, commit until the last step."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from orchestrator import accelerators, quota, storage
from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.schedule import Role, Schedule
from orchestrator.errors import UserError
from orchestrator.evaluation.held_out import HeldOut
from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir
from orchestrator.train import beats, stacks
from orchestrator.train.agent_line import AgentLine
from orchestrator.train.beats import Beat
from orchestrator.train.checkpoints import Commit, Position, Retention
from orchestrator.train.faults import Faults
from orchestrator.train.learning_rate import learning_rate
from orchestrator.train.memory_copies import Copies
from orchestrator.train.recorder import Recorder
from orchestrator.train.sample_losses import SampleLosses
from orchestrator.train.watch import Watch

log = logging.getLogger("terrane.worker")

STOP_POLL_S = 1.0


class Request(IntEnum):
    """What rank 0 asks of all after a step; the greatest counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_LEAVE = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told. Crosses process borders as plain values."""

    run: str
    recipe: dict[str, Any]
    plan: dict[str, Any]
    attempt: int
    schedule: dict[str, Any]
    """What every step consumes."""
    resume: dict[str, Any] | None
    """The commit to go on from."""
    devices: dict[str, list[int]]
    """Ids of the run's GPUs by node id."""
    copies: dict[str, Any] | None = None
    """memory_copies.Places: where copies of checkpoints are kept in memory; None: nowhere."""

    def commit(self) -> Commit | None:
        if self.resume is None:
            return None
        return Commit(**{**self.resume, "position": Position(**self.resume["position"])})


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What a worker is told before it has a job."""

    recipe: dict[str, Any]
    vocab_size: int
    group: str
    accelerator: str
    agents: dict[str, Any]
    """Handle of the agent by node id."""
    cold: bool
    """Whether the job comes at once."""


def train_worker(values: dict[str, Any]) -> None:
    """Ray Train calls it in every worker. It makes ready, waits for its job, and returns at the last step, or when
    asked to."""
    began = time.time()
    waiting = Waiting(**values)
    rank = _ray_rank()
    agent = AgentLine(waiting.agents[_ray_node()], waiting.group, rank)
    beat = _signs(agent.register(), rank)
    with agent.told_of_the_end():
        accelerator = accelerators.ACCELERATORS[waiting.accelerator]
        accelerators.prepare_process(accelerator)
        _warm_up(waiting, accelerator)
        beat.mark("parked", 0)
        found = agent.job()
        if found:
            job = Job(**found)
            beat.mark("loading", 0)
            run = RunDir(job.run)
            with _log_file(run, job.attempt, rank):
                _take_device(job)
                _train(job, Recipe.model_validate(job.recipe), Plan(**job.plan), run, rank, began, beat, agent)


def _signs(folder: str, rank: int) -> Beat:
    """Where the agent sees what this rank does, and asks for its stacks."""
    stacks.install(stacks.path(folder, rank))
    return Beat(beats.path(folder, rank))


def _warm_up(waiting: Waiting, accelerator: accelerators.Accelerator) -> None:
    from orchestrator.train.warm_up import warm_up

    warm_up(Recipe.model_validate(waiting.recipe), waiting.vocab_size, accelerator, rehearse=not waiting.cold)


def _take_device(job: Job) -> None:
    """Of the node's devices the one that is this worker's; DeepSpeed goes by LOCAL_RANK."""
    if not job.devices:
        return
    import ray.train
    import torch

    device = job.devices[_ray_node()][ray.train.get_context().get_local_rank()]
    os.environ["LOCAL_RANK"] = str(device)
    torch.cuda.set_device(device)


def _train(
    job: Job, recipe: Recipe, plan: Plan, run: RunDir, rank: int, began: float, beat: Beat, agent: AgentLine
) -> None:
    from orchestrator.data.stream import stream
    from orchestrator.train.integrity import Integrity, Node
    from orchestrator.train.profiling import Profiler, labelled
    from orchestrator.train.replicas import reading_group, replicated
    from orchestrator.train.stragglers import Stragglers

    config, resume = recipe.train, job.commit()
    manifest = load_manifest(run.corpus)
    assert manifest is not None, "the supervisor starts no attempt before the corpus is done"
    schedule = Schedule.from_json(job.schedule)
    role = plan.role(rank)
    first = resume.step + 1 if resume else 1
    read = stream(run.corpus, schedule, role, first, config.steps)

    engine_began, copies = time.time(), Copies.of(job.copies, _ray_node())
    beat.mark("loading", first - 1)
    engine = _ready_engine(run, recipe, plan, manifest.vocab_size, schedule.exclusions.filler, resume, copies)
    if rank == 0:
        times = {"began": began, "engine_began": engine_began, "loaded": time.time()}
        run.log_event("worker_started", attempt=job.attempt, **times)
    shares = replicated(read, role, *reading_group(plan))
    recorder = Recorder(run, job.attempt, rank, schedule)
    saver = _saver(run, recipe, job.attempt, recorder, copies)
    watch = _watch(job, recipe, plan, manifest, schedule, role)
    held_out = HeldOut(run.corpus, recipe, manifest, role) if config.evaluate_every else None
    integrity = Integrity(engine, config.sequence_length, Node(socket.gethostname(), _ray_node()))
    stragglers = Stragglers(run, job.attempt, plan, config.straggler_ratio, integrity.nodes, rank, agent.tell_slow)
    profiler = Profiler(run.profile(job.attempt, rank), config.profile)
    stop = StopRequest(run, rank)
    faults = Faults(run, recipe.faults, rank, plan.workers, accelerators.ACCELERATORS[plan.accelerator].torch_device)
    clock = _save_clock(run, recipe, rank, saver)
    updates = resume.position.updates if resume else 0
    asked = Request.NOTHING
    with (
        contextlib.closing(recorder),
        contextlib.closing(saver),
        contextlib.closing(profiler),
        contextlib.closing(faults),
    ):
        for share in recorder.timed(profiler.over(beat.over(shares, first), first)):
            step, held_out_loss, asked = share.step, None, Request.NOTHING
            if share.targets:
                lr = learning_rate(config, step)
                result = engine.step(share, lr, _request(stop, clock), watch.accepts(step))
                recorder.computed()
                if held_out and _due(step, config.evaluate_every, config.steps):
                    beat.mark("evaluation", step)
                    held_out_loss = held_out.loss(engine)
                recorder.record(step, result, lr, held_out_loss)
                if clock:
                    clock.stepped(recorder.compute_s)
                updates, asked = updates + result.applied, Request(result.flag)
                integrity.explain(share, result)
                watch.follow(step, result)
                stragglers.follow(step, result)
            else:
                log.info("step %d: passed over", step)
            saver.poll()
            faults.strike(step, saver.close)
            if step == config.steps and not updates:
                raise UserError("no step had anything to learn from: all of it is skipped, quarantined or lost")
            saving = config.saves_at(step) or asked >= Request.SAVE
            if config.check_every and (saving or step % config.check_every == 0):
                beat.mark("check", step)
                with recorder.checking():  # what is committed has passed a check
                    integrity.check(step)
            if saving:
                position = Position(
                    step=step,
                    updates=updates,
                    loss_scale=engine.loss_scale,
                    past=schedule.past(step),
                    watch=watch.state(),
                )
                beat.mark("checkpoint", step)
                with recorder.saving(), labelled("checkpoint"):
                    engine.save(saver, position, held_out_loss)
                if clock:
                    clock.saved(recorder.checkpoint_s)
            if asked is Request.SAVE_AND_LEAVE:
                break
        beat.mark("ending", step)
        saver.wait()
    if asked is Request.SAVE_AND_LEAVE:
        log.info("step %d: asked to stop, state committed", step)


def _ready_engine(
    run: RunDir,
    recipe: Recipe,
    plan: Plan,
    vocab_size: int,
    document_end: int,
    resume: Commit | None,
    copies: Copies,
) -> Any:
    """The engine, with the state that training goes on from."""
    import torch

    from orchestrator.train.engine import Engine
    from orchestrator.train.models import model_config
    from orchestrator.train.weights import open_weights

    train = recipe.train
    accelerator = accelerators.ACCELERATORS[plan.accelerator]
    if accelerator is accelerators.CPU:
        torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    config = model_config(recipe.model, vocab_size, train.sequence_length)
    engine = Engine(config, train, plan, accelerator, document_end if train.keep_documents_apart else None)
    if resume:
        engine.load(run.checkpoints, resume, copies)
    else:
        engine.start(open_weights(recipe.model, vocab_size, train.sequence_length, train.seed))
    return engine


def _watch(job: Job, recipe: Recipe, plan: Plan, manifest: Manifest, schedule: Schedule, role: Role) -> Watch:
    run, config, resume = RunDir(job.run), recipe.train.spikes, job.commit()
    samples = SampleLosses(run.corpus, manifest, schedule, role, config.jump + 1)
    state = resume.position.watch if resume else {}
    return Watch(run, job.attempt, config, schedule.order, samples, fp16=plan.dtype == "fp16", state=state)


def _due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _request(stop: StopRequest, clock: Any | None) -> Request:
    if stop.requested():
        return Request.SAVE_AND_LEAVE
    return Request.SAVE if clock and clock.due() else Request.NOTHING


def _save_clock(run: RunDir, recipe: Recipe, rank: int, saver: Any) -> Any | None:
    """On rank 0, where saves go by time."""
    from orchestrator.train.save_clock import SaveClock, reading

    if rank != 0 or recipe.train.checkpoint_every != "auto":
        return None
    return SaveClock(reading(run), lambda: saver.in_flight)


def _saver(run: RunDir, recipe: Recipe, attempt: int, recorder: Recorder, copies: Copies) -> Any:
    from orchestrator.train.saver import Saver, Timing

    def committed(commit: Commit, timing: Timing) -> None:
        seconds = {name: round(value, 3) for name, value in asdict(timing).items()}
        run.log_event("committed", attempt=attempt, step=commit.step, bytes=commit.bytes, **seconds)
        recorder.flush()
        megabytes, stood_s = commit.bytes / 1e6, timing.waited_s + timing.copied_s
        log.info("step %d committed: %.1f MB in %.2f s", commit.step, megabytes, timing.saved_s)
        log.info(
            "step %d: training stood still for %.2f s (%.2f for the save before)", commit.step, stood_s, timing.waited_s
        )

    train = recipe.train
    retention = Retention(last=train.keep_checkpoints, every=train.keep_every, best=train.keep_best)
    return Saver(
        run.checkpoints,
        attempt,
        retention,
        committed,
        lambda: quota.free_bytes(run.uri, train.storage_quota_gib),
        copies,
    )


def _ray_rank() -> int:
    import ray.train

    return int(ray.train.get_context().get_world_rank())


def _ray_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


class StopRequest:
    """Rank 0 looks for the run's stop request, beside training; the others learn of it on the step's collective."""

    def __init__(self, run: RunDir, rank: int) -> None:
        self._run = run
        self._found = threading.Event()
        if rank == 0:
            threading.Thread(target=self._look, name="stop-request", daemon=True).start()

    def requested(self) -> bool:
        return self._found.is_set()

    def _look(self) -> None:
        poll_s = STOP_POLL_S * (3 if storage.is_s3(self._run.uri) else 1)
        while not self._found.is_set():
            try:
                if storage.exists(self._run.stop_request):
                    self._found.set()
            except Exception as error:  # training goes on without storage until it saves
                log.warning("no look for a request to stop: %s", str(error) or type(error).__name__)
            time.sleep(poll_s)


@contextlib.contextmanager
def _log_file(run: RunDir, attempt: int, rank: int) -> Iterator[None]:
    """Everything logged in this process, and the traceback it ends with, in the attempt's logs."""
    out = storage.Appender(storage.join(run.attempt_logs(attempt), f"rank-{rank}.log"))
    handler = logging.Handler()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.emit = lambda record: out.append(formatter.format(record))  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException:
        log.exception("rank %d ends", rank)
        raise
    finally:
        root.removeHandler(handler)
        out.close()
