"""The stacks of a rank that hangs, whatever it hangs in: the agent of its node asks by a signal.

Python's fault handler answers it in C, without the interpreter lock: so a thread that never gives the lock back, or
waits in C++ for a peer, is seen as well. A process that is stopped cannot answer; of it /proc tells. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

SIGNAL = signal.SIGUSR1
_POLL_S = 0.02
_QUIET_S = 0.3
"""An answer has no end mark: it has ended when nothing was added for so long."""
_AT_EASE = "SI"
"""States of threads that wait for an event, or have nothing to do."""


def path(folder: str | Path, rank: int) -> Path:
    """Of the stacks of a rank, in the folder of its attempt on its node."""
    return Path(folder, f"rank-{rank}.stack")


def install(path: Path) -> None:
    """Have this process append the stacks of all its threads to a file whenever it is asked. From any thread."""
    file = path.open("ab")
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)  # keeps the file open


def collect(pids: Mapping[int, int], paths: Mapping[int, Path], timeout_s: float = 5.0) -> dict[int, str]:
    """Ask processes of this node for their stacks, and wait for the answers. Blocks: not for an event loop.

    Args:
        pids: by rank.
        paths: by rank, those that they gave to `install`.
        timeout_s: for all together.

    Returns:
        by rank, what /proc says of the process, and the Python stacks of its threads or why there are none.
    """
    questions = {rank: _Question(pid, paths[rank]) for rank, pid in pids.items()}
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not all(question.settled() for question in questions.values()):
        time.sleep(_POLL_S)
    return {rank: question.told() for rank, question in questions.items()}


def state(pid: int) -> str:
    """Of a process, as /proc names it: R runs, S waits, D waits for a disk, T is stopped, Z has ended; "" is gone."""
    return _status(Path("/proc", str(pid))).get("State", "")[:1]


class _Question:
    """Put to one process when it is made."""

    def __init__(self, pid: int, path: Path) -> None:
        self._pid = pid
        self._path = path
        self._before = self._length()
        self._asked = _listens(pid)
        if self._asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGNAL)

    def settled(self) -> bool:
        """Whether the answer is whole, or there will be none."""
        if self._length() > self._before:
            return time.time() - self._path.stat().st_mtime >= _QUIET_S
        return not self._asked or state(self._pid) in ("", "T", "Z")

    def told(self) -> str:
        answer = ""
        if self._length() > self._before:
            answer = self._path.read_bytes()[self._before :].decode(errors="replace")
        elif state(self._pid):
            answer = "no answer" if self._asked else f"does not answer to {SIGNAL.name}"
        return f"{_process(self._pid)}\n{answer}".strip()

    def _length(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


def _listens(pid: int) -> bool:
    """Whether a process has a handler for the signal: one that has none would be ended by it."""
    caught = int(_status(Path("/proc", str(pid))).get("SigCgt", "0"), 16)
    return bool(caught >> (SIGNAL - 1) & 1)


def _process(pid: int) -> str:
    """A line on a process, and one for each of its threads that is not at ease."""
    folder = Path("/proc", str(pid))
    status = _status(folder)
    if not status:
        return f"process {pid} is gone"
    threads = sorted(Path(folder, "task").glob("*"), key=lambda task: int(task.name))
    busy = [f"  {_thread(task)}" for task in threads if _status(task).get("State", "S")[0] not in _AT_EASE]
    return "\n".join([f"process {pid} is {status['State']}, {len(threads)} threads", *busy])


def _thread(task: Path) -> str:
    status = _status(task)
    call, where = _line(task / "syscall").split(" ")[0], _line(task / "wchan")
    known = [f"system call {call}"] * call.isdigit() + [f"in {where}"] * (where not in ("", "0"))
    return ", ".join([f"thread {task.name} ({status.get('Name', '')}) is {status.get('State', 'gone')}", *known])


def _status(folder: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in _line(folder / "status").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it has ended, or belongs to another user
        return ""
