"""The transport on a Ray cluster: Ray Data brings every rank its part of every step, whatever breaks on the way."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data

from orchestrator import cluster, storage
from orchestrator.data import stream as streams
from orchestrator.data import transport
from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.order import Batches
from orchestrator.data.schedule import Role, Schedule, Share
from orchestrator.data.shard_cache import FOLDER_VARIABLE
from orchestrator.data.stream import stream
from orchestrator.data.tasks import RETRIES
from orchestrator.errors import DataOrderError, ShardLost, StorageError
from tests.ray.small_corpus import BATCH, EPOCH, FEW, LENGTH, SHARDS, Corpus, write_corpus


@pytest.fixture(scope="module", autouse=True)
def ray_is_up(s3_endpoint: str) -> Iterator[None]:
    with cluster.connection(None):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """To be read only."""
    return write_corpus(str(tmp_path_factory.mktemp("stream") / "corpus"))


def together(
    corpus: Corpus, schedule: Schedule, shares: tuple[int, ...], first: int, last: int, unit_tokens: int = FEW
) -> Iterator[tuple[Share, ...]]:
    """The parts of all ranks of each step. The ranks' streams run side by side."""
    ranks = range(len(shares))
    parts = [stream(corpus.uri, schedule, Role(rank, shares), first, last, unit_tokens) for rank in ranks]
    return zip(*parts, strict=True)


def joined(parts: tuple[Share, ...]) -> np.ndarray:
    """The tokens of a step."""
    return np.concatenate([part.tokens for part in parts if part.tokens is not None])


def assert_ordered(
    corpus: Corpus, schedule: Schedule, shares: tuple[int, ...], first: int, last: int, unit_tokens: int = FEW
) -> None:
    """Every step is what the order says, and each rank has its part of it."""
    steps = iter(range(first, last + 1))
    for parts in together(corpus, schedule, shares, first, last, unit_tokens):
        step = next(steps)
        assert {part.step for part in parts} == {step}
        ids = schedule.order.step(step)
        assert np.array_equal(joined(parts), corpus.rows[ids]), f"step {step}"
        sizes = [len(part.tokens) for part in parts if part.tokens is not None]
        even = [len(ids) * share / sum(shares) for share in shares]
        assert all(abs(size - mean) < 1 for size, mean in zip(sizes, even, strict=True))
        assert {part.largest for part in parts} == {max(sizes)}
        assert {part.targets for part in parts} == {len(ids) * (LENGTH - 1)}
        assert all(part.counted is None for part in parts)
    assert next(steps, None) is None


def flip(path: str | Path) -> None:
    """Change one byte of the tokens, in place."""
    with Path(path).open("r+b") as file:
        file.seek(Path(path).stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


# --- what arrives is the order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_tokens", [1, FEW])
@pytest.mark.parametrize("shares", [(1,), (1, 1, 1), (1,) * 5, (2, 1, 1)], ids=str)
def test_the_ranks_parts_are_the_steps_of_the_order(corpus: Corpus, shares: tuple[int, ...], unit_tokens: int) -> None:
    assert_ordered(corpus, corpus.schedule(), shares, 1, EPOCH + 6, unit_tokens)


def test_more_ranks_than_sequences_leave_some_with_nothing(corpus: Corpus) -> None:
    schedule = corpus.schedule(Batches(3, 4), Batches(2))
    assert_ordered(corpus, schedule, (1,) * 5, 1, 8)
    sizes = [[len(part.tokens) for part in parts] for parts in together(corpus, schedule, (1,) * 5, 4, 5)]  # type: ignore[arg-type]
    assert sorted(sizes[0]) == [0, 0, 1, 1, 1]
    assert sorted(sizes[1]) == [0, 0, 0, 1, 1]


def test_wide_tokens_arrive_whole(tmp_path: Path) -> None:
    corpus = write_corpus(str(tmp_path / "corpus"), vocab_size=200_000)
    assert int(corpus.rows.max()) > 2**16
    assert_ordered(corpus, corpus.schedule(), (2, 1), 1, 8)


@pytest.mark.parametrize("shares", [(1,), (2, 1, 1)], ids=str)
def test_batch_ramps_cut_units(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, shares: tuple[int, ...]) -> None:
    schedule = corpus.schedule(Batches(3, 4), Batches(8, 3), Batches(5, 5), Batches(11))
    read = recorded(monkeypatch)
    assert_ordered(corpus, schedule, shares, 1, 16, 10**6)
    units = [range(1, 5), range(5, 8), range(8, 13), range(13, 17)]
    assert sorted(read, key=lambda steps: steps.start) == [unit for unit in units for _ in shares]


@pytest.mark.parametrize("first", [2, 9, EPOCH + 1])
def test_resuming_in_the_middle_gives_the_same_tail(corpus: Corpus, first: int) -> None:
    schedule, last = corpus.schedule(Batches(7, 5), Batches(BATCH)), EPOCH + 5
    whole = {parts[0].step: joined(parts) for parts in together(corpus, schedule, (1, 1), 1, last)}
    tail = {parts[0].step: joined(parts) for parts in together(corpus, schedule, (1, 2, 1), first, last)}
    assert list(tail) == list(range(first, last + 1))
    assert all(np.array_equal(tokens, whole[step]) for step, tokens in tail.items())


def test_resuming_after_the_last_step_gives_nothing(corpus: Corpus) -> None:
    assert list(stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 9, 8)) == []


