"""The frame of every `terrane run`, without its stages: one driver at a time, and people told of how it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.config import Recipe
from orchestrator.errors import RunFailed, UserError
from orchestrator.runs import RunDir, run_of
from orchestrator.stages import run_recipe
from tests.driver import launch

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"


def recipe(folder: Path, **train: object) -> Recipe:
    (folder / "papers.txt").write_text("alpha beta gamma")
    return Recipe.model_validate(
        {
            "name": "r",
            "storage": str(folder / "runs"),
            "corpus": {"sources": [{"name": "a", "path": str(folder / "papers.txt")}]},
            "model": {"architecture": "llama", "layers": 2, "hidden_size": 32, "heads": 2},
            "train": {"sequence_length": 8, "steps": 20, "lr": 0.1, **train},
            "notify": {"command": [sys.executable, "-c", WRITES, str(folder / "message")]},
        }
    )


def message(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "message").read_text()))


def test_a_second_command_on_a_run_is_told_who_drives_it(tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    process = launch(run_of(settings))
    try:
        with pytest.raises(RunFailed, match=f"is driven by process {process.pid} on "):
            run_recipe(settings, stages=())
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "message").exists(), "the run goes on"
    run_recipe(settings, stages=())


def test_a_command_that_is_refused_lets_go_of_the_run_and_tells(tmp_path: Path) -> None:
    run = run_recipe(recipe(tmp_path), stages=())
    run.claim_attempt({})
    with pytest.raises(UserError, match=r"train\.lr was 0\.1"):
        run_recipe(recipe(tmp_path, lr=0.2), stages=())
    assert (message(tmp_path)["kind"], message(tmp_path)["run"]) == ("failed", run.uri)
    assert run_recipe(recipe(tmp_path), stages=()) == RunDir(run.uri)
