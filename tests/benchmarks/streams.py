"""Ways to stream a token corpus to one consumer, each run as a process of its own: `streams.py WHAT FOLDER`.

FOLDER holds the same sequences three times: `corpus` (Terrane's shards), `parquet` and `mds`; so does FOLDER/warm, but
few of them: everything is gone through once with those, so that neither imports nor the start of workers is measured.
MosaicML's are run by the Python of .venv-stream-peers, which has nothing of Terrane: imports stand in the functions.

Every way yields arrays [BATCH, LENGTH], and every array is summed up by 64-bit words: whatever a way leaves for later,
such as a page of shared memory nobody has looked at, is done by then, and the sum tells whether all came, and once.
Prints JSON: wall and CPU seconds, the sequences and the sum.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

BATCH, LENGTH = 16, 2048
PACE, PACED_S, IDLE_S, SETTLE_S = 1_000_000, 90.0, 30.0, 3.0
"""Tokens a second that a trainer takes, for how long, and how long the idle cluster is watched before."""

Batches = Callable[[Path], Iterator[np.ndarray]]


class Cost:
    """CPU and wall seconds of this process and all below it.

    Two counts, neither of which can be too high: what was seen of every process while it lived, which misses the last
    moments of one that ended; and what those alive have used and inherited from children they waited for, which misses
    children nobody waits for. The larger is taken. What the looking itself costs is taken off.
    """

    def __enter__(self) -> Cost:
        self._me = psutil.Process()
        self._seen: dict[tuple[int, float], float] = {}
        self._looking = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._inherited_before = self._sample()
        self._seen_before = dict(self._seen)
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        inherited = self._sample() - self._inherited_before
        seen = sum(used - self._seen_before.get(key, 0.0) for key, used in self._seen.items())
        self.cpu = max(seen, inherited) - self._looking

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._sample()
            self._looking = time.thread_time()

    def _sample(self) -> float:
        total = 0.0
        for process in [self._me, *self._me.children(recursive=True)]:
            with suppress(psutil.Error):
                times = process.cpu_times()
                used = time.process_time() if process.pid == self._me.pid else times.user + times.system
                self._seen[(process.pid, process.create_time())] = used
                total += used + times.children_user + times.children_system
        return total


# --- the ways ---------------------------------------------------------------------------------------------------------


def raw(folder: Path) -> Iterator[np.ndarray]:
    """The least that can be done: rows of the memory maps, copied one by one, in the order that Terrane trains in."""
    import pyarrow as pa

    from orchestrator.data.manifest import load_manifest
    from orchestrator.data.order import uniform

    manifest = load_manifest(str(folder / "corpus"))
    assert manifest is not None
    maps = []
    for shard in manifest.shards("train"):
        column = pa.ipc.open_file(pa.memory_map(str(folder / "corpus" / shard.name))).get_batch(0).column(0)
        maps.append(np.asarray(column.flatten().to_numpy(zero_copy_only=True)).reshape(-1, LENGTH))
    samples = manifest.sequences("train")
    ids = uniform(samples=samples, seed=0, global_batch_size=BATCH).samples(np.arange(samples, dtype=np.int64))
    ends = np.cumsum([len(tokens) for tokens in maps])
    where = np.searchsorted(ends, ids, side="right")
    rows = ids - np.concatenate([[0], ends])[where]
    for first in range(0, samples, BATCH):
        batch = np.empty((BATCH, LENGTH), np.uint16)
        batch_of = slice(first, first + BATCH)
        for place, (shard_, row) in enumerate(zip(where[batch_of].tolist(), rows[batch_of].tolist(), strict=True)):
            batch[place] = maps[shard_][row]
        yield batch


def ray_data(folder: Path) -> Iterator[np.ndarray]:
    """Ray Data as it comes, in whatever order the blocks arrive."""
    import ray

    (split,) = ray.data.read_parquet(str(folder / "parquet")).streaming_split(1, equal=False)
    for batch in split.iter_batches(batch_size=BATCH, batch_format="numpy"):
        tokens = batch["tokens"]
        yield np.stack(tokens) if tokens.dtype == object else tokens


def terrane(folder: Path, steps: int | None = None) -> Iterator[np.ndarray]:
    """The transport of training, as it is: the order computed and held to, every shard verified. An epoch, or steps."""
    from orchestrator.data.manifest import load_manifest
    from orchestrator.data.order import uniform
    from orchestrator.data.schedule import Role, Schedule
    from orchestrator.data.stream import stream

    manifest = load_manifest(str(folder / "corpus"))
    assert manifest is not None
    order = uniform(samples=manifest.sequences("train"), seed=0, global_batch_size=BATCH)
    schedule = Schedule(order=order, sequence_length=LENGTH, corpus_hash=manifest.hash)
    last = steps or manifest.sequences("train") // BATCH
    for share in stream(str(folder / "corpus"), schedule, Role(0, (1,)), 1, last):
        assert share.tokens is not None
        yield share.tokens


def mosaic(folder: Path, shuffle: bool = True, workers: int = 0) -> Iterator[np.ndarray]:
    """StreamingDataset with its defaults. It verifies what it downloads: these shards are local, and so it does not."""
    from torch.utils.data import DataLoader

    dataset = streaming().StreamingDataset(
        local=str(folder / "mds"), shuffle=shuffle, batch_size=BATCH, validate_hash="xxh64"
    )
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers):
        yield batch["tokens"].numpy()


def mosaic_write(folder: Path) -> None:
    """An MDS data set of the rows that come by standard input."""
    columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
    with streaming().MDSWriter(out=str(folder / "mds"), columns=columns, hashes=["xxh64"]) as out:
        while row := sys.stdin.buffer.read(2 * LENGTH):
            out.write({"tokens": np.frombuffer(row, np.uint16)})


def streaming() -> Any:
    """The module `streaming`. It imports torchvision for its image data sets, whose wheels on PyPI are of the CUDA
    build only, and fail with a torch for CPU: such a torch gets an empty one."""
    import torch

    if "+cpu" in torch.__version__:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            module: Any = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.VisionDataset, module.to_tensor = object, None
            sys.modules.setdefault(name, module)
    import streaming

    return streaming


@contextmanager
def plain_cluster() -> Iterator[None]:
    """A local cluster with Ray's own size of object store, otherwise as `orchestrator.cluster` starts one."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    folder = tempfile.mkdtemp(prefix="trn-", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            logging_level="ERROR",
            log_to_driver=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def terrane_cluster() -> AbstractContextManager[None]:
    from orchestrator import cluster

    return cluster.connection(None)


