"""Messages to people: a webhook or a command is told when a run has ended, hangs, waits or runs out of storage.

    the command's own end            -> tell("finished" | "stopped" | "failed")
    the run's event log, followed    -> hang, node_quarantined, storage_low, and a wait that gets long

Messages are sent by a thread. One that cannot be sent is logged, and stops nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from orchestrator import storage
from orchestrator.errors import Interrupted, UserError
from orchestrator.notify_config import Kind, NotifyConfig
from orchestrator.runs import RunDir

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
RETRIES_S = (1.0, 3.0)
"""Until a message that could not be sent is tried again."""
CLOSE_S = 10.0
"""How long the end of a command waits for what is still to be sent."""


def check(config: NotifyConfig) -> None:
    """See that messages can be sent, as far as this machine knows.

    Raises:
        UserError: the webhook's variable is not set or holds no URL, or the command is not there.
    """
    if config.webhook:
        _address(config.webhook)
    if config.command and not shutil.which(config.command[0]):
        raise UserError(f"notify.command: there is no program {config.command[0]!r}", "give its path, or install it")


@contextlib.contextmanager
def notifying(config: NotifyConfig, run: RunDir) -> Iterator[Notifier]:
    """Tell of what happens to a run in the block, and of an end of the block by an error."""
    notifier = Notifier(config, run)
    try:
        yield notifier
    except Interrupted as error:
        notifier.tell("stopped", error.message)
        raise
    except KeyboardInterrupt:
        notifier.tell("stopped", "the command was interrupted")
        raise
    except BaseException as error:
        what = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        notifier.tell("failed", what, hint=error.hint if isinstance(error, UserError) else "")
        raise
    finally:
        notifier.close()


class Notifier:
    """Sends the messages that the recipe asks for. With neither a webhook nor a command it does nothing.

    Args:
        poll_s: between two looks at the run's events; None for what suits its storage.
    """

    def __init__(self, config: NotifyConfig, run: RunDir, poll_s: float | None = None) -> None:
        self._config = config
        self._run = run
        self._poll_s = poll_s or (10.0 if storage.is_s3(run.uri) else 2.0)
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._events = _Events(seen=set(_event_names(run)) if self._wanted else set())
        self._thread = threading.Thread(target=self._work, name="notifier", daemon=True)
        if self._wanted:
            self._thread.start()

    @property
    def _wanted(self) -> bool:
        return bool(self._config.webhook or self._config.command)

    def tell(self, kind: Kind, text: str, **facts: Any) -> None:
        """Send a message soon, if the recipe asks for its kind. From any thread; raises nothing."""
        if self._wanted and kind in self._config.events:
            heading = f"{self._run.name}: {kind.replace('_', ' ')}: {text}"
            self._messages.put(
                {"text": heading, "run": self._run.uri, "kind": kind, "time": time.time(), "message": text, **facts}
            )

    def close(self) -> None:
        """Wait a little for what is still to be sent."""
        if self._wanted:
            self._messages.put(None)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning("notify: the last messages were not sent within %.0f s", CLOSE_S)

    def _work(self) -> None:
        closing = False
        while True:
            try:
                message = self._messages.get(timeout=self._poll_s)
            except queue.Empty:
                self._look()
                continue
            if message is None and closing:
                return
            if message is None:  # what the last events have to tell comes before the end
                closing = True
                self._look()
                self._messages.put(None)
                continue
            self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        webhook, command = self._config.webhook, self._config.command
        if webhook:
            _try("webhook", lambda: _post(_address(webhook), message))
        if command:
            _try("command", lambda: _call(command, message))

    def _look(self) -> None:
        try:
            for kind, text, facts in self._events.news(self._run, time.monotonic(), self._config.waiting_minutes * 60):
                self.tell(kind, text, **facts)
        except Exception as error:  # storage: asked again soon
            log.debug("notify: cannot read the events: %s", error)


@dataclass
class _Events:
    """What of a run's events people are to be told."""

    seen: set[str]
    waiting: dict[str, Any] = field(default_factory=dict)
    """The event that a wait began with."""
    waiting_since: float = 0.0

    def news(self, run: RunDir, now: float, patience_s: float) -> Iterator[tuple[Kind, str, dict[str, Any]]]:
        """(kind, text, facts) of events since the last call, and of a wait that has lasted for longer than it may."""
        for name in sorted(set(_event_names(run)) - self.seen):
            self.seen.add(name)
            what = name.partition("-")[2].removesuffix(".json")
            if what == "waiting":
                self.waiting, self.waiting_since = _event(run, name), now
            elif what in ("waited", "attempt_started"):
                self.waiting = {}
            elif what in _TEXTS:
                event = _event(run, name)
                kind, text = _TEXTS[what]
                yield kind, text.format_map(_Known(event)), event
        if self.waiting and now - self.waiting_since >= patience_s:
            minutes = round((now - self.waiting_since) / 60)
            text = f"for {minutes} minutes: {self.waiting.get('missing', 'no devices')}"
            yield "waiting", text, self.waiting
            self.waiting = {}