def test_executions_follow_each_other_unseen(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "EXECUTION_UNITS", 3)
    started = executions(monkeypatch)
    assert_ordered(corpus, corpus.schedule(), (1, 1), 1, 11, 1)
    assert len(started) == 2 * 4


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The steps of every unit that a consumer reads itself, or Ray Data is given, from now on."""
    given: list[range] = []
    units, read = transport.Units, transport.read_unit

    def reading(corpus: str, schedule: Schedule, role: Role, steps: range) -> Any:
        given.append(steps)
        return read(corpus, schedule, role, steps)

    def recording(corpus: str, schedule: Schedule, role: Role, steps: list[range]) -> transport.Units:
        given.extend(steps)
        return units(corpus, schedule, role, steps)

    monkeypatch.setattr(transport, "read_unit", reading)
    monkeypatch.setattr(transport, "Units", recording)
    return given


def executions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An item for every Ray Data execution that is prepared from now on."""
    started: list[object] = []
    read = ray.data.read_datasource

    def recording(source: Any, **options: Any) -> ray.data.Dataset:
        started.append(source)
        return read(source, **options)

    monkeypatch.setattr(ray.data, "read_datasource", recording)
    return started


# --- it comes through Ray Data ----------------------------------------------------------------------------------------


def test_the_consuming_process_reads_the_first_unit_and_no_other(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody waits for Ray Data to start."""
    here, took, read = os.getpid(), list[range](), transport.read_unit

    def recording(uri: str, schedule: Schedule, role: Role, steps: range) -> Any:
        if os.getpid() == here:
            took.append(steps)
        return read(uri, schedule, role, steps)

    monkeypatch.setattr(transport, "read_unit", recording)
    assert_ordered(corpus, corpus.schedule(), (1, 1), 1, 12, 2 * BATCH // 2 * LENGTH)
    assert took == [range(1, 3)] * 2


def test_only_the_ends_of_a_pipeline_get_tokens(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    read = recorded(monkeypatch)
    schedule, shares, stages = corpus.schedule(), (2, 1), 3
    got: dict[tuple[int, int, int], list[Share]] = {}
    for place in itertools.product(range(2), range(stages), range(2)):
        rank, stage, tensor_rank = place
        read.clear()
        role = Role(rank, shares, pipeline_stage=stage, pipeline_stages=stages, tensor_rank=tensor_rank)
        got[place] = list(stream(corpus.uri, schedule, role, 3, 8, FEW))
        reads = stage != 1 and tensor_rank == 0
        assert bool(read) == reads
        assert all((share.tokens is not None) == reads for share in got[place])
        assert [(share.step, share.targets, share.largest) for share in got[place]] == [
            (step, BATCH * (LENGTH - 1), 8) for step in range(3, 9)
        ]
    for rank in range(2):
        for first, last in zip(got[rank, 0, 0], got[rank, stages - 1, 0], strict=True):
            assert np.array_equal(first.tokens, last.tokens)  # type: ignore[arg-type]
            assert np.array_equal(first.tokens, corpus.rows[schedule.ids([first.step], Role(rank, shares))])  # type: ignore[arg-type]


def test_a_lost_reader_is_not_noticed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = transport.read_unit

    def killed_once(uri: str, schedule: Schedule, role: Role, steps: range) -> Any:
        marker = tmp_path / str(steps[0])
        if steps[0] % 4 == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(uri, schedule, role, steps)

    monkeypatch.setattr(transport, "read_unit", killed_once)
    assert_ordered(corpus, corpus.schedule(), (1,), 1, 12, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_readers_that_are_lost_every_time_end_the_stream(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where mapped pages cannot be read (SIGBUS), or memory is short. Ray Data says so, or hands on what comes
    after the lost block, which is refused."""
    read = transport.read_unit

    def killed(uri: str, schedule: Schedule, role: Role, steps: range) -> Any:
        if steps[0] == 3:
            (tmp_path / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(uri, schedule, role, steps)

    monkeypatch.setattr(transport, "read_unit", killed)
    with pytest.raises((ray.exceptions.WorkerCrashedError, DataOrderError)):
        list(stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 1, 9, 1))
    assert len(list(tmp_path.iterdir())) <= 1 + RETRIES


def test_a_stream_keeps_its_settings_of_ray_data_to_itself(corpus: Corpus) -> None:
    def settings() -> tuple[object, ...]:
        context = ray.data.DataContext.get_current()
        return (
            repr(context.execution_options),
            context.target_max_block_size,
            list(context.custom_execution_callback_classes),
        )

    before = settings()
    arriving = stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 1, 5, 1)
    next(arriving)
    assert settings() == before
    assert len(list(arriving)) == 4
    assert settings() == before


