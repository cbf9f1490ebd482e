"""Recipe -> Corpus -> Attempts -> Model -> Service: every stage in order, each skipped when its result stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from orchestrator import cluster, drivers, notify, resume, rollback, storage, supervisor
from orchestrator.accelerators import ACCELERATORS
from orchestrator.capacity import make_plan
from orchestrator.config import Recipe
from orchestrator.console import Console
from orchestrator.data import pipeline
from orchestrator.data.documents import STORAGE_FAILED
from orchestrator.data.evaluation_sets import list_evaluation_sets
from orchestrator.data.language import check_languages
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.sources import SourceFile, list_sources
from orchestrator.data.tokenizer import check_directory, given_tokenizer, planned_vocabulary
from orchestrator.drivers import Driver
from orchestrator.errors import CapacityError, CheckpointDamaged, Interrupted, RunFailed, UserError
from orchestrator.hub import model_directory, pinned
from orchestrator.model_files import check_model
from orchestrator.planning.layout import layout_of
from orchestrator.planning.shape import model_shape
from orchestrator.planning.shortage import check_workers
from orchestrator.quota import StorageWatch
from orchestrator.runs import RunDir, open_run, run_of
from orchestrator.train import checkpoints

log = logging.getLogger(__name__)

STAGES = ("corpus", "train", "export", "evaluate", "serve", "report")


def run_recipe(
    recipe: Recipe,
    *,
    source: str | None = None,
    stages: tuple[str, ...] = STAGES,
    address: str | None = None,
    start_over: bool = False,
    console: Console | None = None,
) -> RunDir:
    """Bring a run to where all of its stages are done.

    Args:
        source: text of the recipe file, kept in the run.
        address: of a Ray cluster; None starts one on this machine for as long as a stage needs it.
        start_over: set aside what the run has trained, and begin at step 1.

    Raises:
        UserError: before any worker starts, when the input is wrong.
        RunFailed: a stage ended without its result.
    """
    console = console or Console()
    recipe = pinned(recipe)
    files = check_inputs(recipe)
    notify.check(recipe.notify)
    storage.check_writable(storage.absolute(recipe.storage))
    run = run_of(recipe)
    with ExitStack() as stack:
        stack.callback(console.close)
        driver = stack.enter_context(drivers.claim(run))
        notifier = stack.enter_context(notify.notifying(recipe.notify, run))
        session = _Session(run, recipe, files, driver, console, stack, address, trains="train" in stages)
        if start_over:
            session.connect()  # a plan that fits nowhere is refused before anything is set aside
        open_run(recipe, source, start_over, _begin_anew if start_over else _go_on)
        log.info("run %s; look inside with: terrane status %s", run.uri, run.uri)
        for fault in recipe.faults:
            log.info("this recipe injects a failure on purpose: %s, at step %d", fault, fault.step)
        made: list[str] = []
        for name in stages:
            driver.check()
            done, make = _STAGES[name]
            if done(session):
                asked = name != "serve" or recipe.serving.prompts
                log.info("%s: %s, skipped", name, "done before" if asked else "no serving.prompts to answer")
                continue
            if not made:
                run.log_event("driver_started")
            made.append(name)
            with _timed(run, name):
                make(session)
        if made:
            notifier.tell("finished", f"{', '.join(made)}: done")
    return run


def _begin_anew(run: RunDir, recipe: Recipe) -> None:
    resume.finish_start_over(run)
    resume.start_over(run, recipe)


def _go_on(run: RunDir, recipe: Recipe) -> None:
    resume.finish_start_over(run)
    rollback.finish(run)
    resume.check_past(run, recipe)


def check_inputs(recipe: Recipe) -> list[SourceFile]:
    """Everything about a recipe's inputs that can be known without a device. Returns the files of its sources.

    Raises:
        UserError: names the first thing that is wrong.
    """
    files = list_sources(recipe.corpus)
    check_languages(recipe.corpus.languages)
    list_evaluation_sets(recipe.corpus.decontaminate)
    if recipe.model.path:
        check_model(model_directory(recipe.model))
    given = given_tokenizer(recipe)
    if given:
        check_directory(str(given))
    layout_of(recipe.train, model_shape(recipe, planned_vocabulary(recipe)), recipe.train.dtype)
    check_workers(recipe.train)
    return files


class _Session:
    """What the stages of one command share: the run, and a Ray cluster from the first stage on that needs one."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        files: list[SourceFile],
        driver: Driver,
        console: Console,
        stack: ExitStack,
        address: str | None,
        trains: bool,
    ) -> None:
        """
        Args:
            trains: whether the train stage is one of the command's.
        """
        self.run = run
        self.recipe = recipe
        self.files = files
        self.driver = driver
        self.console = console
        self.trains = trains
        self._stack = stack
        self._address = address
        self._connected = False

    def connect(self) -> None:
        """Connect to Ray, and make sure at once that the cluster can hold the plan."""
        if not self._connected:
            log.info("ray: %s", f"connecting to {self._address}" if self._address else "starting on this machine")
            self._stack.enter_context(cluster.connection(self._address))
            self._connected = True
            with suppress(CapacityError) if self._address else nullcontext():  # a cluster that is joined may grow
                make_plan(self.run, self.recipe)

    @property
    def own_cluster(self) -> bool:
        """Whether the cluster was started for this command."""
        return self._address is None

    def manifest(self) -> Manifest:
        manifest = load_manifest(self.run.corpus)
        if manifest is None:
            raise RunFailed(f"{self.run.uri} has no corpus yet", "run the corpus stage first")
        return manifest

    def last_commit(self) -> checkpoints.Commit:
        commit = resume.resume_point(self.run)
        if commit is None:
            raise RunFailed(f"{self.run.uri} has no checkpoint yet", "run the train stage first")
        return commit

    def remotely(self, work: Callable[..., Any], *args: Any, gpus: int = 0) -> Any:
        """Call work(*args) as a Ray task, so that the driver stays small."""
        import ray

        self.connect()
        return ray.get(ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(work).remote(*args))


