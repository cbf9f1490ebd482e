"""What a hanging rank does can be seen, whatever it hangs in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.train import stacks
from tests.conftest import ROOT

DEADLINE_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hanging")


@pytest.fixture(scope="module")
def hanging(folder: Path) -> Iterator[dict[str, int]]:
    """Pids of ranks that hang, by the way in which they do."""
    script = str(Path(__file__).parent / "hanging_ranks.py")
    with subprocess.Popen(
        [sys.executable, script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as parent:
        assert parent.stdout and parent.stdin
        yield json.loads(parent.stdout.readline())
        parent.stdin.close()
        assert parent.wait(DEADLINE_S) == 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # what hangs outlives its parent


@pytest.fixture(scope="module")
def told(hanging: dict[str, int], folder: Path) -> dict[str, str]:
    """The stacks of all of them, asked for until each is where it is to hang."""

    def all_there(found: dict[str, str]) -> bool:
        return "all_reduce" in found["waits_for_a_peer_in_gloo"] and "has_no_handler" in found

    return until(lambda: collected(hanging, folder), all_there)


def collected(pids: dict[str, int], folder: Path) -> dict[str, str]:
    ways = list(pids)
    numbered = dict(enumerate(pids.values()))
    found = stacks.collect(numbered, {rank: stacks.path(folder, rank) for rank in numbered}, DEADLINE_S)
    return {ways[rank]: text for rank, text in found.items()}


def until(look: Callable[[], dict[str, str]], good: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    deadline = time.monotonic() + DEADLINE_S
    while not good(found := look()):
        assert time.monotonic() < deadline, found
    return found


@pytest.mark.parametrize(
    "way",
    [
        "spins_in_python",
        "keeps_the_interpreter_lock",
        "waits_for_a_peer_in_gloo",
        "waits_for_data",
        "trains_in_a_thread",
    ],
)
def test_the_line_that_a_rank_hangs_in_is_told(told: dict[str, str], way: str) -> None:
    assert f"in {way}" in told[way], told[way]
    assert 'hanging_ranks.py", line' in told[way]


def test_the_call_into_gloo_is_told(told: dict[str, str]) -> None:
    assert "in all_reduce" in told["waits_for_a_peer_in_gloo"]


def test_all_threads_are_told(told: dict[str, str]) -> None:
    assert "in stands_still" in told["trains_in_a_thread"] and "in join" in told["trains_in_a_thread"]


def test_of_a_stopped_process_its_state_is_told_at_once(told: dict[str, str], hanging: dict[str, int]) -> None:
    assert stacks.state(hanging["stands_still"]) == "T"
    assert f"process {hanging['stands_still']} is T (stopped)" in told["stands_still"]
    assert "no answer" in told["stands_still"]
    assert "stands_still" not in told["stands_still"]


def test_what_runs_is_told_of_threads(told: dict[str, str]) -> None:
    assert "is R (running)" in told["spins_in_python"]


def test_a_process_without_a_handler_is_not_ended(told: dict[str, str], hanging: dict[str, int]) -> None:
    assert "does not answer to SIGUSR1" in told["has_no_handler"]
    assert stacks.state(hanging["has_no_handler"]) == "S"


def test_a_process_that_is_continued_answers_then(told: dict[str, str], hanging: dict[str, int], folder: Path) -> None:
    pid, path = hanging["stands_still"], stacks.path(folder, list(hanging).index("stands_still"))
    os.kill(pid, signal.SIGCONT)
    until(lambda: {"": path.read_text()}, lambda found: "in stands_still" in found[""])


def test_a_process_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert stacks.collect({0: ended.pid}, {0: tmp_path / "none"}) == {0: f"process {ended.pid} is gone"}
    assert stacks.state(ended.pid) == ""