@pytest.mark.parametrize("steps", [1, 3])
def test_an_abandoned_stream_leaves_nothing_running(corpus: Corpus, steps: int) -> None:
    """From the moment on that it is closed: a thread that meets Ray after its shutdown ends the process."""
    before = threading.enumerate()
    abandoned = stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 1, 1000, 1)
    for _ in range(steps):  # the first does not come through Ray Data, which may not have begun when it is here
        next(abandoned)
    assert steps == 1 or any(thread.name.startswith("StreamingExecutor") for thread in threading.enumerate())
    abandoned.close()  # type: ignore[attr-defined]
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


# --- anything else is refused -----------------------------------------------------------------------------------------

Given = tuple[str, Schedule, Role, list[range]]


def another_seed(uri: str, schedule: Schedule, role: Role, steps: list[range]) -> Given:
    return uri, replace(schedule, order=replace(schedule.order, seed=4)), role, steps


def another_rank(uri: str, schedule: Schedule, role: Role, steps: list[range]) -> Given:
    return uri, schedule, replace(role, rank=0), steps


def the_steps_before(uri: str, schedule: Schedule, role: Role, steps: list[range]) -> Given:
    return uri, schedule, role, [range(unit.start - 1, unit.stop - 1) for unit in steps]


def a_step_less(uri: str, schedule: Schedule, role: Role, steps: list[range]) -> Given:
    return uri, schedule, role, [unit[:-1] for unit in steps]


def units_swapped(uri: str, schedule: Schedule, role: Role, steps: list[range]) -> Given:
    return uri, schedule, role, [steps[1], steps[0], *steps[2:]]


@pytest.mark.parametrize("change", [another_seed, another_rank, the_steps_before, a_step_less, units_swapped])
def test_other_samples_than_the_schedule_says_are_refused(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Given]
) -> None:
    units = transport.Units
    monkeypatch.setattr(transport, "Units", lambda *given: units(*change(*given)))
    arriving = stream(corpus.uri, corpus.schedule(), Role(1, (1, 1, 1)), 5, 20, 4 * 3 * LENGTH)
    with pytest.raises(DataOrderError, match="steps 8 to 10, rank 1: got samples"):
        for _ in range(4):  # the first unit does not come through Ray Data
            next(arriving)


def test_another_corpus_in_its_place_is_refused(corpus: Corpus) -> None:
    schedule = replace(corpus.schedule(), corpus_hash="of another")
    with pytest.raises(StorageError, match="has changed under the run"):
        next(stream(corpus.uri, schedule, Role(0, (1,)), 1, 5))


# --- what is passed over ----------------------------------------------------------------------------------------------


