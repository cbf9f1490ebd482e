"""Near-duplicates against datatrove, in one run: CPU-seconds, and recall and precision on injected near-duplicates.

Both start from JSON Lines and end when every duplicate is known; datatrove with its default configuration. Writes
results/near_duplicates.json.
"""

from __future__ import annotations

import collections
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cluster
from orchestrator.data import duplicates, extraction, minhash, sources, tasks
from orchestrator.data.layout import CorpusDir
from orchestrator.data.numbers import row_of
from orchestrator.data.texts import read_texts
from tests.benchmarks.measuring import NO_RULES, Usage, build, installed_texts, peer, row, save, write_files


@pytest.mark.timeout(3600)
def test_near_duplicates(tmp_path: Path) -> None:
    """Documents in, duplicates known: all that happens before the tokenizer, against datatrove's four steps."""
    texts = [piece for text in itertools.islice(installed_texts(), 1500) for piece in pieces(text)][:6000]
    draw, count = random.Random(2), len(texts)
    originals = draw.sample(range(count), count // 3)
    texts += [disturbed(texts[index], draw) for index in originals]
    size = write_files(tmp_path / "text", iter(texts), sys.maxsize)
    uri = tmp_path / "corpus"
    with cluster.connection(None):
        warm_up()
        with Usage() as usage, pytest.raises(Enough):
            build(tmp_path / "text", uri, until_tokenizer, near_duplicates=0.8, quality=NO_RULES)
    gone = {json.loads(line)["text"] for line in removed_lines(uri, tmp_path / "text")}
    theirs = peer("datatrove_minhash", tmp_path / "text", tmp_path / "datatrove", tmp_path)
    kept = {json.loads(line)["text"] for file in (tmp_path / "datatrove" / "kept").iterdir() for line in file.open()}
    pairs = list(zip((texts[index] for index in originals), texts[count:], strict=True))
    print()
    rows = {"datatrove": row("datatrove", size, theirs["cpu"], theirs["wall"])}
    rows["terrane"] = row("terrane", size, usage.cpu, usage.wall, rows["datatrove"])
    for name, dropped in (("datatrove", set(texts) - kept), ("terrane", gone)):
        rows[name] |= quality_of(dropped, pairs, texts)
        figures = {key: f"{rows[name][key]:.4f}" for key in ("recall", "precision_0.8", "precision_0.7")}
        print(f"{name:12}", figures)
    save("near_duplicates", rows)
    assert rows["terrane"]["mib_per_cpu_s"] >= 5 * rows["datatrove"]["mib_per_cpu_s"]
    assert rows["terrane"]["recall"] >= rows["datatrove"]["recall"]


class Enough(Exception):
    """The part that is measured is done."""


def until_tokenizer(what: str, done: int, of: int) -> None:
    if "tokenizer" in what:
        raise Enough


def warm_up() -> None:
    """Start the workers: the cluster is already up when work arrives."""
    tasks.run_tasks("warm up", lambda _: minhash.signatures(["warm up"]).shape, range(8), lambda *_: None)


def pieces(text: str) -> Iterator[str]:
    """Of 1 to 3 kB, as web pages and abstracts are."""
    words = text.split(" ")
    for first in range(0, len(words), 300):
        piece = " ".join(words[first : first + 300])
        if len(piece) > 1000:
            yield piece


def disturbed(text: str, draw: random.Random) -> str:
    """A few words replaced, left out or added."""
    words = text.split(" ")
    for _ in range(draw.randrange(1, max(2, len(words) // 40))):
        place = draw.randrange(len(words))
        words[place : place + 1] = draw.choice([["replaced"], [], [words[place], "added"]])
    return " ".join(words)


def removed_lines(uri: Path, text: Path) -> Iterator[str]:
    """The records of the duplicates that a corpus build found."""
    corpus = CorpusDir(str(uri))
    units = sources.units_from_json(json.loads(Path(corpus.units).read_text()))
    facts = [extraction.load_facts(corpus, unit) for unit in units]
    (state,) = Path(uri, "dedup").iterdir()
    found = duplicates.Duplicates(corpus, state.name, {u.number: f.key for u, f in zip(units, facts, strict=True) if f})
    for unit in units:
        ids = [id_ for (batch,) in read_texts(corpus.documents(unit.number), "id") for id_ in batch]
        for document in found.gone(unit.number)["document"].tolist():
            name, _, offset = ids[row_of(document)].partition("/")[2].partition("#")
            with (text / name).open() as file:
                file.seek(int(offset))
                yield file.readline()


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(*(words[n:] for n in range(5)), strict=False))


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    return len(a & b) / max(1, len(a | b))


def quality_of(dropped: set[str], pairs: list[tuple[str, str]], texts: list[str]) -> dict[str, float]:
    """Recall: of injected pairs of Jaccard 0.8 or more, one is dropped. Precision: what is dropped has a twin."""
    true = [pair for pair in pairs if jaccard(shingles(pair[0]), shingles(pair[1])) >= 0.8]
    by_shingle: dict[tuple[str, ...], set[int]] = {}
    sets = [shingles(text) for text in texts]
    for index, found in enumerate(sets):
        for shingle in found:
            by_shingle.setdefault(shingle, set()).add(index)

    def nearest(mine: frozenset[Any], text: str) -> float:
        shared = collections.Counter(i for shingle in mine for i in by_shingle[shingle] if texts[i] != text)
        return max((jaccard(mine, sets[i]) for i, _ in shared.most_common(5)), default=0.0)

    twins = [1.0 if texts.count(text) > 1 else nearest(shingles(text), text) for text in dropped]
    return {
        "pairs": len(true),
        "recall": sum(a in dropped or b in dropped for a, b in true) / len(true),
        **{f"precision_{least}": sum(twin >= least for twin in twins) / max(1, len(twins)) for least in (0.8, 0.7)},
    }
