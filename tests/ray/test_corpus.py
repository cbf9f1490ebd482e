"""The corpus engine on a Ray cluster: many formats in, shards and reasons out, whatever is killed on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
import zstandard
from pyarrow import parquet

from orchestrator import cluster, corpora, storage
from orchestrator.config import Recipe
from orchestrator.data import duplicates, inspection, sources
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.layout import CorpusDir
from orchestrator.data.manifest import Manifest, data_order, load_manifest
from orchestrator.data.pipeline import build_corpus
from orchestrator.data.tasks import run_alone, run_tasks
from orchestrator.errors import UserError
from tests.conftest import ROOT

WORDS = [
    f"{a}{b}{c}" for a in ("ba", "co", "di", "fu", "ge") for b in ("lan", "mer", "nis", "tor") for c in ("", "ic", "us")
]
LENGTH = 32


@pytest.fixture(scope="module", autouse=True)
def ray_is_up(s3_endpoint: str) -> Iterator[None]:
    with cluster.connection(None):
        yield


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 20_000)


def silent(what: str, done: int, of: int) -> None:
    """No progress."""


def prose(seed: int, words: int = 300) -> str:
    """Sentences of invented words; another seed gives another text."""
    draw = random.Random(seed)
    return ". ".join(" ".join(draw.choices(WORDS, k=10)) for _ in range(words // 10)) + "."


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def recipe(*folders: Path, **corpus: Any) -> Recipe:
    listed = [{"name": folder.name, "path": str(folder)} for folder in folders]
    corpus = {"sources": listed, "held_out": 0.2, **corpus}
    train = {"steps": 10, "lr": 1e-3, "sequence_length": LENGTH, "global_batch_size": 10}
    return Recipe.model_validate({"name": "r", "corpus": corpus, "tokenizer": {"vocab_size": 600}, "train": train})


def build(recipe_: Recipe, uri: str) -> Manifest:
    return build_corpus(recipe_, uri, sources.list_sources(recipe_.corpus), silent)


def texts_of(uri: str, manifest: Manifest) -> dict[str, str]:
    """The documents in the shards by id, decoded. The very last tokens of a split are in no sequence."""
    tokenizer = tokenizers.load(CorpusDir(uri).tokenizer)
    found: dict[str, list[int]] = {}
    for split in ("train", "held_out"):
        samples = list(range(manifest.sequences(split)))
        tokens = manifest.reader(uri, split).take(np.array(samples))
        for passage in chain.from_iterable(inspection.trace(uri, manifest, samples, split)):
            found.setdefault(passage.document, []).extend(
                tokens[passage.sample][passage.first : passage.last + 1].tolist()
            )
    return {document: tokenizer.decode(ids).removesuffix("</s>") for document, ids in found.items()}


def files_at(uri: str, *parts: str) -> dict[str, int]:
    """When each file below a directory of a corpus was written, but for those that are being written."""
    folder = Path(uri, *parts)
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("[!.]*"))
        if path.is_file()
    }


# --- what goes in comes out, or is named ------------------------------------------------------------------------------


def bad_and_good(folder: Path) -> dict[str, str]:
    """Files of many kinds. Returns the reason of each document that cannot stay."""
    folder.mkdir(parents=True)
    write_lines(folder / "lines.jsonl", [prose(n) for n in range(60)] + ["too little"])
    with (folder / "lines.jsonl").open("a") as file:
        file.write('{"title": "no text"}\n{broken\n')
    (folder / "zst.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": prose(100)}).encode()))
    parquet.write_table(pa.table({"text": [prose(101), prose(102)]}), folder / "p.parquet")
    (folder / "repeat.md").write_text(prose(3).replace(" ", "  "))
    near = prose(4).split()
    near[7] = "otherword"
    (folder / "near.md").write_text(" ".join(near))
    (folder / "cut.txt.gz").write_bytes(gzip.compress(prose(103).encode())[:-30])
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (folder / "empty.md").write_bytes(b"")
    (folder / "random.pdf").write_bytes(random.Random(0).randbytes(5000))
    bomb = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    (folder / "bomb.xml").write_text(
        f'<!DOCTYPE article [<!ENTITY a "{"x" * 100}">{bomb}]><article><body>&i;</body></article>'
    )
    (folder / "exam.md").write_text(prose(104) + " " + " ".join(WORDS[5:25]) + " " + prose(105))
    return {
        "s/repeat.md": "exact duplicate",
        "s/near.md": "near duplicate",
        "s/cut.txt.gz": "broken compression",
        "s/latin.txt": "not utf-8",
        "s/empty.md": "too short",
        "s/random.pdf": "broken pdf",
        "s/bomb.xml": "entity in xml",
        "s/exam.md": "in an evaluation set",
    }


def test_every_document_is_in_the_shards_or_named_with_its_reason(tmp_path: Path) -> None:
    expected = bad_and_good(tmp_path / "s")
    (tmp_path / "exams").mkdir()
    (tmp_path / "exams" / "quiz.csv").write_text(f"question,answer\n{' '.join(WORDS[5:25])},A\n")
    uri = str(tmp_path / "corpus")
    manifest = build(recipe(tmp_path / "s", decontaminate=str(tmp_path / "exams")), uri)
    documents = manifest.documents
    assert documents["read"] == documents["kept"] + sum(documents["dropped"].values())
    lost = {d.id: d.reason for d in inspection.dropped(uri)}
    assert expected.items() <= lost.items()
    assert sorted(reason for id_, reason in lost.items() if "lines.jsonl" in id_) == [
        "broken json",
        "no text",
        "too short",
    ]
    assert len(lost) == documents["read"] - documents["kept"] == len(expected) + 3
    assert documents["kept"] == 63
    kept = {prose(n) for n in (*range(60), 100, 101, 102)}
    found = texts_of(uri, manifest).values()
    assert all(any(text.startswith(part) for text in kept) for part in found)
    assert len(kept.intersection(found)) >= 50, "all but what ends in the last tokens of a split"
    tokens = sum(split["tokens"] for split in manifest.splits.values()) + manifest.tail_tokens_dropped
    assert tokens == manifest.sources["s"]["tokens"]


def test_every_token_leads_to_its_document(tmp_path: Path) -> None:
    write_lines(tmp_path / "s" / "a.jsonl", [prose(n, 200) for n in range(50)])
    uri = str(tmp_path / "corpus")
    manifest = build(recipe(tmp_path / "s"), uri)
    lines = (tmp_path / "s" / "a.jsonl").read_bytes()
    tokenizer = tokenizers.load(CorpusDir(uri).tokenizer)
    samples = list(range(manifest.sequences("train")))
    tokens = manifest.reader(uri, "train").take(np.array(samples))
    passages = list(chain.from_iterable(inspection.trace(uri, manifest, samples)))
    assert sum(p.last - p.first + 1 for p in passages) == manifest.splits["train"]["tokens"]
    for passage in passages:
        offset = int(passage.document.partition("#")[2])
        text = json.loads(lines[offset : lines.index(b"\n", offset)])["text"]
        ids = tokens[passage.sample][passage.first : passage.last + 1].tolist()
        assert tokenizer.decode(ids).removesuffix("</s>") in text
    with pytest.raises(IndexError):
        inspection.trace(uri, manifest, [len(samples)])


def test_passages_of_an_earlier_document_are_cut(tmp_path: Path) -> None:
    shared = "\n\n".join(prose(n, 40) for n in (900, 901))
    write_lines(tmp_path / "s" / "a.jsonl", [prose(1) + "\n\n" + shared] + [prose(n) for n in range(20, 60)])
    (tmp_path / "s" / "b.md").write_text(prose(2) + "\n\n" + shared + "\n\n" + prose(3))
    write_lines(tmp_path / "s" / "c.jsonl", [prose(n) for n in range(60, 70)])
    uri = str(tmp_path / "corpus")
    manifest = build(recipe(tmp_path / "s", duplicate_spans=True), uri)
    assert manifest.documents["kept"] == 52
    found = texts_of(uri, manifest)
    assert found["s/b.md"] == prose(2) + "\n\n" + prose(3)
    assert sum(shared in text for text in found.values()) == 1
    assert manifest.sources["s"]["cut_bytes"] >= len(shared)


def test_a_corpus_on_s3_is_the_corpus_on_a_disk(tmp_path: Path, bucket: str) -> None:
    write_lines(tmp_path / "s" / "a.jsonl", [prose(n) for n in range(40)])
    storage.upload(tmp_path / "s" / "a.jsonl", f"{bucket}/in/s/a.jsonl")
    local = build(recipe(tmp_path / "s", duplicate_spans=True), str(tmp_path / "corpus"))
    there = recipe(tmp_path / "s", duplicate_spans=True)
    there = there.model_copy(
        update={
            "corpus": there.corpus.model_copy(
                update={"sources": (there.corpus.sources[0].model_copy(update={"path": f"{bucket}/in/s"}),)}
            )
        }
    )
    remote = build(there, f"{bucket}/corpus")
    assert remote.hash == local.hash
    assert remote.documents == local.documents


def test_after_an_outage_the_same_command_brings_in_what_was_missing(tmp_path: Path, bucket: str) -> None:
    for number in range(6):
        write_lines(tmp_path / "s" / f"{number}.jsonl", [prose(100 * number + n) for n in range(6)])
        storage.upload(tmp_path / "s" / f"{number}.jsonl", f"{bucket}/in/{number}.jsonl")
    there = recipe(tmp_path / "s").model_dump()
    there["corpus"]["sources"][0]["path"] = f"{bucket}/in"
    remote, uri = Recipe.model_validate(there), str(tmp_path / "corpus")
    files = sources.list_sources(remote.corpus)
    storage.delete(f"{bucket}/in/1.jsonl")  # gone after it was listed, as in an outage
    without = build_corpus(remote, uri, files, silent)
    assert without.documents == {"read": 31, "kept": 30, "dropped": {"storage failed": 1}}
    storage.upload(tmp_path / "s" / "1.jsonl", f"{bucket}/in/1.jsonl")
    healed = build_corpus(remote, uri, files, silent)
    assert healed.documents == {"read": 36, "kept": 36, "dropped": {}}
    brought = {prose(100 + n) for n in range(6)} & set(texts_of(uri, healed).values())
    assert len(brought) >= 4, "all but what ends in the last tokens of a split"


def test_an_empty_corpus_says_why(tmp_path: Path) -> None:
    write_lines(tmp_path / "s" / "a.jsonl", ["short", "also"])
    with pytest.raises(UserError, match=r"none of 2 documents was kept \(2 too short\)"):
        build(recipe(tmp_path / "s"), str(tmp_path / "corpus"))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_is_met_in_every_batch(tmp_path: Path) -> None:
    for name, first, count in (("papers", 0, 60), ("code", 1000, 20)):
        write_lines(tmp_path / name / "a.jsonl", [prose(first + n) for n in range(count)])
    tokens = 50 * LENGTH
    stages = [{"weights": {"papers": 0.8, "code": 0.2}, "tokens": tokens}, {"weights": {"code": 1}}]
    mixed = recipe(tmp_path / "papers", tmp_path / "code", mixture=stages)
    uri = str(tmp_path / "corpus")
    manifest = build(mixed, uri)
    order = data_order(manifest, mixed)
    for step, share in ((1, 0.8), (5, 0.8), (6, 0.0), (9, 0.0)):
        samples = order.step(step).tolist()
        origins = {p.sample: p.document.split("/")[0] for p, *_ in inspection.trace(uri, manifest, samples)}
        assert np.mean([origins[sample] == "papers" for sample in samples]) == share
    idle = recipe(tmp_path / "papers", tmp_path / "code", mixture=[{"weights": {"code": 1}}])
    assert build(idle, uri).documents == manifest.documents


# --- survival ---------------------------------------------------------------------------------------------------------


def many_files(folder: Path, count: int = 12, first: int = 0) -> None:
    for number in range(first, first + count):
        write_lines(folder / f"{number:03d}.jsonl", [prose(100 * number + n) for n in range(8)])


def test_new_files_cost_only_themselves(tmp_path: Path) -> None:
    many_files(tmp_path / "s", 6)
    uri = str(tmp_path / "corpus")
    first = build(recipe(tmp_path / "s"), uri)
    before = files_at(uri, "documents") | files_at(uri, "shards")
    write_lines(tmp_path / "s" / "001-new.jsonl", [prose(7000), prose(7001), prose(205)])
    second = build(recipe(tmp_path / "s"), uri)
    after = files_at(uri, "documents") | files_at(uri, "shards")
    new = {name for name in after if before.get(name) != after[name]}
    assert {name for name in new if name.startswith("unit-")} == {f"unit-{len(files_at(uri, 'facts')) - 1:06d}.arrow"}
    assert len([name for name in before if name not in after]) <= 4, "the tails and their sidecars"
    assert second.documents["kept"] == first.documents["kept"] + 2
    assert second.documents["dropped"] == {"exact duplicate": 1}
    assert build(recipe(tmp_path / "s"), uri) == second
    again = files_at(uri, "documents") | files_at(uri, "shards")
    assert again.keys() == after.keys()
    assert {name for name in after if again[name] != after[name] and "tails" not in name} == set(), (
        "nothing is done twice"
    )


def test_a_file_that_went_takes_its_documents_along(tmp_path: Path) -> None:
    many_files(tmp_path / "s", 6)
    uri = str(tmp_path / "corpus")
    write_lines(tmp_path / "s" / "zzz.jsonl", [prose(0), prose(9000)])
    with_it = build(recipe(tmp_path / "s"), uri)
    assert with_it.documents["dropped"] == {"exact duplicate": 1}
    (tmp_path / "s" / "000.jsonl").unlink()
    without = build(recipe(tmp_path / "s"), uri)
    assert without.documents == {"read": 42, "kept": 42, "dropped": {}}
    assert prose(0) in texts_of(uri, without).values(), "the copy stays now"


def test_a_lost_worker_costs_no_more_than_its_task() -> None:
    def work(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    assert run_tasks("square", work, range(6), silent, on_crash=lambda item: -item) == [0, 1, 4, -3, 16, 25]
    assert run_alone(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None
    assert run_alone(lambda: 7) == 7


def test_an_error_of_a_task_arrives_as_it_was_raised() -> None:
    def work(item: int) -> int:
        raise UserError(f"no {item}", "try another")

    with pytest.raises(UserError, match="no 0") as error:
        run_tasks("fail", work, [0], silent)
    assert error.value.hint == "try another"


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    many_files(tmp_path / "s", 12)
    values = recipe(tmp_path / "s").model_dump(mode="json")
    values["storage"] = str(tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    uri = str(tmp_path / "runs" / "r" / "corpus")
    program = (
        "from orchestrator.data import sources; sources.MIN_UNIT_BYTES = 20_000\n"
        "from orchestrator.cli import run_job\n"
        f"raise SystemExit(run_job(('corpus',), [{str(tmp_path / 'recipe.yaml')!r}]))"
    )
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(files_at(uri, "facts")) < 3:
        assert time.monotonic() < end
        assert first.poll() is None, "it must not be done yet"
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = files_at(uri, "facts")
    assert load_manifest(uri) is None
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    after = files_at(uri, "facts")
    assert [name for name in done if after[name] != done[name]] == []
    assert load_manifest(uri).hash == build(recipe(tmp_path / "s"), str(tmp_path / "undisturbed")).hash  # type: ignore[union-attr]


# --- duplicates over partitions ---------------------------------------------------------------------------------------


def test_duplicates_are_the_same_however_the_work_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(n) for n in range(30)]
    for number in range(40):
        words = prose(number % 10).split()
        words[number] = "changed"
        texts.append(" ".join(words))
    write_lines(tmp_path / "s" / "a.jsonl", texts)
    whole = build(recipe(tmp_path / "s"), str(tmp_path / "whole"))
    assert whole.documents["dropped"]["near duplicate"] == 40
    monkeypatch.setattr(duplicates, "PARTITION_BYTES", 20_000)
    monkeypatch.setattr(duplicates, "LOCAL_EDGES", 0)
    cut = build(recipe(tmp_path / "s"), str(tmp_path / "cut"))
    assert len(list(Path(tmp_path, "cut", "dedup").rglob("near/part-*.bin"))) > 3
    assert cut.documents == whole.documents
    assert cut.clusters["sizes"] == whole.clusters["sizes"] == {"5": 10}
    assert cut.hash == whole.hash
    summary = corpora.describe(corpora.summarize(corpora.find_corpus(str(tmp_path / "cut"))))
    assert "10 clusters of near-duplicates, 40 documents beyond the first of each" in summary