def test_steps_passed_over_are_not_read_and_move_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = ((1, 2), (6, 6), (9, 11), (20, 99))
    read = recorded(monkeypatch)
    order, passed = corpus.schedule().order, {1, 2, 6, 9, 10, 11, 20, 21, 22}
    found = list(together(corpus, corpus.schedule(skip=skip), (1, 1), 1, 22))
    assert [parts[0].step for parts in found] == list(range(1, 23))
    for parts in found:
        step = parts[0].step
        if step in passed:
            assert [(part.tokens, part.counted, part.targets) for part in parts] == [(None, None, 0)] * 2
        else:
            assert np.array_equal(joined(parts), corpus.rows[order.step(step)])
            assert {part.targets for part in parts} == {BATCH * (LENGTH - 1)}
    assert {step for steps in read for step in steps} == set(range(1, 23)) - passed


def test_all_steps_passed_over_start_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    started = executions(monkeypatch)
    shares = list(stream(corpus.uri, corpus.schedule(skip=((3, 5),)), Role(0, (1,)), 3, 5))
    assert [(share.step, share.tokens) for share in shares] == [(3, None), (4, None), (5, None)]
    assert started == []


@pytest.mark.parametrize("shares", [(1,), (2, 1, 1), (1,) * 13], ids=str)
def test_what_is_excluded_is_filled_and_not_counted(tmp_path: Path, shares: tuple[int, ...]) -> None:
    corpus = write_corpus(str(tmp_path / "corpus"))
    Path(corpus.uri, corpus.shards[1].name).unlink()
    runs = {
        "a": (Run(3, 10, LENGTH - 1), Run(4, 0, 20)),
        "b": (Run(4, 30, 30), Run(100, 0, LENGTH - 1), Run(150, 0, 0)),
        "in the lost shard": (Run(40, 5, 9),),
    }
    exclusions = Exclusions(lost=(corpus.lost(1),), quarantined=runs, filler=7)
    counted = np.ones(corpus.rows.shape, dtype=bool)
    counted[SHARDS[0] : SHARDS[0] + SHARDS[1]] = False
    for run in itertools.chain.from_iterable(runs.values()):
        counted[run.sample, run.first : run.last + 1] = False
    schedule = corpus.schedule(exclusions=exclusions)
    seen = np.zeros(len(corpus.rows), dtype=int)
    for parts in together(corpus, schedule, shares, 1, EPOCH + 3):
        ids = schedule.order.step(parts[0].step)
        seen[ids] += 1
        left = np.concatenate(
            [np.ones(part.tokens.shape, bool) if part.counted is None else part.counted for part in parts]  # type: ignore[union-attr]
        )
        assert np.array_equal(left, counted[ids])
        assert np.array_equal(joined(parts), np.where(left, corpus.rows[ids], 7))
        assert {part.targets for part in parts} == {int(left[:, 1:].sum())}
        assert all(part.counted is None or not part.counted.all() for part in parts)
        assert {part.tokens.dtype for part in parts} == {corpus.rows.dtype}  # type: ignore[union-attr]
    assert all(seen[run.sample] for run in itertools.chain.from_iterable(runs.values())), "all were met"


# --- broken shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped", "missing", "cut"])
def test_a_broken_shard_is_named_after_all_that_comes_before_it(tmp_path: Path, how: str) -> None:
    corpus = write_corpus(str(tmp_path / "corpus"))
    schedule = corpus.schedule()
    met = {number: first_met(schedule, corpus.lost(number)) for number in range(len(SHARDS))}
    number, reached = max(met.items(), key=lambda item: item[1])
    assert reached > 1
    assert_ordered(corpus, schedule, (1,), 1, EPOCH)  # the readers have verified the shard and keep it mapped
    path = Path(corpus.uri, corpus.shards[number].name)
    if how == "flipped":
        flip(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])

    arriving = stream(corpus.uri, schedule, Role(0, (1,)), 1, EPOCH, 1)
    for step in range(1, reached):
        assert np.array_equal(next(arriving).tokens, corpus.rows[schedule.order.step(step)])  # type: ignore[arg-type]
    with pytest.raises(ShardLost, match="is missing" if how == "missing" else "is damaged") as lost:
        next(arriving)
    assert lost.value.shard == corpus.shards[number].name

    without = corpus.schedule(exclusions=Exclusions(lost=(corpus.lost(number),), filler=0))
    steps = 0
    for parts in together(corpus, without, (1, 1), 1, EPOCH):
        ids = schedule.order.step(parts[0].step)
        left = ~without.exclusions.lost_samples(ids)
        assert np.array_equal(joined(parts)[left], corpus.rows[ids][left])
        assert not joined(parts)[~left].any()
        steps += 1
    assert steps == EPOCH


