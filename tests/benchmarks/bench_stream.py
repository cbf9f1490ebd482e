"""What Ray Data's scheduling loop costs the process that trains, with and without rest between its turns.

A consumer takes a batch and then waits, as a training step on an accelerator would have it wait; the CPU time that its
process uses meanwhile is the transport's. Both runs alternate in one process. Writes results/stream.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from orchestrator import cluster
from orchestrator.data import shards, stream
from orchestrator.data.manifest import Manifest
from orchestrator.data.order import uniform

RESULTS = Path(__file__).with_name("results")
SAMPLES, LENGTH, STEPS, STEP_S, ROUNDS = 20_000, 256, 400, 0.02, 3


def manifest(corpus: str) -> Manifest:
    tokens = np.random.default_rng(0).integers(0, 50_000, SAMPLES * LENGTH, dtype=np.uint32)
    shard = shards.write_shard(corpus, "s.arrow", shards.Packed(tokens, [(len(tokens), "d")]), LENGTH, 50_000)
    splits = {"train": {"sequences": SAMPLES, "tokens": len(tokens), "shards": [vars(shard)]}}
    return Manifest(
        sequence_length=LENGTH, vocab_size=50_000, documents={}, sources={}, splits=splits, tail_tokens_dropped=0
    )


def cores_used(corpus: str, found: Manifest) -> float:
    """CPU seconds of this process per second of wall time while it consumes STEPS steps."""
    order = uniform(samples=SAMPLES, seed=0, global_batch_size=16)
    batches = stream.rank_batches(corpus, found, order, stream.RankSlice(0, 1), 1, STEPS)
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in batches:
        time.sleep(STEP_S)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def test_the_scheduling_loop_leaves_the_core_to_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifest(str(tmp_path))
    used: dict[str, list[float]] = {"free": [], "paced": []}
    with cluster.connection(None):
        for _ in range(ROUNDS):
            for name, pace in (("free", 0.0), ("paced", stream.PACE_S)):
                with monkeypatch.context() as patched:
                    patched.setattr(stream, "PACE_S", pace)
                    used[name].append(cores_used(str(tmp_path), found))
    medians = {name: statistics.median(values) for name, values in used.items()}
    print("\nloop    cores used (median, all)")
    for name, values in used.items():
        print(f"{name:6}  {medians[name]:.2f}  {', '.join(f'{v:.2f}' for v in values)}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stream.json").write_text(json.dumps({"cores_used": used, "median": medians}, indent=2))
    assert medians["paced"] < medians["free"]
