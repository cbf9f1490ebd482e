"""The corpus engine against its peers, in one run: CPU-seconds of the process tree, wall time, memory.

    make bench BENCH=corpus

Text: the documentation and sources of the installed Python packages, each file once, as JSON Lines. The peers run in
.venv-peers, which is made when it is missing. Writes results/corpus.json.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import xxhash

from orchestrator import cluster
from orchestrator.config import Recipe
from orchestrator.data import pipeline, sources
from orchestrator.data.manifest import Manifest
from tests.conftest import ROOT

RESULTS = Path(__file__).with_name("results")
PEERS = ROOT / ".venv-peers"
SUFFIXES = (".py", ".md", ".rst", ".txt", ".pyi", ".h", ".html", ".hpp", ".c")
MIB = 2**20
TEXT_BYTES = int(os.environ.get("BENCH_MIB", 420)) * MIB
PEER_BYTES = TEXT_BYTES // 4
FILE_BYTES = 16 * MIB


# --- text -------------------------------------------------------------------------------------------------------------


def installed_texts() -> Iterator[str]:
    """Every distinct text file of the installation, in a fixed random order."""
    roots = {sysconfig.get_paths()[name] for name in ("purelib", "stdlib")}
    files = sorted(
        {file for root in roots for file in Path(root).rglob("*") if file.suffix in SUFFIXES and file.is_file()}
    )
    random.Random(0).shuffle(files)
    seen: set[int] = set()
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = xxhash.xxh3_64_intdigest(" ".join(text.split()))
        if 200 < len(text) < 2 * MIB and digest not in seen:
            seen.add(digest)
            yield text


def reordered(texts: list[str]) -> Iterator[str]:
    """More text of the same kind, for ever: the lines of the texts in another order."""
    draw = random.Random(1)
    while True:
        for text in texts:
            lines = text.splitlines(keepends=True)
            draw.shuffle(lines)
            yield "".join(lines)


def write_files(folder: Path, texts: Iterator[str], size: int) -> int:
    """JSON Lines of `size` bytes of text in all. Returns the bytes of text written."""
    folder.mkdir(parents=True)
    written = number = 0
    for text in texts:
        with (folder / f"{number:04d}.jsonl").open("a") as file:
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if file.tell() > FILE_BYTES:
                number += 1
        if written >= size:
            break
    return written


# --- measuring --------------------------------------------------------------------------------------------------------


class Usage:
    """CPU seconds and memory of this process and all below it, sampled; a process that ends keeps what it had used."""

    def __init__(self) -> None:
        self._cpu: dict[tuple[int, float], float] = {}
        self.worker_peak = self.driver_peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._sample()
        self._before = dict(self._cpu)
        self._started = time.perf_counter()
        self._own = time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self._sample()
        self.cpu = sum(used - self._before.get(key, 0.0) for key, used in self._cpu.items())

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times, memory = process.cpu_times(), process.memory_full_info().uss
                self._cpu[(process.pid, process.create_time())] = times.user + times.system
                if process.pid == me.pid:
                    self.driver_peak = max(self.driver_peak, memory)
                elif process.name().startswith("ray::"):
                    self.worker_peak = max(self.worker_peak, memory)
            except psutil.Error:
                continue


def peer(what: str, source: Path, out: Path, tokenizer: Path) -> dict[str, float]:
    if not (PEERS / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        requirements = str(Path(__file__).with_name("peers.txt"))
        subprocess.run([str(PEERS / "bin" / "pip"), "install", "-q", "-r", requirements], check=True)
    out.mkdir(parents=True)
    command = [str(PEERS / "bin" / "python"), str(Path(__file__).with_name("peers.py")), what, source, out, tokenizer]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def recipe(folder: Path, **corpus: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "bench",
            "corpus": {"sources": [{"name": "s", "path": str(folder)}], **corpus},
            "tokenizer": {"vocab_size": 50_000, "sample_mib": 32},
            "train": {"steps": 1, "lr": 1.0, "sequence_length": 2048},
        }
    )


def build(folder: Path, uri: Path, stages: dict[str, float] | None = None, **corpus: Any) -> Manifest:
    """A corpus; where `stages` is given, it gets the time at which each stage began."""

    def progress(what: str, done: int, of: int) -> None:
        if stages is not None:
            stages.setdefault(what, time.perf_counter())

    values = recipe(folder, **corpus)
    return pipeline.build_corpus(values, str(uri), sources.list_sources(values.corpus), progress)


def repack(folder: Path, uri: Path, **corpus: Any) -> Usage:
    """Tokenise, pack and write again from the cleaned documents of a corpus."""
    for name in ("packed", "shards"):
        for file in (uri / name).iterdir():
            file.unlink()
    with Usage() as usage:
        build(folder, uri, **corpus)
    return usage


def save(name: str, values: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "corpus.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: values}, indent=2) + "\n")


def row(name: str, bytes_: int, cpu: float, wall: float, base: float | None = None) -> dict[str, float]:
    speed = bytes_ / MIB / cpu
    ratio = f"{speed / base:6.2f}" if base else ""
    print(f"{name:44} {bytes_ / MIB:8.0f} MiB {cpu:8.1f} CPU-s {wall:8.1f} s {speed:8.2f} MiB/CPU-s {ratio}")
    return {"mib": bytes_ / MIB, "cpu_s": cpu, "wall_s": wall, "mib_per_cpu_s": speed}


# --- benchmarks -------------------------------------------------------------------------------------------------------


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
    settings: dict[str, Any] = {"near_duplicates": None, "quality": {"min_characters": 1}}
    with cluster.connection(None):
        with Usage() as whole:
            build(everything, corpus, **settings)
        manifest_time = repack(everything, corpus, **settings)
    tokenizer = corpus / "tokenizer" / "tokenizer.json"
    found = {"bare": peer("bare", everything, tmp_path / "bare", tokenizer)}
    for what in ("datatrove_tokens", "datasets_map"):
        found[what] = peer(what, part, tmp_path / what, tokenizer)
    print()
    rows = {
        "bare encode_batch_fast, two processes": row("bare encode_batch_fast, two processes", size, **found["bare"])
    }
    base = rows["bare encode_batch_fast, two processes"]["mib_per_cpu_s"]
    for name, usage in (("terrane, tokenise to shards", manifest_time), ("terrane, whole (tokenizer trained)", whole)):
        rows[name] = row(name, size, usage.cpu, usage.wall, base)
    for what in ("datatrove_tokens", "datasets_map"):
        rows[what] = row(what, small, found[what]["cpu"], found[what]["wall"], base)
    save("tokenise", rows)
