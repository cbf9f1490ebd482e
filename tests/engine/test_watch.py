"""The watch over steps, in a world of one rank: it is told of steps that nobody made, on a run directory of a test."""

from __future__ import annotations

import io
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import accelerators, storage
from orchestrator.data import inspection
from orchestrator.data.manifest import schedule
from orchestrator.data.schedule import Role
from orchestrator.errors import LossSpike, NotFinite
from orchestrator.runs import RunDir
from orchestrator.train.sample_losses import SampleLosses
from orchestrator.train.watch import Watch
from orchestrator.train_config import SpikesConfig
from tests.made_runs import manifest_of, recipe, root_of, run_at

BATCH, WINDOW = 4, 8


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    accelerators.prepare_process(accelerators.CPU)
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "tokenizer").mkdir()
    made = run_at(str(tmp_path), tmp_path / "tokenizer")
    made.claim_attempt({})
    return made


def watch_of(run: RunDir, state: dict[str, Any] | None = None, fp16: bool = False, **values: Any) -> Watch:
    config = SpikesConfig.model_validate({"window": WINDOW, "jump": 2, **values})
    manifest = manifest_of(run)
    chosen = schedule(manifest, recipe(root_of(run)))
    samples = SampleLosses(run.corpus, manifest, chosen, Role(0, (1,)), config.jump + 1)
    return Watch(run, 1, config, chosen.order, samples, fp16=fp16, state=state or {})


def told(watch: Watch, step: int, losses: list[float], grad_norm: float = 0.5, broken: tuple[int, ...] = ()) -> bool:
    """Tell of a step as the worker's loop does; returns whether its update was to be made."""
    from orchestrator.train.engine import StepResult

    loss = float(np.mean(losses))
    applied = watch.accepts(step)(loss, grad_norm)
    watch.follow(
        step,
        StepResult(
            loss=loss,
            grad_norm=grad_norm,
            applied=applied,
            flag=False,
            broken_ranks=broken,
            forward_s=(0.1,),
            sample_losses=np.array(losses, np.float32),
        ),
    )
    return applied


def warmed(watch: Watch) -> Watch:
    rng = np.random.default_rng(0)
    assert all(told(watch, step, rng.normal(2, 0.1, BATCH).tolist()) for step in range(1, 11))
    return watch


def documents_of(run: RunDir, step: int, slot: int) -> set[str]:
    manifest = manifest_of(run)
    sample = int(schedule(manifest, recipe(root_of(run))).order.step(step)[slot])
    (passages,) = inspection.trace(run.corpus, manifest, [sample])
    return {passage.document for passage in passages}


def test_a_spike_is_dropped_and_its_sample_and_documents_are_named(run: RunDir) -> None:
    watch = warmed(watch_of(run, quarantine=1))
    assert not told(watch, 11, [2.0, 2.1, 9.0, 1.9])
    (found,) = run.spikes()
    assert (found["attempt"], found["step"], found["loss"]) == (1, 11, 3.75)
    assert found["loss_z"] > 6 > found["norm_z"]
    (suspect,) = found["suspects"]
    assert (suspect["step"], suspect["loss"], set(suspect["documents"])) == (11, 9.0, documents_of(run, 11, 2))
    assert found["quarantined"] == suspect["documents"][:1]
    (event,) = [event for event in run.events() if event["event"] == "spike"]
    assert (event["action"], event["documents"]) == ("skip", suspect["documents"])
    kept = np.load(io.BytesIO(storage.read(run.sample_losses(1, 11))))
    assert kept["steps"].tolist() == [step for step in (9, 10, 11) for _ in range(BATCH)]
    assert kept["losses"][-BATCH:].tolist() == pytest.approx([2.0, 2.1, 9.0, 1.9])
    assert told(watch, 12, [2.0] * BATCH)


@pytest.mark.parametrize(("action", "made"), [("record", True), ("skip", False)])
def test_what_is_recorded_is_made(run: RunDir, action: str, made: bool) -> None:
    watch = warmed(watch_of(run, action=action))
    assert told(watch, 11, [2.0, 2.1, 9.0, 1.9]) == made
    assert [spike["quarantined"] for spike in run.spikes()] == [[]]


def test_going_back_ends_the_attempt_after_all_is_written(run: RunDir) -> None:
    watch = warmed(watch_of(run, action="rollback"))
    with pytest.raises(LossSpike, match=r"loss spike at step 11: loss 3\.75 \(z") as ended:
        told(watch, 11, [2.0, 2.1, 9.0, 1.9])
    assert ended.value.step == 11
    assert set(run.spikes()[0]["quarantined"]) == documents_of(run, 11, 2)


def test_where_all_samples_are_bad_no_document_is(run: RunDir) -> None:
    watch = warmed(watch_of(run))
    assert not told(watch, 11, [9.0, 9.1, 8.9, 9.2])
    assert run.spikes()[0]["documents"] == []


def test_a_watch_goes_on_from_the_state_of_the_one_before(run: RunDir) -> None:
    watch = watch_of(run, warmed(watch_of(run)).state())
    assert not told(watch, 11, [2.0, 2.1, 9.0, 1.9])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_names_step_rank_host_and_documents(run: RunDir, bad: float) -> None:
    watch = watch_of(run)
    with pytest.raises(NotFinite) as ended:
        told(watch, 3, [2.0, bad, 2.0, 2.0], broken=(0,))
    assert f"loss is {bad} at step 3, from rank 0 on {socket.gethostname()}; " in ended.value.message
    assert all(document in ended.value.message for document in documents_of(run, 3, 1))
    assert "train.skip_steps=[[3, 3]]" in ended.value.hint
    assert ended.value.step == 3


def test_where_nothing_is_finite_no_document_is_named(run: RunDir) -> None:
    with pytest.raises(NotFinite) as ended:
        told(watch_of(run), 3, [math.nan] * BATCH, broken=(0,))
    assert "a/" not in ended.value.message.replace(run.uri, "")


def test_a_gradient_that_overflows_is_an_end_but_for_fp16(run: RunDir) -> None:
    with pytest.raises(NotFinite, match="gradient norm is inf at step 1"):
        told(watch_of(run), 1, [2.0] * BATCH, grad_norm=math.inf)
    told(watch_of(run, fp16=True), 1, [2.0] * BATCH, grad_norm=math.inf)
