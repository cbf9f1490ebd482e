"""A worker's line to its node's agent: its job comes there, and how it ends is told before Ray Train hears of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any


class AgentLine:
    """
    Args:
        agent: handle of the actor (orchestrator.node_agent).
        group: name of the worker group.
    """

    def __init__(self, agent: Any, group: str, rank: int) -> None:
        self._agent = agent
        self._who = (group, rank)

    def register(self) -> str:
        """Returns the folder that it looks in for this worker's beat and stacks."""
        folder, pid = self._call("register", os.getpid())
        threading.Thread(target=_end_with, args=(pid,), name="agent", daemon=True).start()
        return str(folder)

    def job(self) -> dict[str, Any] | None:
        """Wait for it. None: go home."""
        found: dict[str, Any] | None = self._call("arrive")
        return found

    @contextlib.contextmanager
    def told_of_the_end(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._call("failed", portable(error))
            raise
        self._call("finished")

    def tell_slow(self, ratios: dict[int, float]) -> None:
        """Which ranks hold up the others, by how much; returns at once."""
        self._agent.slow.remote(*self._who, ratios)

    def _call(self, method: str, *args: Any) -> Any:
        import ray

        return ray.get(getattr(self._agent, method).remote(*self._who, *args))


def _end_with(pid: int) -> None:
    """End this process when another one does: without the agent nobody would, and the next attempt would meet it."""
    handle = os.pidfd_open(pid)
    select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def portable(error: BaseException) -> BaseException:
    """The error, or its words where it cannot cross process borders."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