def first_met(schedule: Schedule, shard: LostShard) -> int:
    """The step in which the order first comes to a shard."""
    lost = Exclusions(lost=(shard,))
    return next(step for step in itertools.count(1) if lost.lost_samples(schedule.order.step(step)).any())


# --- from S3 ----------------------------------------------------------------------------------------------------------


def cached(corpus: Corpus) -> dict[str, Path]:
    """Where the node's cache holds, or would hold, the shards of a corpus."""
    return {shard.name: Path(os.environ[FOLDER_VARIABLE], f"{shard.xxh3}.arrow") for shard in corpus.shards}


def test_a_corpus_on_s3_arrives_through_the_cache_of_the_node(bucket: str) -> None:
    corpus = write_corpus(f"{bucket}/corpus", seed=1)
    assert not any(path.exists() for path in cached(corpus).values())
    assert_ordered(corpus, corpus.schedule(), (2, 1, 1), 1, EPOCH + 4)
    assert {path.stat().st_size for path in cached(corpus).values()} == {shard.bytes for shard in corpus.shards}
    for shard in corpus.shards:
        storage.delete(f"{corpus.uri}/{shard.name}")
    assert_ordered(corpus, corpus.schedule(), (1, 1), 1, EPOCH + 4)


def test_a_damaged_file_of_the_cache_is_healed_or_named(bucket: str) -> None:
    """Before readers first map it, and when another one comes in its place."""
    corpus = write_corpus(f"{bucket}/corpus", seed=2)
    fill_cache(corpus)
    for path in cached(corpus).values():
        flip(path)
    assert_ordered(corpus, corpus.schedule(), (1,), 1, EPOCH + 4)
    for path in cached(corpus).values():
        replaced = path.with_suffix(".new")
        replaced.write_bytes(path.read_bytes())
        flip(replaced)
        replaced.replace(path)
    assert_ordered(corpus, corpus.schedule(), (1,), 1, EPOCH + 4)

    last = corpus.shards[-1]
    path = cached(corpus)[last.name]
    path.unlink()
    path.write_bytes(bytes(last.bytes))
    storage.delete(f"{corpus.uri}/{last.name}")
    arrived = []
    with pytest.raises(ShardLost) as lost:
        for share in stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 1, EPOCH, 1):
            arrived.append(share)
    assert lost.value.shard == last.name
    assert len(arrived) == first_met(corpus.schedule(), corpus.lost(len(SHARDS) - 1)) - 1
    for share in arrived:
        assert np.array_equal(share.tokens, corpus.rows[corpus.schedule().order.step(share.step)])  # type: ignore[arg-type]


def test_a_file_of_the_cache_that_changes_under_a_reader_is_healed(bucket: str) -> None:
    corpus = write_corpus(f"{bucket}/corpus", seed=4)
    assert_ordered(corpus, corpus.schedule(), (1,), 1, EPOCH + 4)
    for path in cached(corpus).values():
        flip(path)
    assert_ordered(corpus, corpus.schedule(), (1,), 1, EPOCH + 4)


def test_a_shard_damaged_on_s3_is_named_and_not_cached(bucket: str) -> None:
    corpus = write_corpus(f"{bucket}/corpus", seed=3)
    broken = corpus.shards[3]
    data = bytearray(storage.read(f"{corpus.uri}/{broken.name}"))
    data[len(data) // 2] ^= 1
    storage.write(f"{corpus.uri}/{broken.name}", bytes(data))
    with pytest.raises(ShardLost, match="is damaged") as lost:
        list(stream(corpus.uri, corpus.schedule(), Role(0, (1,)), 1, EPOCH, FEW))
    assert lost.value.shard == broken.name
    assert not cached(corpus)[broken.name].exists()


def fill_cache(corpus: Corpus) -> None:
    """As another process of the node would."""
    from orchestrator.data.shard_cache import node_cache

    for shard in corpus.shards:
        node_cache().fetch(f"{corpus.uri}/{shard.name}", shard.bytes, shard.xxh3)
