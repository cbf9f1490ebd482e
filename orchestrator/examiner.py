"""The node's side of preflight: a mixin for the agent that stands there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.findings import Link, NodeResult
from orchestrator.links import Endpoint, LinkServer, measure_link

ROOT = Path(__file__).parents[1]
"""The directory that the package is imported from."""
END_S = 5.0
"""For a killed process to go: one that hangs in a driver cannot."""


class Examiner:
    """Call it from asyncio alone, as a Ray actor does."""

    _server: LinkServer | None = None

    async def preflight(
        self,
        accelerator: str,
        devices: Sequence[int],
        dtypes: Sequence[str],
        threads: int,
        storage_uri: str,
        timeout_s: float,
    ) -> NodeResult:
        """See `examine`."""
        return await examine(accelerator, devices, dtypes, threads, storage_uri, timeout_s)

    async def open_link(self) -> Endpoint:
        """Let other nodes measure their links to this one, until `close_link`."""
        import ray

        await self.close_link()
        self._server = LinkServer(ray.util.get_node_ip_address())
        return self._server.endpoint

    async def measure_link(self, endpoint: Endpoint) -> Link:
        return await asyncio.to_thread(measure_link, endpoint)

    async def close_link(self) -> None:
        if self._server:
            await asyncio.to_thread(self._server.close)
            self._server = None


async def examine(
    accelerator: str,
    devices: Sequence[int],
    dtypes: Sequence[str],
    threads: int,
    storage_uri: str,
    timeout_s: float,
) -> NodeResult:
    """Measure this node, in a process that ends with it.

    Args:
        devices: the machine's numbers of the GPUs to measure; empty on a CPU node.
        threads: of a CPU worker.
        storage_uri: of a directory to write a file in.

    Returns:
        what was measured; a result with an `error` where the process crashes or hangs.
    """
    asked = {
        "accelerator": accelerator,
        "devices": ",".join(map(str, devices)),
        "dtypes": ",".join(dtypes),
        "threads": str(threads),
        "storage": storage_uri,
        "timeout-s": str(math.ceil(timeout_s)),
    }
    arguments = [f"--{name}={value}" for name, value in asked.items()]
    try:
        answer = await answer_of([sys.executable, "-m", "orchestrator.train.preflight", *arguments], timeout_s)
        return NodeResult.from_json(json.loads(answer.splitlines()[-1]))
    except NoAnswer as error:
        return NodeResult(accelerator=accelerator, error=f"preflight {error}")


class NoAnswer(Exception):
    """Says what a process did instead, as a predicate."""


async def answer_of(command: Sequence[str], timeout_s: float) -> str:
    """What a command writes. It is killed when it takes longer, or when whoever waits goes away.

    Raises:
        NoAnswer: it crashes or hangs.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, cwd=ROOT)
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        raise NoAnswer(f"did not answer within {timeout_s:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_S)
    if process.returncode:
        last = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise NoAnswer(f"ended with exit code {process.returncode}: {last}")
    return out.decode()