# --- corpus -----------------------------------------------------------------------------------------------------------


def _corpus_done(session: _Session) -> bool:
    manifest = load_manifest(session.run.corpus)
    if manifest is None or manifest.inputs != pipeline.corpus_inputs(session.recipe):
        return False
    unread = manifest.documents["dropped"].get(STORAGE_FAILED)
    if manifest.files == pipeline.listing_digest(session.files) and not unread:
        return True
    if session.run.current_attempts():
        log.info("corpus: the files of the sources have changed, or can be read again; this run trains on what it had")
        return True
    return False


def _make_corpus(session: _Session) -> None:
    session.connect()

    def progress(what: str, done: int, of: int) -> None:
        session.driver.check()
        session.console.progress(what, done, of)

    manifest = pipeline.build_corpus(session.recipe, session.run.corpus, session.files, progress)
    train = manifest.splits["train"]
    log.info("corpus: %d training tokens in %d shards", train["tokens"], len(train["shards"]))


# --- train ------------------------------------------------------------------------------------------------------------


def _train_done(session: _Session) -> bool:
    if _export_done(session):
        return True
    commit = resume.resume_point(session.run)
    return commit is not None and commit.step >= session.recipe.train.steps


def _train(session: _Session) -> None:
    session.manifest()
    session.connect()
    total = session.recipe.train.steps

    watch = StorageWatch(session.run, session.recipe.train.storage_quota_gib)

    def on_step(record: dict[str, Any]) -> None:
        session.driver.check()
        watch.poll(time.monotonic())
        session.console.step(record, total)

    supervisor.supervise(session.run, session.recipe, session.driver, on_step, session.own_cluster)


# --- export, evaluate -------------------------------------------------------------------------------------------------


def _export_done(session: _Session) -> bool:
    facts = session.run.read_json(session.run.model_manifest)
    return facts is not None and facts["step"] >= session.recipe.train.steps


def _export(session: _Session) -> None:
    from orchestrator.train.export import export

    run, damaged = session.run, set[int]()
    while True:
        commit = session.last_commit()
        try:
            session.remotely(export, run, session.recipe, session.manifest(), commit, run.model)
            break
        except CheckpointDamaged as error:
            resume.set_aside_damaged(run, commit.step, error.message)
            if not session.trains or commit.step in damaged:
                hint = "run the same command: training goes on from the checkpoint before"
                raise RunFailed(error.message, hint) from None
            damaged.add(commit.step)
            log.warning("export: the last checkpoint is damaged; training goes on from the one before")
            _train(session)
    run.log_event("exported", step=commit.step)
    log.info("export: step %d as a Hugging Face model in %s", commit.step, run.model)


