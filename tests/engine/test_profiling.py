from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.data.schedule import Role
from orchestrator.train_config import TrainConfig
from tests.engine.cases import Case, share_of
from tests.engine.launching import torchrun

PLAIN, PIPELINE = Case(shares=(1, 1)), Case(shares=(1,), stages=(2, 2), zero=1)


def labels(trace: Path) -> Counter[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_every_rank_writes_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    torchrun("profile_rank.py", 2, str(tmp_path), json.dumps([asdict(PLAIN), asdict(PIPELINE)]))
    for rank in range(2):
        plain, pipeline = (labels(tmp_path / f"{case}" / f"rank-{rank}.json.gz") for case in (0, 1))
        assert (plain["data"], plain["optimizer"]) == (2, 2), "two steps"
        assert plain["forward-backward"] == 4, "of up to four sequences each, in micro-batches of two"
        assert (pipeline["data"], pipeline["forward-backward"], pipeline["optimizer"]) == (2, 2, 2)


def traced(trace: Path, steps: tuple[int, int] | None) -> Path:
    from orchestrator.train.profiling import Profiler, labelled

    profiler = Profiler(str(trace), steps)
    for share in profiler.over((share_of(step, Role(0, (1,))) for step in range(2, 5)), first=2):
        with labelled(f"step {share.step}"):
            pass
    profiler.close()
    return trace


def test_what_is_traced_when_a_run_ends_is_written(tmp_path: Path) -> None:
    found = labels(traced(tmp_path / "a.json.gz", (3, 9)))
    assert [name for name in found if name.startswith("step")] == ["step 3", "step 4"]


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    assert not traced(tmp_path / "a.json.gz", None).exists()
    assert not traced(tmp_path / "b.json.gz", (7, 9)).exists(), "the run ended before"


@pytest.mark.parametrize("steps", ["[0, 3]", "[5, 3]", "[20, 101]"])
def test_steps_outside_of_the_run_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        TrainConfig(steps=100, lr=1e-3, profile=json.loads(steps))