_TEXTS: dict[str, tuple[Kind, str]] = {
    "hang": ("hang", "attempt {attempt} has made no step for {seconds} s after step {step}"),
    "node_quarantined": ("node_quarantined", "{host}: {reason}"),
    "storage_low": ("storage_low", "{free_bytes} bytes are left, {need_bytes} are wanted"),
}


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _event_names(run: RunDir) -> list[str]:
    return storage.list_files(run.path("events"))


def _event(run: RunDir, name: str) -> dict[str, Any]:
    return {key: value for key, value in storage.read_json(run.path("events", name)).items() if key != "time"}


# --- sending ----------------------------------------------------------------------------------------------------------


class _NotSent(Exception):
    """Says why, in words that hold no part of an address."""


def _try(way: str, send: Callable[[], None]) -> None:
    for pause_s in (*RETRIES_S, None):
        try:
            send()
            return
        except _NotSent as error:
            if pause_s is None:
                log.warning("notify: the %s was not told: %s", way, error)
            else:
                time.sleep(pause_s)
        except UserError as error:
            log.warning("notify: the %s was not told: %s", way, error.message)
            return


def _post(address: str, message: dict[str, Any]) -> None:
    try:
        request = urllib.request.Request(address, _json(message), {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        raise _NotSent(f"{_host(address)} answered {error.code}") from None
    except Exception as error:  # some name the address
        reason = getattr(error, "reason", None)
        raise _NotSent(f"{_host(address)}: {type(error).__name__}{f' ({reason})' if reason else ''}") from None


def _call(command: tuple[str, ...], message: dict[str, Any]) -> None:
    """What the command leaves running in the background is left alone, unless the command itself takes too long."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:  # a pipe is held open by its children
        given.write(_json(message))
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        except (OSError, ValueError) as error:  # as of a NUL in an argument
            raise _NotSent(f"{command[0]}: {error}") from None
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise _NotSent(f"{command[0]} did not end within {TIMEOUT_S:.0f} s") from None
        if status:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise _NotSent(f"{command[0]} ended with {status}: {last}")


def _address(webhook: str) -> str:
    """The URL that a webhook stands for.

    Raises:
        UserError: its variable is not set, or there is no URL.
    """
    if not webhook.startswith("$"):
        if _is_url(webhook):
            return webhook
        raise UserError("notify.webhook is no URL of a host", "write it as https://host/path, or $NAME")
    name = webhook[1:].strip("{}")
    address = os.environ.get(name, "")
    if _is_url(address):
        return address
    state = "holds no http(s) URL" if address else "is not set"
    raise UserError(f"notify.webhook: the environment variable {name} {state}", f"export {name}=https://...")


def _is_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _host(address: str) -> str:
    """What of an address may be printed: the path may be a secret, too."""
    return str(urlsplit(address).hostname)


def _json(message: dict[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode()
