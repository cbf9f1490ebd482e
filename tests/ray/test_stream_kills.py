"""The transport through kills and resizes: real Ray workers, ended by SIGKILL, and what they took by its content."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from orchestrator import cluster
from orchestrator.data.order import Batches
from orchestrator.data.schedule import Role, Schedule
from tests.ray.consumer import Consumer, Report, hashes
from tests.ray.small_corpus import BATCH, DEADLINE_S, FEW, Corpus, wait_for, write_corpus

STEPS = 40
MOST_AHEAD = 3
"""Steps that a rank may have done more than the slowest."""


@pytest.fixture(scope="module", autouse=True)
def ray_is_up() -> Iterator[None]:
    with cluster.connection(None):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """To be read only."""
    return write_corpus(str(tmp_path_factory.mktemp("stream") / "corpus"))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_repeated_when_ranks_are_killed(corpus: Corpus, seed: int) -> None:
    survive(corpus, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_nothing_is_lost_or_repeated_in_many_schedules_of_kills(corpus: Corpus, seed: int) -> None:
    survive(corpus, seed)


def survive(corpus: Corpus, seed: int) -> None:
    """Train, with ranks killed, on from the last commit each time with other ranks, and compare with the order."""
    draw = random.Random(seed)
    edges = sorted(draw.sample(range(3, STEPS - 3), 2))
    ramp = (Batches(draw.randint(6, 9), edges[0]), Batches(draw.randint(6, 15), edges[1] - edges[0]), Batches(BATCH))
    skipped = draw.randrange(2, STEPS - 3)
    schedule = corpus.schedule(*ramp, skip=((skipped, skipped + draw.randrange(2)),))
    every, kills = draw.randint(1, 5), draw.randint(2, 3)
    sizes = [draw.randint(1, 3)]
    sizes.append(draw.choice([size for size in (1, 2, 3) if size != sizes[0]]))
    sizes += [draw.randint(1, 3) for _ in range(kills - 1)]

    trained: list[list[Report]] = []  # of every step that is done and not rolled back, its ranks' reports
    for number, size in enumerate(sizes):
        first = len(trained) + 1
        shares = tuple(draw.randint(1, 3) for _ in range(size))
        attempt = Attempt(corpus, schedule, shares, range(first, STEPS + 1), draw)
        # Enough is left for the attempts that follow to be killed in as well.
        at = None if number == kills else draw.randint(first - 1, STEPS - (kills - number) * (MOST_AHEAD + 1))
        done = attempt.run(kill_at=at)
        trained += done if at is None else done[: (len(trained) + len(done)) // every * every - len(trained)]

    assert [{report.step for report in step} for step in trained] == [{step} for step in range(1, STEPS + 1)]
    rows = [[row for report in step for row in report.rows] for step in trained]
    order = [[] if schedule.skips(s) else hashes(corpus.rows[schedule.order.step(s)]) for s in range(1, STEPS + 1)]
    got, wanted = (Counter(itertools.chain.from_iterable(steps)) for steps in (rows, order))
    assert (wanted - got, got - wanted) == (Counter(), Counter()), "(lost, repeated)"
    assert rows == order
    assert max(wanted.values()) > 1, "more than an epoch"


class Attempt:
    """Ranks as actors in processes of their own, which take steps, each at most a few more than the slowest."""

    def __init__(
        self, corpus: Corpus, schedule: Schedule, shares: tuple[int, ...], steps: range, draw: random.Random
    ) -> None:
        self._ahead = draw.randint(1, MOST_AHEAD)
        self._steps = steps
        self._victim = draw.randrange(len(shares))
        unit_tokens, execution_units = draw.choice((1, FEW // 2, FEW, 10 * FEW)), draw.choice((2, 5, 256))
        actor = ray.remote(num_cpus=0.25, max_restarts=0, max_task_retries=0)(Consumer)
        roles = [Role(rank, shares) for rank in range(len(shares))]
        self._ranks = [
            actor.remote(corpus.uri, schedule.as_json(), role, steps, unit_tokens, execution_units) for role in roles
        ]
        self._reports: list[list[Report]] = [[] for _ in roles]
        self._asked: list[list[Any]] = [[] for _ in roles]

    def run(self, kill_at: int | None) -> list[list[Report]]:
        """The reports of the steps that all ranks have done, up to the last, or to where a killed rank is missed."""
        pids = ray.get([rank.pid.remote() for rank in self._ranks], timeout=DEADLINE_S)
        killed = False
        try:
            while self._done() < len(self._steps):
                self._ask()
                if kill_at is not None and not killed and self._steps[0] + self._furthest() > kill_at:
                    os.kill(pids[self._victim], signal.SIGKILL)
                    killed = True
                if not self._hear():
                    assert killed, "a rank was lost that nobody killed"
                    break
            assert kill_at is None or self._done() < len(self._steps)
        finally:
            for rank in self._ranks:
                ray.kill(rank)
        wait_for(lambda: not any(map(psutil.pid_exists, pids)), lambda: pids)
        return [[reports[place] for reports in self._reports] for place in range(self._done())]

    def _done(self) -> int:
        return min(map(len, self._reports))

    def _furthest(self) -> int:
        return max(map(len, self._reports))

    def _ask(self) -> None:
        """Every rank for as many steps as it may take now."""
        allowed = min(self._done() + self._ahead, len(self._steps))
        for rank, asked in zip(self._ranks, self._asked, strict=True):
            asked += [rank.take.remote() for _ in range(len(asked), allowed)]

    def _hear(self) -> bool:
        """Wait for a report. Returns whether it came: False when its rank is lost."""
        told = zip(self._asked, self._reports, strict=True)
        awaited = {asked[len(got)]: rank for rank, (asked, got) in enumerate(told) if len(got) < len(asked)}
        ready, _ = ray.wait(list(awaited), timeout=DEADLINE_S)
        assert ready, "no rank tells anything"
        rank = awaited[ready[0]]
        try:
            self._reports[rank].append(ray.get(ready[0]))
        except ray.exceptions.RayActorError:
            assert rank == self._victim
            return False
        return True
