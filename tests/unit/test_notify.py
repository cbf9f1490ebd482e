"""What people are told: by a webhook on loopback, by a real command, and by neither where that fails."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from orchestrator import notify
from orchestrator.errors import Interrupted, RunFailed, UserError
from orchestrator.notify import Notifier, notifying
from orchestrator.notify_config import NotifyConfig
from orchestrator.runs import RunDir, open_run
from tests.made_runs import recipe

DEADLINE_S = 30


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Hook:
    """An HTTP server that answers as told, and what it was sent."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        """The next ones; 200 after them."""
        self.posts: queue.Queue[dict[str, Any]] = queue.Queue()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(hook.answers.pop(0) if hook.answers else 200)
                self.end_headers()
                hook.posts.put(json.loads(body))

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/SECRET"

    def next(self) -> dict[str, Any]:
        return self.posts.get(timeout=DEADLINE_S)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setattr(notify, "RETRIES_S", (0.01, 0.01))
    made = Hook()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "papers"))


def test_a_webhook_is_posted_what_slack_reads_and_the_facts(hook: Hook, run: RunDir) -> None:
    notifier = Notifier(NotifyConfig(webhook=hook.url), run)
    notifier.tell("node_quarantined", "node-7: wrong numbers", host="node-7")
    message = hook.next()
    notifier.close()
    assert message["text"] == "papers: node quarantined: node-7: wrong numbers"
    assert (message["run"], message["kind"], message["host"]) == (run.uri, "node_quarantined", "node-7")
    assert time.time() - message["time"] < DEADLINE_S


def test_a_variable_is_read_when_it_is_used_and_stored_nowhere(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(str(tmp_path)).model_copy(update={"notify": NotifyConfig(webhook="$HOOK_OF_THE_TEST")})
    with pytest.raises(UserError, match="HOOK_OF_THE_TEST is not set"):
        notify.check(settings.notify)
    monkeypatch.setenv("HOOK_OF_THE_TEST", "hooks.example/SECRET")
    with pytest.raises(UserError, match=r"HOOK_OF_THE_TEST holds no http\(s\) URL$"):
        notify.check(settings.notify)
    monkeypatch.setenv("HOOK_OF_THE_TEST", hook.url)
    notify.check(settings.notify)
    run = open_run(settings)
    notifier = Notifier(settings.notify, run)
    notifier.tell("finished", "train: done")
    assert hook.next()["message"] == "train: done"
    notifier.close()
    assert all(b"SECRET" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_command_gets_the_message_on_its_standard_input(run: RunDir, tmp_path: Path) -> None:
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    config = NotifyConfig(command=(sys.executable, "-c", program, str(tmp_path / "message")))
    notify.check(config)
    notifier = Notifier(config, run)
    notifier.tell("finished", "train: done", steps=160)
    notifier.close()
    message = json.loads((tmp_path / "message").read_text())
    assert (message["kind"], message["steps"]) == ("finished", 160)


def test_what_a_command_leaves_in_the_background_is_not_waited_for(
    run: RunDir, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/child; cat > {tmp_path}/message"
    with notifying(NotifyConfig(command=("sh", "-c", script)), run) as notifier:
        notifier.tell("finished", "train: done")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert json.loads((tmp_path / "message").read_text())["kind"] == "finished"
    assert not caplog.messages


def test_a_command_that_takes_too_long_is_ended_with_its_children(
    run: RunDir, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(notify, "RETRIES_S", ())
    script = f"sleep 600 & echo $! > {tmp_path}/child; wait"
    with notifying(NotifyConfig(command=("sh", "-c", script)), run) as notifier:
        notifier.tell("finished", "train: done")
    assert "the command was not told: sh did not end within" in "\n".join(caplog.messages)
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_a_command_that_cannot_be_started_is_told_of(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    with notifying(NotifyConfig(command=("sh", "a\0b")), run) as notifier:
        notifier.tell("finished", "train: done")
        notifier.tell("failed", "again")
    assert len([line for line in caplog.messages if "the command was not told: sh: embedded null byte" in line]) == 2


def test_a_command_that_is_not_there_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="there is no program 'no-such-program'"):
        notify.check(NotifyConfig(command=("no-such-program",)))


@pytest.mark.parametrize("webhook", ["htps://hooks.example/SECRET", "hooks.example/SECRET"])
def test_a_webhook_that_is_no_url_is_refused_without_its_words(webhook: str) -> None:
    with pytest.raises(ValidationError) as refused:
        NotifyConfig(webhook=webhook)
    assert "SECRET" not in refused.value.errors()[0]["msg"]
    with pytest.raises(UserError) as also:
        notify.check(NotifyConfig(webhook="https:///SECRET"))
    assert "SECRET" not in also.value.message + also.value.hint


def test_only_what_is_asked_for_is_told(hook: Hook, run: RunDir) -> None:
    notifier = Notifier(NotifyConfig(webhook=hook.url, events=("failed",)), run)
    notifier.tell("finished", "train: done")
    notifier.tell("failed", "no node is left")
    assert hook.next()["kind"] == "failed"
    notifier.close()
    assert hook.posts.empty()


def test_a_message_is_tried_again(hook: Hook, run: RunDir) -> None:
    hook.answers = [500, 503]
    notifier = Notifier(NotifyConfig(webhook=hook.url), run)
    notifier.tell("hang", "no step for 300 s")
    notifier.close()
    assert [hook.next()["kind"] for _ in range(3)] == ["hang"] * 3
    assert hook.posts.empty()


def test_a_notifier_that_fails_says_so_without_the_address_and_stops_nothing(
    hook: Hook, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    hook.answers = [500] * 3
    closed = f"http://user:SECRET@127.0.0.1:{hook.server.server_port}/a b?SECRET"
    failing = (sys.executable, "-c", "import sys; sys.exit('no mail server')")
    for config in (NotifyConfig(webhook=hook.url, command=failing), NotifyConfig(webhook=closed)):
        with caplog.at_level(logging.DEBUG), notifying(config, run) as notifier:
            notifier.tell("finished", "train: done")
    said = "\n".join(caplog.messages)
    assert "the webhook was not told: 127.0.0.1 answered 500" in said
    assert "the webhook was not told: 127.0.0.1: InvalidURL" in said
    assert "ended with 1: no mail server" in said
    assert "SECRET" not in said


def test_an_end_by_an_error_is_told(hook: Hook, run: RunDir) -> None:
    for error, kind in ((RunFailed("no node", "add one"), "failed"), (Interrupted("stopped at step 5"), "stopped")):
        with pytest.raises(type(error)), notifying(NotifyConfig(webhook=hook.url), run):
            raise error
        message = hook.next()
        assert (message["kind"], message["message"]) == (kind, error.message)


def test_events_of_the_run_are_told_as_they_come(hook: Hook, run: RunDir) -> None:
    run.log_event("hang", attempt=1, step=3, seconds=300)  # of an earlier command
    notifier = Notifier(NotifyConfig(webhook=hook.url), run, poll_s=0.01)
    run.log_event("hang", attempt=2, step=40, seconds=120)
    assert hook.next()["message"] == "attempt 2 has made no step for 120 s after step 40"
    run.log_event("committed", attempt=2, step=50, bytes=1)
    run.log_event("storage_low", free_bytes=5, need_bytes=9)
    notifier.close()
    assert (hook.next()["kind"], hook.posts.empty()) == ("storage_low", True)


def test_a_wait_is_told_once_it_is_long(run: RunDir) -> None:
    events = notify._Events(seen=set())

    def told(now_s: float) -> list[str]:
        return [f"{kind} {text}" for kind, text, _ in events.news(run, now_s, patience_s=600)]

    run.log_event("waiting", missing="2 x cuda")
    assert (told(0), told(599)) == ([], [])
    assert told(660) == ["waiting for 11 minutes: 2 x cuda"]
    assert told(9999) == [], "once"
    run.log_event("waited", seconds=9999)
    run.log_event("waiting", missing="1 x cuda")
    run.log_event("waited", seconds=3)
    assert (told(10_000), told(20_000)) == ([], [])