def _evaluation_key(session: _Session) -> dict[str, Any]:
    return session.recipe.evaluation.model_dump(mode="json")


def _exported_step(session: _Session) -> int:
    facts = session.run.read_json(session.run.model_manifest)
    if facts is None:
        raise RunFailed(f"{session.run.uri} has no exported model yet", "run the export stage first")
    return int(facts["step"])


def _evaluate_done(session: _Session) -> bool:
    if not _export_done(session):
        return False
    result = session.run.read_json(session.run.evaluation(_exported_step(session)))
    return result is not None and result["settings"] == _evaluation_key(session)


def _evaluate(session: _Session) -> None:
    from orchestrator.evaluation.perplexity import evaluate

    run, step = session.run, _exported_step(session)
    session.connect()
    accelerator = ACCELERATORS[make_plan(run, session.recipe).accelerator]
    gpus = 1 if accelerator.ray_resource == "GPU" else 0
    args = (run, session.recipe, session.manifest(), step, accelerator.torch_device)
    result = session.remotely(evaluate, *args, gpus=gpus)
    run.write_json(run.evaluation(step), {**result, "settings": _evaluation_key(session)})
    run.log_event("evaluated", step=step, before=result["base"]["perplexity"], after=result["model"]["perplexity"])
    before, after = result["base"]["perplexity"], result["model"]["perplexity"]
    log.info("held-out perplexity: %.1f before, %.1f after (%d tokens)", before, after, result["tokens"])


# --- serve, report ----------------------------------------------------------------------------------------------------


def _serve_key(session: _Session) -> dict[str, Any]:
    return {"step": _exported_step(session), **session.recipe.serving.model_dump(mode="json")}


def _serve_done(session: _Session) -> bool:
    if not session.recipe.serving.prompts:
        return True
    answers = session.run.read_json(session.run.answers) if _export_done(session) else None
    return answers is not None and answers["settings"] == _serve_key(session)


def _serve(session: _Session) -> None:
    """Serve the model over REST, ask the recipe's prompts, and take the service down again."""
    from serve import deploy

    run, serving = session.run, session.recipe.serving
    settings = _serve_key(session)
    session.connect()
    args = {
        "model": run.model,
        "name": session.recipe.name,
        "min_replicas": serving.min_replicas,
        "max_replicas": serving.max_replicas,
        "cpus_per_replica": serving.cpus_per_replica,
        "gpus_per_replica": serving.gpus_per_replica,
    }
    answers = []
    try:
        url = deploy.deploy(args, port=0)
        log.info("serve: POST %s/v1/completions answers", url)
        for prompt in serving.prompts:
            answer = deploy.ask(url, prompt, serving.max_tokens)
            tokens = answer["usage"]["completion_tokens"]
            log.info("serve: %r -> %r (%d tokens, %.2f s)", prompt, answer["text"], tokens, answer["seconds"])
            answers.append(
                {"prompt": prompt, "completion": answer["text"], "tokens": tokens, "seconds": answer["seconds"]}
            )
    finally:
        deploy.stop()
    run.write_json(run.answers, {"settings": settings, "answers": answers})


def _report_done(session: _Session) -> bool:
    events = session.run.events()
    return storage.exists(session.run.report_html) and bool(events) and events[-1].get("stage") == "report"


def _report(session: _Session) -> None:
    from orchestrator.report import write_report

    log.info("report: %s", write_report(session.run))


_STAGES: dict[str, tuple[Callable[[_Session], bool], Callable[[_Session], None]]] = {
    "corpus": (_corpus_done, _make_corpus),
    "train": (_train_done, _train),
    "export": (_export_done, _export),
    "evaluate": (_evaluate_done, _evaluate),
    "serve": (_serve_done, _serve),
    "report": (_report_done, _report),
}


@contextmanager
def _timed(run: RunDir, stage: str) -> Iterator[None]:
    run.log_event("stage_started", stage=stage)
    before = time.time()
    try:
        yield
    except UserError as error:
        event = "stage_stopped" if isinstance(error, Interrupted) else "stage_failed"
        run.log_event(event, stage=stage, message=error.message)
        raise
    run.log_event("stage_finished", stage=stage, seconds=round(time.time() - before, 2))
