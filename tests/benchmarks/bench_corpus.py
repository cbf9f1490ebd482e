"""The corpus engine against its peers, in one run: CPU-seconds of the process tree, wall time, memory.

Text: the documentation and sources of the installed Python packages, each file once, as JSON Lines. The peers run in
.venv-peers, which is made when it is missing. BENCH_MIB and BENCH_SIZES_MIB say how much text. Writes results/.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cluster
from tests.benchmarks.measuring import (
    MIB,
    NO_RULES,
    Usage,
    build,
    installed_texts,
    peer,
    reordered,
    repack,
    row,
    save,
    write_files,
)

TEXT_BYTES = int(os.environ.get("BENCH_MIB", 420)) * MIB
PEER_BYTES = TEXT_BYTES // 4
SIZES_MIB = [int(size) for size in os.environ.get("BENCH_SIZES_MIB", "10,100,1000").split(",")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, Path, int]]:
    """All of the text, and a quarter of it for the slow peers."""
    folder = tmp_path_factory.mktemp("text")
    size = write_files(folder / "all", installed_texts(), TEXT_BYTES)
    small = write_files(folder / "part", installed_texts(), PEER_BYTES)
    assert size >= 0.95 * TEXT_BYTES, f"only {size / MIB:.0f} MiB of distinct text is installed here"
    yield folder / "all", size, folder / "part", small


@pytest.mark.timeout(3600)
def test_tokenise_to_shards(text: tuple[Path, int, Path, int], tmp_path: Path) -> None:
    everything, size, part, small = text
    corpus = tmp_path / "corpus"
    settings: dict[str, Any] = {"near_duplicates": None, "quality": NO_RULES}
    with cluster.connection(None):
        with Usage() as whole:
            build(everything, corpus, **settings)
        shards = repack(everything, corpus, **settings)
    tokenizer = corpus / "tokenizer" / "tokenizer.json"
    bare = peer("bare", everything, tmp_path / "bare", tokenizer)
    print()
    base = row("bare encode_batch_fast, two processes", size, bare["cpu"], bare["wall"])
    rows = {"bare": base, "terrane": row("terrane, tokenise to shards", size, shards.cpu, shards.wall, base)}
    rows["whole"] = row("terrane, from JSON Lines, tokenizer trained", size, whole.cpu, whole.wall, base)
    for what in ("datatrove_tokens", "datasets_map"):
        found = peer(what, part, tmp_path / what, tokenizer)
        rows[what] = row(what, small, found["cpu"], found["wall"], base)
    save("tokenise", rows)
    assert rows["terrane"]["mib_per_cpu_s"] >= 0.85 * base["mib_per_cpu_s"]
    assert rows["terrane"]["mib_per_cpu_s"] >= 2 * rows["datatrove_tokens"]["mib_per_cpu_s"]


@pytest.mark.timeout(3600)
def test_memory_is_flat_and_time_linear(tmp_path: Path) -> None:
    texts = list(itertools.islice(installed_texts(), 3000))
    rows: dict[str, dict[str, float]] = {}
    print()
    for mib in SIZES_MIB:
        folder, uri = tmp_path / f"text-{mib}", tmp_path / f"corpus-{mib}"
        size = write_files(folder, reordered(texts[: 3 * mib]), mib * MIB)  # repeated alike at every size
        tokenizer = {"path": str(tmp_path / f"corpus-{SIZES_MIB[0]}" / "tokenizer")} if rows else None
        extra = {"tokenizer": tokenizer} if tokenizer else {}
        with cluster.connection(None), Usage() as usage:
            build(folder, uri, duplicate_spans=True, **extra)
        rows[str(mib)] = row("terrane, every step", size, usage.cpu, usage.wall) | {
            "worker_peak_mib": usage.worker_peak / MIB,
            "driver_peak_mib": usage.driver_peak / MIB,
        }
        print(
            f"{'':44} a worker at most {usage.worker_peak / MIB:.0f} MiB, the driver {usage.driver_peak / MIB:.0f} MiB"
        )
        shutil.rmtree(folder)
    save("memory", rows)
    assert all(found["worker_peak_mib"] < 2048 for found in rows.values())
