"""What streaming a token corpus to one consumer costs, in one run: a raw memory map, Ray Data, MosaicML, Terrane.

All read the same tokens from the page cache in batches of 16 sequences. Then Terrane alone at the pace of a trainer:
what the transport takes from it. BENCH_TOKENS sets the size. Writes results/transport.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import shards
from orchestrator.data.manifest import Manifest, save_manifest
from tests.benchmarks.measuring import peers_python, save
from tests.benchmarks.streams import BATCH, LENGTH, PACE
from tests.conftest import ROOT

TOKENS = int(os.environ.get("BENCH_TOKENS", "500_000_000"))
SHARD_TOKENS, WARM_TOKENS, VOCAB, ROUNDS = 2**24, 2**21, 50_000, 3
PEERS = ROOT / ".venv-stream-peers"
NAMES = {
    "raw": "raw memory map",
    "ray_data": "Ray Data, unordered",
    "mosaic": "MosaicML, shuffled, in process",
    "mosaic_worker": "MosaicML, shuffled, one worker",
    "mosaic_unshuffled": "MosaicML, unshuffled, in process",
    "terrane": "Terrane, shuffled, order held",
}


@pytest.mark.timeout(7200)
def test_transport(tmp_path: Path) -> None:
    python = peers_python(PEERS, "stream_peers.txt")
    tokens = write_all(python, tmp_path, TOKENS, SHARD_TOKENS)
    write_all(python, tmp_path / "warm", WARM_TOKENS, WARM_TOKENS // 4)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            read_once(tmp_path)
            runs.append(run(python if name.startswith("mosaic") else sys.executable, name, tmp_path))
    paced = run(sys.executable, "terrane_paced", tmp_path)
    print()
    rows = {name: row(name, tokens, runs, found["raw"]) for name, runs in found.items()}
    print("Terrane at {tokens_per_s:,.0f} tokens/s: {share:.1%} of a core above an idle cluster".format(**paced))
    save("transport", {"tokens": tokens, "rows": rows, "runs": found, "paced": paced})
    assert {(r["sequences"], r["sum"]) for runs in found.values() for r in runs} == {
        (tokens // LENGTH, found["raw"][0]["sum"])
    }
    assert paced["tokens_per_s"] >= 0.99 * PACE
    speed = {name: values["m_tokens_per_cpu_s"] for name, values in rows.items()}
    assert speed["terrane"] >= 2 * max(speed["mosaic"], speed["mosaic_worker"])
    assert speed["terrane"] >= speed["ray_data"]
    assert paced["share"] <= 0.05


def command(python: str, what: str, folder: Path) -> list[str]:
    return [python, str(Path(__file__).with_name("streams.py")), what, str(folder)]


def run(python: str, what: str, folder: Path) -> dict[str, float]:
    done = subprocess.run(command(python, what, folder), capture_output=True, text=True)
    assert done.returncode == 0, f"{what}: {done.stderr[-3000:]}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_once(folder: Path) -> None:
    """Into the page cache, if it was not there."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass


def parts(tokens: int, shard_tokens: int) -> Iterator[np.ndarray]:
    """The tokens of each shard, [sequences, LENGTH]; whole batches in all."""
    left = tokens // (BATCH * LENGTH) * BATCH * LENGTH
    for number in range(-(-left // shard_tokens)):
        count = min(shard_tokens, left)
        yield np.random.default_rng(number).integers(0, VOCAB, (count // LENGTH, LENGTH), dtype=np.uint16)
        left -= count


def write_all(python: str, folder: Path, tokens: int, shard_tokens: int) -> int:
    """The same sequences as Terrane's shards, as Parquet and as MDS. Returns the number of tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data.extensions import ArrowTensorArray

    (folder / "parquet").mkdir(parents=True)
    written: list[shards.Shard] = []
    mosaic = subprocess.Popen(command(python, "mosaic_write", folder), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert mosaic.stdin
    for number, part in enumerate(parts(tokens, shard_tokens)):
        packed = shards.Packed(part.reshape(-1), [(part.size, "d")])
        written.append(shards.write_shard(str(folder / "corpus"), f"{number:05d}.arrow", packed, LENGTH, VOCAB))
        table = pa.table({"tokens": ArrowTensorArray.from_numpy(part)})  # as Dataset.write_parquet has it
        pq.write_table(table, folder / "parquet" / f"{number:05d}.parquet", compression="none")
        mosaic.stdin.write(part.tobytes())
    mosaic.stdin.close()
    assert mosaic.wait() == 0
    sequences = sum(shard.sequences for shard in written)
    splits = {"train": {"sequences": sequences, "tokens": sequences * LENGTH, "shards": list(map(vars, written))}}
    manifest = Manifest(
        sequence_length=LENGTH, vocab_size=VOCAB, documents={}, sources={}, splits=splits, tail_tokens_dropped=0
    )
    save_manifest(manifest, str(folder / "corpus"))
    return sequences * LENGTH


def row(name: str, tokens: int, runs: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the runs, printed."""
    cpu, wall, base_cpu = (
        statistics.median(run[key] for run in of) for of, key in ((runs, "cpu_s"), (runs, "wall_s"), (base, "cpu_s"))
    )
    values = {
        "cpu_s": cpu,
        "wall_s": wall,
        "m_tokens_per_cpu_s": tokens / 1e6 / cpu,
        "m_tokens_per_s": tokens / 1e6 / wall,
        "of_raw": base_cpu / cpu,
        "least_cpu_s": min(run["cpu_s"] for run in runs),
        "most_cpu_s": max(run["cpu_s"] for run in runs),
    }
    print(
        f"{NAMES[name]:34} {tokens / 1e6:6.0f} M tokens {cpu:7.2f} CPU-s "
        f"({values['least_cpu_s']:.2f} to {values['most_cpu_s']:.2f}) {wall:7.2f} s "
        f"{values['m_tokens_per_cpu_s']:8.1f} M/CPU-s {values['m_tokens_per_s']:8.1f} M/s {base_cpu / cpu:6.3f}x"
    )
    return values
