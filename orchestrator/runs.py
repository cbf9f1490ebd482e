"""RunDir: every path name of a run, its claims and its event log. A path of a run is spelled here and nowhere else.

<storage>/<run>/
  recipe.yaml  resolved.json
  drivers/  corpus/  events/  metrics/  attempts/  checkpoints/  evaluation/  serving/  model/
  report.html  report.md
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator import storage
from orchestrator.config import Recipe, changed_values
from orchestrator.errors import LastingStorageError, RunFailed, UserError
from orchestrator.fault_config import BaseFault

log = logging.getLogger(__name__)

_EVENT_FILE, _METRICS_FILE = re.compile(r"(\d+)-\w+\.json"), re.compile(r"attempt-(\d+)\.jsonl")

STARTED_OVER = "started-over.json"
"""In the directory of the checkpoints, so that who commits and who reads look at the same place."""


@dataclass(frozen=True)
class RunDir:
    """A run directory on storage. Holds no state: two processes with the same uri see the same run."""

    uri: str

    # --- names --------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    def path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    @property
    def resolved(self) -> str:
        return self.path("resolved.json")

    @property
    def corpus(self) -> str:
        return self.path("corpus")

    @property
    def corpus_manifest(self) -> str:
        return self.path("corpus", "manifest.json")

    @property
    def tokenizer(self) -> str:
        return self.path("corpus", "tokenizer")

    @property
    def checkpoints(self) -> str:
        return self.path("checkpoints")

    @property
    def started_over(self) -> str:
        """Where the run was begun anew: the last attempt that no longer counts, and whether all is set aside."""
        return storage.join(self.checkpoints, STARTED_OVER)

    @property
    def model(self) -> str:
        return self.path("model")

    @property
    def model_manifest(self) -> str:
        """Written last by an export; a model directory without it is unfinished."""
        return self.path("model", "terrane.json")

    @property
    def answers(self) -> str:
        return self.path("serving", "answers.json")

    @property
    def stop_request(self) -> str:
        return self.path("stop.json")

    @property
    def lost_shards(self) -> str:
        return self.path("lost_shards.json")

    @property
    def quarantined_nodes(self) -> str:
        return self.path("quarantined_nodes.json")

    @property
    def preflights(self) -> str:
        return self.path("preflight")

    @property
    def drivers(self) -> str:
        """The claims of the processes that drive the run."""
        return self.path("drivers")

    @property
    def ray_train(self) -> str:
        """Ray Train wants a directory of its own; it is empty but for a marker, and deleted."""
        return self.path("ray_train")

    @property
    def report_html(self) -> str:
        return self.path("report.html")

    @property
    def report_markdown(self) -> str:
        return self.path("report.md")

    def preflight(self, node_id: str) -> str:
        """What was measured of a node."""
        return storage.join(self.preflights, f"{node_id}.json")

    def attempt(self, number: int) -> str:
        return self.path("attempts", f"{number:03d}")

    def plan(self, number: int) -> str:
        """Its conditional creation is what claims the attempt."""
        return storage.join(self.attempt(number), "plan.json")

    def schedule(self, number: int) -> str:
        """What the steps of an attempt consume."""
        return storage.join(self.attempt(number), "data.json")

    def attempt_error(self, number: int) -> str:
        return storage.join(self.attempt(number), "error.json")

    def spike(self, number: int, step: int) -> str:
        """What an attempt found out about a loss spike."""
        return storage.join(self.attempt(number), f"spike-{step:08d}.json")

    def sample_losses(self, number: int, step: int) -> str:
        """The losses of all samples of the steps up to a loss spike: numpy arrays `steps`, `ids` and `losses`."""
        return storage.join(self.attempt(number), f"samples-{step:08d}.npz")

    def rollback(self, number: int) -> str:
        """Where the run went back to after an attempt that ended with a loss spike."""
        return storage.join(self.attempt(number), "rollback.json")

    def profile(self, number: int, rank: int) -> str:
        """What a rank did in some steps."""
        return storage.join(self.attempt(number), "profile", f"rank-{rank}.json.gz")

    def attempt_logs(self, number: int) -> str:
        return storage.join(self.attempt(number), "logs")

    def stacks(self, number: int, rank: int) -> str:
        """What a rank of an attempt was doing when it hung."""
        return storage.join(self.attempt_logs(number), f"stacks-rank-{rank}.txt")

    def metrics(self, number: int) -> str:
        return self.path("metrics", f"attempt-{number:03d}.jsonl")

    def checkpoint(self, step: int) -> str:
        return storage.join(self.checkpoints, f"step-{step:08d}")

    def evaluation(self, step: int) -> str:
        return self.path("evaluation", f"step-{step:08d}.json")

    # --- content ------------------------------------------------------------------------------------------------------

    def read_json(self, uri: str) -> Any | None:
        """The JSON at uri, None where there is nothing."""
        try:
            return storage.read_json(uri)
        except FileNotFoundError:
            return None

    def write_json(self, uri: str, value: Any) -> None:
        storage.write(uri, _dump(value))

    def recipe(self) -> Recipe:
        """
        Raises:
            UserError: there is no run here.
        """
        resolved = self.read_json(self.resolved)
        if resolved is None:
            raise UserError(f"no run at {self.uri}", "give the run directory, as in runs/tiny")
        try:
            return Recipe.model_validate(resolved["recipe"])
        except (TypeError, KeyError, ValueError) as error:
            message = f"{self.resolved} is of another version of Terrane, or damaged: {type(error).__name__}"
            raise LastingStorageError(message, "use the version that began the run") from None

    def attempts(self) -> list[int]:
        """Numbers of the claimed attempts, in order."""
        names = storage.list_files(self.path("attempts"))
        claims = (name.split("/") for name in names if name.endswith("/plan.json"))
        return sorted(int(claim[0]) for claim in claims if claim[0].isdigit())

    def last_schedule(self, step: int | None = None) -> dict[str, Any] | None:
        """What the newest attempt (at a step: that came to it) was to consume, with its `attempt`."""
        for number in reversed(self.current_attempts()):
            found = self.read_json(self.schedule(number))
            if found and (step is None or found["from_step"] <= step):
                return {"attempt": number, **found}
        return None

    def current_attempts(self) -> list[int]:
        """Those since the run was last started over."""
        after = self.last_before_start_over()
        return [number for number in self.attempts() if number > after]

    def spikes(self) -> list[dict[str, Any]]:
        """What the attempts since the run was last started over found out about loss spikes, in order."""
        return self._of_attempts("spike-")

    def rollbacks(self) -> list[dict[str, Any]]:
        """Where the run went back to after loss spikes, since it was last started over, in order."""
        return self._of_attempts("rollback.json")

    def _of_attempts(self, prefix: str) -> list[dict[str, Any]]:
        """The files of the current attempts whose names begin so."""
        current = {f"{number:03d}" for number in self.current_attempts()}
        found = [name.split("/") for name in storage.list_files(self.path("attempts"))]
        chosen = sorted(name for name in found if name[0] in current and name[1].startswith(prefix))
        return [storage.read_json(self.path("attempts", *name)) for name in chosen]

    def last_before_start_over(self) -> int:
        """Number of the last attempt that no longer counts, 0 where all do."""
        return last_before_start_over(self.checkpoints)

    def claim_attempt(self, plan: dict[str, Any]) -> int:
        """Take the next attempt number; two drivers never get the same one."""
        number = max(self.attempts(), default=0) + 1
        while not storage.create(self.plan(number), _dump({"claimed_by": holder(), **plan})):
            number += 1
        return number

    def log_event(self, event: str, **facts: Any) -> None:
        """Append one fact to the event log."""
        record = {"event": event, "time": time.time(), "by": holder(), **facts}
        number = max((int(name.split("-")[0]) for name in self._event_files()), default=0) + 1
        while not storage.create(self.path("events", f"{number:06d}-{event}.json"), _dump(record)):
            number += 1

    def events(self) -> list[dict[str, Any]]:
        """Every fact, in the order in which they were written. What is damaged is left out, with a warning."""
        uris = [self.path("events", name) for name in self._event_files()]
        with ThreadPoolExecutor(16) as threads:  # on S3, a request each
            texts = list((threads.map if storage.is_s3(self.uri) else map)(storage.read, uris))
        found = [(uri, _record(text)) for uri, text in zip(uris, texts, strict=True)]
        for uri, record in found:
            if not {"event", "time"} <= record.keys():
                log.warning("%s is damaged, and left out", uri)
        return [record for _, record in found if {"event", "time"} <= record.keys()]

    def _event_files(self) -> list[str]:
        return [name for name in storage.list_files(self.path("events")) if _EVENT_FILE.fullmatch(name)]

    def metric_lines(self, only: int | None = None) -> list[dict[str, Any]]:
        """All step records of all attempts, or of one, in attempt and then step order, each with its `attempt`. What is
        damaged is left out."""
        lines = []
        for name in filter(None, map(_METRICS_FILE.fullmatch, storage.list_files(self.path("metrics")))):
            attempt = int(name[1])
            if only not in (None, attempt):
                continue
            whole, _, _ = storage.read(self.path("metrics", name[0])).rpartition(b"\n")  # not a line half written
            records = map(_record, whole.splitlines())
            lines += [{"attempt": attempt, **record} for record in records if "step" in record]
        return lines

    def loss_curve(self) -> dict[int, dict[str, Any]]:
        """The record of every step that counts: where attempts overlap, the later one's; none where that passed over
        what one before had done."""
        lines = [line for line in self.metric_lines() if line.get("step") is not None]
        curve: dict[int, dict[str, Any]] = {}
        after = self.last_before_start_over()
        for attempt in sorted({line["attempt"] for line in lines} | set(self.current_attempts())):
            if attempt > after:
                chosen = self.read_json(self.schedule(attempt)) or {"skip_steps": []}
                for first, last in chosen["skip_steps"]:
                    for step in range(max(first, chosen["from_step"]), last + 1):
                        curve.pop(step, None)
                curve |= {line["step"]: line for line in lines if line["attempt"] == attempt}
        return curve

    def claim_fault(self, fault: BaseFault) -> bool:
        """True once for each of `faults`: an injected failure does not come back after the restart."""
        return storage.create(self.path("faults", f"{fault.name}.json"), _dump({"by": holder()}))


def open_run(
    recipe: Recipe,
    source: str | None = None,
    start_over: bool = False,
    check: Callable[[RunDir, Recipe], None] = lambda run, recipe: None,
) -> RunDir:
    """Create the run of a recipe, or find it again.

    Args:
        source: the recipe file's text, kept beside the resolved values.
        start_over: what the run has trained is to be set aside, so that any value may change.
        check: called before anything is written; raises for a recipe that does not go with what the run has trained.

    Raises:
        UserError: the run was begun with other values.
    """
    run = run_of(recipe)
    values = recipe.model_dump(mode="json")
    before = run.read_json(run.resolved)
    begun = storage.exists(run.corpus_manifest) or bool(run.attempts())
    if before is not None and begun and not start_over:
        changes = changed_values(before["recipe"], values)
        if changes:
            raise UserError(
                f"{run.uri} was begun with another recipe: {'; '.join(changes)}",
                "take the values back, give the run another name (name=...), or begin anew with --start-over",
            )
    check(run, recipe)
    if before is None or before["recipe"] != values:
        run.write_json(run.resolved, {"recipe": values, "versions": _versions()})
    if source is not None:
        storage.write(run.path("recipe.yaml"), source.encode())
    return run


def last_before_start_over(checkpoints: str) -> int:
    """Number of the last attempt whose commits no longer count, 0 where all do."""
    try:
        return int(storage.read_json(storage.join(checkpoints, STARTED_OVER))["last_attempt"])
    except FileNotFoundError:
        return 0


def run_of(recipe: Recipe) -> RunDir:
    """Where the run of a recipe is, or would be."""
    return RunDir(storage.join(storage.absolute(recipe.storage), recipe.name))


def find_run(location: str) -> RunDir:
    """The run at a directory or URI.

    Raises:
        UserError: there is none.
    """
    run = RunDir(storage.absolute(location))
    run.recipe()
    return run


def require(run: RunDir, uri: str, what: str, hint: str) -> Any:
    """The JSON at uri.

    Raises:
        RunFailed: nothing there: the stage that makes it has not finished.
    """
    value = run.read_json(uri)
    if value is None:
        raise RunFailed(f"{run.uri} has no {what} yet", hint)
    return value


def holder() -> str:
    """This process, told apart from every other: host, pid and a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("terrane", "ray", "torch", "deepspeed", "transformers", "pyarrow")}


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=False) + "\n").encode()


def _record(text: bytes) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