# --- measuring --------------------------------------------------------------------------------------------------------


def consume(batches: Iterator[np.ndarray]) -> tuple[int, int]:
    """(sequences, sum of all their 64-bit words modulo 2^64)."""
    sequences = total = 0
    for batch in batches:
        assert batch.shape == (BATCH, LENGTH) and batch.dtype == np.uint16, (batch.shape, batch.dtype)
        total += int(batch.view(np.uint64).sum())
        sequences += len(batch)
    return sequences, total % 2**64


def timed(folder: Path, way: Batches, running: Callable[[], AbstractContextManager[None]]) -> dict[str, float]:
    with running():
        consume(way(folder / "warm"))
        with Cost() as cost:
            sequences, total = consume(way(folder))
    return {"cpu_s": cost.cpu, "wall_s": cost.wall, "sequences": sequences, "sum": total}


def terrane_paced(folder: Path) -> dict[str, float]:
    """Cores in use while Terrane feeds a trainer of PACE tokens a second, and while its cluster has nothing to do."""
    steps = int(PACE * PACED_S) // (BATCH * LENGTH)
    with terrane_cluster():
        consume(terrane(folder / "warm"))
        time.sleep(SETTLE_S)
        with Cost() as idle:
            time.sleep(IDLE_S)
        with Cost() as busy:
            due = time.perf_counter()
            for batch in terrane(folder, steps):
                consume(iter([batch]))
                due += BATCH * LENGTH / PACE
                time.sleep(max(0.0, due - time.perf_counter()))
    return {
        "tokens_per_s": steps * BATCH * LENGTH / busy.wall,
        "idle_cores": idle.cpu / idle.wall,
        "busy_cores": busy.cpu / busy.wall,
        "share": busy.cpu / busy.wall - idle.cpu / idle.wall,
    }


WAYS: dict[str, Callable[[Path], object]] = {
    "raw": lambda folder: timed(folder, raw, nullcontext),
    "ray_data": lambda folder: timed(folder, ray_data, plain_cluster),
    "mosaic": lambda folder: timed(folder, mosaic, nullcontext),
    "mosaic_worker": lambda folder: timed(folder, lambda of: mosaic(of, workers=1), nullcontext),
    "mosaic_unshuffled": lambda folder: timed(folder, lambda of: mosaic(of, shuffle=False), nullcontext),
    "mosaic_write": mosaic_write,
    "terrane": lambda folder: timed(folder, terrane, terrane_cluster),
    "terrane_paced": terrane_paced,
}

if __name__ == "__main__":
    print(json.dumps(WAYS[sys.argv[1]](Path(sys.argv[2]))))
