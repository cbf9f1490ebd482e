"""What a rank marks can be read in another process, at any time and whatever became of the rank."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.data.schedule import Share
from orchestrator.train import beats
from orchestrator.train.beats import PHASES, Beat, read
from tests.conftest import ROOT

MARKS = """
import itertools, pathlib, sys
from orchestrator.train.beats import Beat
beat = Beat(pathlib.Path(sys.argv[1]))
for step in itertools.count(1):
    beat.mark("data", step)
    beat.mark("step", step)
"""


@pytest.fixture
def marking(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that marks as fast as it can, and its beat."""
    path = beats.path(tmp_path, 0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", MARKS, str(path)], env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not ((sign := read(path)) and sign.step) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield process.pid, path
        finally:
            process.kill()


def test_a_mark_is_read_as_it_was_made(tmp_path: Path) -> None:
    path = beats.path(tmp_path, 3)
    assert read(path) is None
    beat = Beat(path)
    for number, phase in enumerate(PHASES):
        before = time.time()
        beat.mark(phase, 10**12 + number)
        sign = read(path)
        assert sign is not None
        assert (sign.phase, sign.step) == (phase, 10**12 + number)
        assert 0 <= sign.age_s < 30 and before <= sign.time <= time.time()


def test_a_file_that_is_not_whole_is_no_sign(tmp_path: Path) -> None:
    path = beats.path(tmp_path, 0)
    for content in (b"", bytes(10), bytes(128), b"\xff" * 128):
        path.write_bytes(content)
        assert read(path) is None


def test_a_mark_that_was_broken_off_leaves_the_one_before(tmp_path: Path) -> None:
    path = beats.path(tmp_path, 0)
    beat = Beat(path)
    beat.mark("data", 7)
    before = path.read_bytes()
    beat.mark("step", 7)
    after = path.read_bytes()
    changed = [place for place in range(len(after)) if after[place] != before[place]]
    path.write_bytes(after[: changed[0]] + before[changed[0] : changed[-1]] + after[changed[-1] :])
    sign = read(path)
    assert sign and (sign.phase, sign.step) == ("data", 7)


def test_marks_are_never_read_in_part_nor_backwards(marking: tuple[int, Path]) -> None:
    pid, path = marking
    last = (0, 0)
    for _ in range(5_000):
        sign = read(path)
        assert sign and sign.phase in ("data", "step")
        place = sign.step, PHASES.index(sign.phase)
        assert place >= last
        last = place
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    sign = read(path)
    assert sign and sign.step >= last[0], "what it did last outlives it"


def test_a_mark_takes_less_than_ten_microseconds(tmp_path: Path) -> None:
    beat = Beat(tmp_path / "beat")

    def seconds() -> float:
        before = time.perf_counter()
        for step in range(1000):
            beat.mark("step", step)
        return (time.perf_counter() - before) / 1000

    assert min(seconds() for _ in range(20)) < 1e-5  # the least of twenty: the machine may be busy


def test_the_wait_for_data_is_a_phase_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    seen = []

    def now() -> tuple[str, int]:
        sign = read(path)
        assert sign
        return sign.phase, sign.step

    def shares() -> Iterator[Share]:
        for step in (5, 6):
            seen.append(now())
            yield Share(step=step, tokens=None, counted=None, targets=1, largest=1)
        seen.append(now())

    beat = Beat(path)
    for _ in beat.over(shares(), 5):
        seen.append(now())
    assert seen == list(itertools.chain(*((("data", n), ("step", n)) for n in (5, 6)), [("data", 7)]))
