"""What the agent of a node knows of its workers while they live, and after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from orchestrator.node_agent import NodeAgent
from orchestrator.train import beats
from tests.conftest import ROOT

WORKER = """
import sys, threading
from orchestrator.train import beats, stacks
folder = sys.stdin.readline().strip()
stacks.install(stacks.path(folder, 1))
beats.Beat(beats.path(folder, 1)).mark("step", 17)
print("ready", flush=True)
threading.Event().wait()
"""


def test_an_agent_sees_what_its_workers_do_and_did_and_leaves_no_file_behind() -> None:
    async def watched() -> None:
        agent = NodeAgent()
        with (
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            ) as worker,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(worker.kill)  # else a failure would wait for it
            assert worker.stdin and worker.stdout
            folder, agent_pid = await agent.register("group", 1, worker.pid)
            assert agent_pid == os.getpid(), "with which the worker ends"
            assert await agent.signs("group") == {1: None}, "it has not begun"
            print(folder, file=worker.stdin, flush=True)
            assert worker.stdout.readline() == "ready\n"
            assert beats.path(folder, 1).exists()
            signs, states = await agent.signs("group"), await agent.states("group")
            assert (sign := signs[1]) and (sign.phase, sign.step) == ("step", 17)
            assert states.keys() == {1} and states[1] in "RS"
            assert 'File "<string>", line ' in (await agent.stacks("group"))[1]
            await agent.end("group")
        signs = await agent.signs("group")
        assert (sign := signs[1]) and (sign.phase, sign.step) == ("step", 17), "what it did last is still known"
        assert await agent.states("group") == await agent.stacks("group") == {}
        assert not Path(folder).exists()

    asyncio.run(watched())
