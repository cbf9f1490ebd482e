"""`terrane corpus`: a corpus, or the documents behind what a run trained on, as facts and as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import inspection
from orchestrator.data.manifest import Manifest, data_order, load_manifest
from orchestrator.errors import UserError
from orchestrator.runs import RunDir

BAR = 40


@dataclass(frozen=True)
class Corpus:
    """A finished corpus, and the recipe of its run where it stands in one."""

    uri: str
    manifest: Manifest
    recipe: Recipe | None


def find_corpus(location: str) -> Corpus:
    """The corpus of a run, or the one in a corpus directory.

    Raises:
        UserError: there is none, or it is not finished.
    """
    uri = storage.absolute(location)
    run = RunDir(uri)
    is_run = run.read_json(run.resolved) is not None
    corpus = run.corpus if is_run else uri
    manifest = load_manifest(corpus)
    if manifest is None:
        hint = (
            f"terrane run ... --stage corpus makes it in {corpus}" if is_run else "give a run or its corpus directory"
        )
        raise UserError(f"no finished corpus at {corpus}", hint)
    return Corpus(corpus, manifest, run.recipe() if is_run else None)


def summarize(corpus: Corpus) -> dict[str, Any]:
    """Counts, tokens, drop reasons, lengths and duplicate clusters."""
    manifest = corpus.manifest
    return {
        "corpus": corpus.uri,
        "hash": manifest.hash,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "documents": manifest.documents,
        "sources": manifest.sources,
        "splits": {
            name: {"sequences": split["sequences"], "tokens": split["tokens"], "shards": len(split["shards"])}
            for name, split in manifest.splits.items()
        },
        "tail_tokens_dropped": manifest.tail_tokens_dropped,
        "clusters": {
            "sizes": manifest.clusters.get("sizes", {}),
            "largest": inspection.clusters(corpus.uri, manifest),
        },
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary as text, for a terminal."""
    documents = summary["documents"]
    lines = [
        f"corpus {summary['corpus']}",
        f"{documents['read']:,} documents read, {documents['kept']:,} kept",
        *(f"  {count:>10,}  {reason}" for reason, count in sorted(documents["dropped"].items(), key=lambda i: -i[1])),
        "",
        f"{'source':20} {'read':>10} {'kept':>10} {'characters':>14} {'tokens':>14}",
        *(
            f"{name:20} {s['read']:>10,} {s['kept']:>10,} {s['characters']:>14,} {s['tokens']:>14,}"
            for name, s in summary["sources"].items()
        ),
        "",
        *(
            f"{name}: {s['tokens']:,} tokens in {s['sequences']:,} sequences of {summary['sequence_length']}, "
            f"{s['shards']} shards"
            for name, s in summary["splits"].items()
        ),
        f"{summary['tail_tokens_dropped']:,} tokens at the very end fill no sequence",
        *(
            f"{name}: {s['cut_bytes']:,} bytes of passages cut that stand in earlier documents"
            for name, s in summary["sources"].items()
            if s["cut_bytes"]
        ),
        "",
        *_histogram(summary["sources"]),
        *_clusters(summary["clusters"]),
    ]
    return "\n".join(lines)


def _histogram(sources: dict[str, Any]) -> list[str]:
    counts: dict[int, int] = {}
    for source in sources.values():
        for power, count in source["lengths"].items():
            counts[int(power)] = counts.get(int(power), 0) + count
    most = max(counts.values(), default=1)
    rows = []
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        count = counts.get(power, 0)
        rows.append(f"{2**power:>10,} - {2 ** (power + 1) - 1:<12,} {count:>10,} {'#' * round(BAR * count / most)}")
    return ["documents by tokens", *(row.rstrip() for row in rows)]


def _clusters(clusters: dict[str, Any]) -> list[str]:
    sizes = {int(size): count for size, count in clusters["sizes"].items()}
    if not sizes:
        return []
    dropped = sum((size - 1) * count for size, count in sizes.items())
    lines = ["", f"{sum(sizes.values()):,} clusters of near-duplicates, {dropped:,} documents beyond the first of each"]
    for cluster in clusters["largest"]:
        lines.append(f"  {cluster['size']:>6,}  {cluster['kept']}")
        lines += [f"          = {other}" for other in cluster["dropped"]]
    return lines


def trace(corpus: Corpus, what: int) -> list[inspection.Passage]:
    """The documents of a sample of a corpus, or of all samples of a step of a run.

    Raises:
        UserError: there is no such sample or step.
    """
    if corpus.recipe is None:
        samples = [what]
    else:
        if not 1 <= what <= corpus.recipe.train.steps:
            raise UserError(f"--trace {what}: the run's steps go from 1 to {corpus.recipe.train.steps}")
        samples = data_order(corpus.manifest, corpus.recipe).step(what).tolist()
    try:
        return inspection.trace(corpus.uri, corpus.manifest, samples)
    except IndexError as error:
        raise UserError(f"--trace {what}: {error}") from None


def dropped(corpus: Corpus, reason: str, limit: int) -> list[inspection.DroppedDocument]:
    """The first documents that were dropped for a reason; `all` for any.

    Raises:
        UserError: no document was dropped for it.
    """
    reasons = corpus.manifest.documents["dropped"]
    if reason != "all" and reason not in reasons:
        raise UserError(f"no document was dropped as {reason!r}", f"reasons here: {', '.join(reasons) or 'none'}")
    found = list(islice(inspection.dropped(corpus.uri, None if reason == "all" else reason), limit))
    names = inspection.document_ids(corpus.uri, [int(d.of) for d in found if d.of])
    return [replace(d, of=names[int(d.of)]) if d.of else d for d in found]
