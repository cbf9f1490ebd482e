"""`terrane corpus`: a corpus, or the documents behind what a run trained on, as facts and as text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from orchestrator import resume, storage
from orchestrator.config import Recipe
from orchestrator.data import inspection
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.order import slice_of
from orchestrator.data.schedule import Schedule
from orchestrator.errors import UserError
from orchestrator.runs import RunDir
from orchestrator.train.checkpoints import committed_steps

BAR = 40
_TRACE_HINT = "give STEP, STEP:RANK or STEP:RANK:SLOT"


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


@dataclass(frozen=True)
class _Consumed:
    samples: list[int]
    facts: list[dict[str, Any]]
    """Where each of them went."""
    quarantined: frozenset[str]
    """Documents that were, then."""


def trace(corpus: Corpus, what: str) -> list[dict[str, Any]]:
    """The documents of a sample of a corpus (`SAMPLE`), or of what a step of a run saw (`STEP[:RANK[:SLOT]]`).

    Of each run of tokens: sample, first and last token in it, document, source and shard; of a run also the step, the
    attempt that did it, the data-parallel rank, the slot in the rank's share, and whether the tokens were excluded. A
    step that no attempt has come to yet is told as it is planned, with no attempt and no rank.

    Raises:
        UserError: there is no such sample, step, rank or slot.
    """
    try:
        numbers = [int(part) for part in what.split(":")]
    except ValueError:
        raise UserError(f"--trace {what} is no number", _TRACE_HINT) from None
    if len(numbers) > 3:
        raise UserError(f"--trace {what} has too many parts", _TRACE_HINT)
    if corpus.recipe is None:
        seen = _Consumed(numbers, [{}], frozenset())
        if len(numbers) > 1:
            raise UserError(f"--trace {what}: a corpus has samples; ranks and slots are a run's", "give the run")
    else:
        seen = _consumed(corpus, corpus.recipe, what, numbers)
    try:
        passages = inspection.trace(corpus.uri, corpus.manifest, seen.samples)
    except IndexError as error:
        raise UserError(f"--trace {what}: {error}") from None
    return [
        {
            **fact,
            **vars(passage),
            "source": passage.document.split("/", 1)[0],
            **({"excluded": True} if passage.document in seen.quarantined else {}),
        }
        for fact, found in zip(seen.facts, passages, strict=True)
        for passage in found
    ]


def passage_line(passage: dict[str, Any]) -> str:
    """One run of tokens, for a terminal: rank and slot, sample, tokens, document."""
    place = f"{passage['rank']}:{passage['slot']}" if passage.get("rank") is not None else ""
    excluded = "  (excluded)" if passage.get("excluded") else ""
    tokens = f"{passage['first']:>6} - {passage['last']:<6}"
    return f"{place:>8}  {passage['sample']:>10}  {tokens}  {passage['document']}{excluded}"


def _consumed(corpus: Corpus, recipe: Recipe, what: str, numbers: list[int]) -> _Consumed:
    """What a step, or a part of it, saw."""
    step, steps = numbers[0], recipe.train.steps
    if not 1 <= step <= steps:
        raise UserError(f"--trace {what}: the run's steps go from 1 to {steps}")
    run = RunDir(corpus.uri.rpartition("/")[0])
    record = _record(run, step)
    chosen = Schedule.from_json(record) if record else resume.data_schedule(run, recipe, corpus.manifest)
    if chosen.corpus_hash != corpus.manifest.hash:
        raise UserError(f"--trace {what}: the corpus has changed since the step was trained", "put it back")
    if chosen.skips(step):
        raise UserError(f"--trace {what}: step {step} is passed over (train.skip_steps, or a loss spike)")
    shares = tuple(record["shares"]) if record else ()
    _check_place(what, numbers, chosen.order.batch_size(step), shares)
    ids = chosen.order.step(step)
    lost = chosen.exclusions.lost_samples(ids)
    facts = [
        {"step": step, "attempt": record and record["attempt"], "rank": rank, "slot": slot, "excluded": bool(gone)}
        for (rank, slot), gone in zip(_slots(len(ids), shares), lost, strict=True)
    ]
    keep = [
        place for place, fact in enumerate(facts) if [fact["rank"], fact["slot"]][: len(numbers) - 1] == numbers[1:]
    ]
    return _Consumed(ids[keep].tolist(), [facts[place] for place in keep], frozenset(chosen.exclusions.quarantined))


def _record(run: RunDir, step: int) -> dict[str, Any] | None:
    """What the attempt that did a step was to consume; None where none has come to the step."""
    found = run.last_schedule(step)
    done = committed_steps(run.checkpoints)
    if found is None or (done and step <= done[-1]):
        return found
    came_to = max((line["step"] for line in run.metric_lines(found["attempt"])), default=0)
    return found if step <= came_to else None


def _check_place(what: str, numbers: list[int], sequences: int, shares: tuple[int, ...]) -> None:
    """See that a step has the rank, and the rank the slot, that `STEP:RANK:SLOT` names."""
    if len(numbers) == 1:
        return
    step, rank, *slot = numbers
    if not shares:
        raise UserError(f"--trace {what}: no attempt has come to step {step}, so it has no ranks", f"--trace {step}")
    if not 0 <= rank < len(shares):
        raise UserError(f"--trace {what}: the ranks of the step go from 0 to {len(shares) - 1}")
    first, end = slice_of(sequences, rank, shares)
    if first == end:
        raise UserError(f"--trace {what}: rank {rank} has no sequence in step {step}")
    if slot and not 0 <= slot[0] < end - first:
        raise UserError(f"--trace {what}: the slots of the rank go from 0 to {end - first - 1}")


def _slots(sequences: int, shares: tuple[int, ...]) -> list[tuple[int | None, int]]:
    """(rank, place in its share) of each sequence of a step."""
    if not shares:
        return [(None, place) for place in range(sequences)]
    bounds = [slice_of(sequences, rank, shares) for rank in range(len(shares))]
    return [(rank, place) for rank, (first, end) in enumerate(bounds) for place in range(end - first)]


def suspects(corpus: Corpus, step: int) -> dict[str, Any]:
    """The documents behind a loss spike of a run, the worst first, and the checkpoint that they are judged with.

    Raises:
        UserError: it is no run, there was no spike at the step, or no checkpoint from before it is left.
    """
    from orchestrator.accelerators import local_accelerator
    from orchestrator.evaluation.suspects import judge

    if corpus.recipe is None:
        raise UserError(f"--suspects {step}: a corpus has no loss spikes; they are a run's", "give the run")
    run = RunDir(corpus.uri.rpartition("/")[0])
    checkpoint, found = judge(run, corpus.manifest, step, local_accelerator().torch_device)
    return {"step": step, "checkpoint": checkpoint, "documents": [vars(document) for document in found]}


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
