"""A process that saves one step as an attempt, and stops itself at a chosen point: `python -m tests.zombie`.

It says at its end what it takes its save for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import storage
from orchestrator.errors import StorageError
from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import COMMITTED, Commit, Position, Retention

ROOT = Path(__file__).parents[1]


def save(root: str, attempt: int, step: int, keep: int = 1) -> Commit:
    """Write, commit and retain, as the saver of a rank does."""
    name, data = f"{checkpoints.attempt_folder(attempt)}/__0_0.distcp", state(attempt, step)
    storage.write(storage.join(checkpoints.step_directory(root, step), name), data)
    position = Position(step=step, updates=step, past={})
    made = Commit(attempt=attempt, position=position, files={name: len(data)}, metadata_xxh3="")
    commit = checkpoints.publish(root, made)
    checkpoints.retain(root, Retention(last=keep), attempt)
    return commit


def state(attempt: int, step: int) -> bytes:
    return f"step {step} as attempt {attempt} has it".encode()


class Stopped:
    """The process, once it has stopped itself before or after the call that `where` names."""

    def __init__(self, root: str, attempt: int, step: int, where: str) -> None:
        command = [sys.executable, "-m", "tests.zombie", root, str(attempt), str(step), where]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"it never came to {where}"

    def goes_on(self) -> str:
        """What it says at its end."""
        self._process.send_signal(signal.SIGCONT)
        said, _ = self._process.communicate(timeout=60)
        return said.decode().strip()

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def main(root: str, attempt: str, step: str, where: str) -> None:
    when, _, name = where.partition(" ")
    call: Callable[..., Any] = getattr(storage, name)

    def stopping(uri: str, *rest: Any) -> Any:
        if not uri.endswith(COMMITTED):
            return call(uri, *rest)
        if when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        answer = call(uri, *rest)
        if when == "after":
            os.kill(os.getpid(), signal.SIGSTOP)
        return answer

    setattr(storage, name, stopping)
    try:
        save(root, int(attempt), int(step))
        print("committed")
    except StorageError as error:
        print(error.message)


if __name__ == "__main__":
    main(*sys.argv[1:])
