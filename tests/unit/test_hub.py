"""Models by org/name@revision, against a server on loopback that speaks the hub's own endpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator import hub
from orchestrator.config import Recipe, load_recipe
from orchestrator.errors import UserError
from orchestrator.hub import model_directory, pinned
from orchestrator.model_config import ModelConfig
from orchestrator.model_files import check_model
from orchestrator.runs import open_run
from tests.conftest import ROOT
from tests.model_directories import directory_of

NAME = "org/tiny"
FIRST, SECOND = "a" * 40, "b" * 40


@dataclass
class FakeHub:
    """What a hub holds: a repository, its commits, what its branches mean now."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    asked: list[str] = field(default_factory=list)
    """Paths of the requests, in order."""
    gated: bool = False


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        info = re.fullmatch(rf"/api/models/{NAME}/revision/(.+)", path)
        tree = re.fullmatch(rf"/api/models/{NAME}/tree/([^/]+)", path)
        file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
        found = info or tree or file
        commit = self.hub.branches.get(found[1], found[1]) if found else None
        if self.hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif commit not in self.hub.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif file:
            data = self.hub.commits[commit][file[2]]
            self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_sha1(data)}"'}, body)
        elif tree:
            self._send(200, json.dumps([_entry(n, d) for n, d in self.hub.commits[commit].items()]).encode(), {}, body)
        else:
            self._send(200, json.dumps({"id": NAME, "sha": commit, "siblings": []}).encode(), {}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = directory_of(tmp_path_factory.mktemp("model"), "llama")
    weights = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ("pytorch_model.bin", "modeling_tiny.py", "original/consolidated.00.safetensors", "tokenizer.json")
    return {**weights, **dict.fromkeys(others, b"{}")}


@pytest.fixture
def fake_hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    held = FakeHub(commits={FIRST: files, SECOND: files}, branches={"main": FIRST})
    handler = type("Handler", (_Handler,), {"hub": held})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported, which may have been long ago.
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield held
    server.shutdown()
    thread.join()
    server.server_close()


def recipe(root: Path, path: str = f"{NAME}@main", **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "storage": str(root / "runs"),
            "corpus": {"sources": [{"name": "a", "path": "/data"}]},
            "model": {"path": path, **model},
            "train": {"steps": 1, "lr": 1e-3},
        }
    )


def test_a_model_is_fetched_once_without_code_and_pickles(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = pinned(recipe(tmp_path)).model
    assert (model.path, model.commit) == (f"{NAME}@main", FIRST)
    described = sorted(path.name for path in model_directory(model, weights=False).iterdir())
    assert described == ["config.json", "generation_config.json", "tokenizer.json"]
    folder = model_directory(model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    check_model(folder)
    asked = len(fake_hub.asked)
    assert model_directory(model) == folder
    assert len(fake_hub.asked) == asked, "a whole copy asks nothing of the network"


FETCH = """
import sys
from orchestrator.model_config import ModelConfig
from orchestrator.hub import model_directory
print(model_directory(ModelConfig(path=sys.argv[1], commit=sys.argv[2])))
"""


def test_a_mirror_is_named_by_the_environment(fake_hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import constants

    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FETCH, f"{NAME}@main", FIRST]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment).stdout
    assert Path(found.strip()).is_relative_to(tmp_path / "home")
    check_model(Path(found.strip()))


def test_a_run_keeps_the_commit_that_it_began_with(fake_hub: FakeHub, tmp_path: Path) -> None:
    open_run(pinned(recipe(tmp_path)))
    fake_hub.branches["main"] = SECOND
    again = pinned(recipe(tmp_path))
    assert again.model.commit == FIRST
    run = open_run(again)
    assert run.recipe().model.commit == FIRST
    assert pinned(recipe(tmp_path / "another")).model.commit == SECOND
    assert pinned(recipe(tmp_path, f"{NAME}@{SECOND}")).model.commit == SECOND
    run.claim_attempt({})
    with pytest.raises(UserError, match=r"model\.commit was"):
        open_run(pinned(recipe(tmp_path, commit=SECOND)))


def test_a_commit_needs_no_network_to_be_pinned(fake_hub: FakeHub, tmp_path: Path) -> None:
    assert pinned(recipe(tmp_path, f"{NAME}@{SECOND}")).model.commit == SECOND
    assert not fake_hub.asked


def test_a_fetch_that_was_broken_off_is_finished(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = pinned(recipe(tmp_path)).model
    folder = model_directory(model)
    (folder / "model.safetensors").unlink()
    check_model(model_directory(model))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/unknown@main", "the hub has no model org/unknown"),
        (f"{NAME}@v9", f"{NAME} has no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_is_named(path: str, message: str, fake_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pinned(recipe(tmp_path, path))


def test_terms_to_be_accepted_are_said(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.gated = True
    with pytest.raises(UserError, match="asks for its terms to be accepted"):
        pinned(recipe(tmp_path))


def test_without_a_network_the_error_says_what_to_do(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be fetched from http://127\.0\.0\.1:9") as caught:
        pinned(recipe(tmp_path))
    assert "HF_ENDPOINT" in caught.value.hint


def test_an_error_that_is_not_the_hubs_stays_itself() -> None:
    bug = TypeError("a bug")
    assert hub._explained(bug, f"{NAME}@main") is bug


@pytest.mark.parametrize(
    ("path", "is_hub"),
    [
        ("org/name@main", True),
        ("org/name", False),
        ("./a/b@c", False),
        ("/m/org/name@main", False),
        ("org/na.me-7b@refs/pr/1", True),
    ],
)
def test_a_hub_model_has_a_revision_and_all_else_is_a_directory(path: str, is_hub: bool, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = "name: r\ncorpus: {sources: [{name: a, path: /a}]}\ntrain: {steps: 1, lr: 1e-3}\nmodel: {path: %s}\n"
    file.write_text(text % path)
    found = load_recipe(file).model
    assert (found.path == path and not Path(path).is_absolute()) == is_hub
    assert isinstance(found, ModelConfig)
