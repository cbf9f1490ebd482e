"""Run directories made by hand, as attempts leave them: a small corpus, checkpoints, metrics, schedules."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import resume, storage
from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest, load_manifest, save_manifest
from orchestrator.data.schedule import Schedule
from orchestrator.data.shards import Packed, write_shard
from orchestrator.runs import RunDir, open_run
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position

LENGTH = 8
SEQUENCES = 12
"""Of a shard."""
SHARDS = 4
"""Two of each source."""


def run_at(root: str, tokenizer: Path, **values: Any) -> RunDir:
    """A run with a finished corpus, before its first attempt."""
    made = open_run(recipe(root, **values))
    storage.upload_directory(tokenizer, made.tokenizer)
    save_manifest(corpus(made.corpus), made.corpus)
    return made


def recipe(root: str, **values: Any) -> Recipe:
    """Keys that begin with `corpus.` or `train.` in a dictionary of keyword arguments, with _ for the dot."""
    corpus_values = {key.removeprefix("corpus_"): value for key, value in values.items() if key.startswith("corpus_")}
    train_values = {key: value for key, value in values.items() if not key.startswith("corpus_")}
    return Recipe.model_validate(
        {
            "name": "r",
            "storage": root,
            "corpus": {"sources": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}], **corpus_values},
            "train": {"sequence_length": LENGTH, "global_batch_size": 4, "steps": 20, "lr": 0.1, **train_values},
        }
    )


def root_of(run: RunDir) -> str:
    return run.uri.rpartition("/")[0]


def corpus(uri: str, hash_: str = "corpus-1") -> Manifest:
    """Two shards of each source; documents of 5 tokens, so that most sequences hold parts of three."""
    written, document = [], 0
    for number in range(SHARDS):
        source, tokens = "ab"[number // 2], SEQUENCES * LENGTH
        lengths = [5] * (tokens // 5) + [tokens % 5] * (tokens % 5 > 0)
        names = [f"{source}/d{document + n}" for n in range(len(lengths))]
        document += len(lengths)
        packed = Packed(np.arange(tokens, dtype=np.uint32) + number, list(zip(lengths, names, strict=True)))
        written.append(replace(write_shard(uri, f"shards/{number}.arrow", packed, LENGTH, 300), source=source))
    sequences = SHARDS * SEQUENCES
    train = {"sequences": sequences, "tokens": sequences * LENGTH, "shards": [asdict(shard) for shard in written]}
    return Manifest(
        hash=hash_,
        sequence_length=LENGTH,
        vocab_size=300,
        documents={"read": document, "kept": document, "dropped": {}},
        sources={},
        splits={"train": train, "held_out": {"sequences": 0, "tokens": 0, "shards": []}},
        tail_tokens_dropped=0,
    )


def manifest_of(run: RunDir) -> Manifest:
    found = load_manifest(run.corpus)
    assert found is not None
    return found


def commit(run: RunDir, chosen: Schedule, step: int, attempt: int = 1, watch: dict[str, Any] | None = None) -> Commit:
    """A checkpoint of a step, as an attempt on that schedule leaves it."""
    directory = checkpoints.step_directory(run.checkpoints, step)
    name = f"{checkpoints.attempt_folder(attempt)}/__0_0.distcp"
    data = f"state of step {step}".encode()
    storage.write(storage.join(directory, name), data)
    position = Position(step=step, updates=step, past=chosen.past(step), watch=watch or {})
    made = Commit(attempt=attempt, position=position, files={name: len(data)}, metadata_xxh3="")
    storage.write(checkpoints.marker(run.checkpoints, step, attempt), checkpoints.sealed(made))
    return made


def train(run: RunDir, settings: Recipe, first: int, last: int, shares: tuple[int, ...] = (1, 1)) -> int:
    """Leave behind what an attempt over some steps does; returns its number."""
    chosen = resume.data_schedule(run, settings, manifest_of(run))
    run.write_json(run.resolved, {"recipe": settings.model_dump(mode="json"), "versions": {}})
    attempt = run.claim_attempt({"shares": shares})
    resume.begin_attempt(run, attempt)
    resume.record_schedule(run, attempt, chosen, shares, first - 1)
    done = [step for step in range(first, last + 1) if not chosen.skips(step)]
    rest = {"loss": attempt, "tokens_per_second": 1.0, "step_time_s": 1.0, "data_s": 0.0}
    lines = [json.dumps({"step": step, "time": 1e9 + step, **rest}) + "\n" for step in done]
    storage.write(run.metrics(attempt), "".join(lines).encode())
    commit(run, chosen, last, attempt)
    return attempt


def damage(run: RunDir, name: str) -> bytes:
    """Flip a bit of a shard; returns what it was."""
    path = Path(run.corpus, name)
    before = path.read_bytes()
    path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    return before
