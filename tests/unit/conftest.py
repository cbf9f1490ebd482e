"""Runs made by hand, for the tests that look at run directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data import tokenizer as tokenizers
from orchestrator.runs import RunDir
from tests.made_runs import run_at


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(["alpha beta gamma. " * 20], vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> RunDir:
    return run_at(str(tmp_path), tokenizer)


@pytest.fixture
def run_anywhere(anywhere: str, tokenizer: Path) -> RunDir:
    return run_at(anywhere, tokenizer)
