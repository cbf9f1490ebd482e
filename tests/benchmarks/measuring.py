"""What the benchmarks share: text to work on, the use of a process tree, the peers' environment, the table."""

from __future__ import annotations

import json
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
import xxhash

from orchestrator.config import Recipe
from orchestrator.corpus_config import QualityConfig
from orchestrator.data import pipeline, sources
from orchestrator.data.manifest import Manifest
from orchestrator.data.tasks import Progress
from tests.conftest import ROOT

RESULTS = Path(__file__).with_name("results")
PEERS = ROOT / ".venv-peers"
SUFFIXES = (".py", ".md", ".rst", ".txt", ".pyi", ".h", ".html", ".hpp", ".c")
MIB = 2**20
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
        digest = xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())
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


def peers_python(folder: Path, requirements: str) -> str:
    """The Python of an environment of peers, which is made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        listed = str(Path(__file__).with_name(requirements))
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", "-r", listed], check=True)
    return str(python)


def peer(what: str, source: Path, out: Path, tokenizer: Path) -> dict[str, float]:
    out.mkdir(parents=True)
    command = [
        peers_python(PEERS, "peers.txt"),
        str(Path(__file__).with_name("peers.py")),
        what,
        source,
        out,
        tokenizer,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


NO_RULES = dict.fromkeys(QualityConfig.model_fields)
"""Every document stays, as it does with the peers."""


def build(folder: Path, uri: Path, progress: Progress = lambda *_: None, **corpus: Any) -> Manifest:
    tokenizer = corpus.pop("tokenizer", {"vocab_size": 50_000, "sample_mib": 32})
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "corpus": {"sources": [{"name": "s", "path": str(folder)}], **corpus},
            "tokenizer": tokenizer,
            "train": {"steps": 1, "lr": 1.0, "sequence_length": 2048},
        }
    )
    return pipeline.build_corpus(recipe, str(uri), sources.list_sources(recipe.corpus), progress)


def repack(folder: Path, uri: Path, **corpus: Any) -> Usage:
    """Tokenise, pack and write again from the clean documents of a corpus: what the stage costs by itself."""
    for name in ("packed", "shards"):
        for file in (uri / name).iterdir():
            file.unlink()
    with Usage() as usage:
        build(folder, uri, **corpus)
    return usage


def save(name: str, values: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def row(name: str, bytes_: int, cpu: float, wall: float, base: dict[str, float] | None = None) -> dict[str, float]:
    speed = bytes_ / MIB / cpu
    ratio = f"{speed / base['mib_per_cpu_s']:6.2f}x" if base else ""
    print(f"{name:44} {bytes_ / MIB:8.0f} MiB {cpu:8.1f} CPU-s {wall:8.1f} s {speed:8.2f} MiB/CPU-s {ratio}")
    return {"mib": bytes_ / MIB, "cpu_s": cpu, "wall_s": wall, "mib_per_cpu_s": speed}
