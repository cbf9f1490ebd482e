"""`terrane corpus RUN --trace`: what a step saw, on runs made by hand."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import corpora, resume, storage
from orchestrator.corpora import find_corpus, trace
from orchestrator.data.manifest import save_manifest, schedule
from orchestrator.data.shards import Packed, write_shard
from orchestrator.errors import UserError
from orchestrator.runs import RunDir, open_run
from tests.made_runs import LENGTH, SEQUENCES, SHARDS, corpus, manifest_of, recipe, root_of, train

DOCUMENT = 5
"""Tokens of each document of a hand-made corpus."""


def traced(run: RunDir, what: str) -> list[dict[str, Any]]:
    return trace(find_corpus(run.uri), what)


def places(passages: list[dict[str, Any]]) -> list[tuple[Any, Any, int]]:
    """(rank, slot, sample), each once."""
    return list(dict.fromkeys((p["rank"], p["slot"], p["sample"]) for p in passages))


def document_at(sample: int, token: int) -> str:
    """Which document a token of a hand-made corpus comes from, from how it was made."""
    shard, sequence = divmod(sample, SEQUENCES)
    each = -(-SEQUENCES * LENGTH // DOCUMENT)
    return f"{'ab'[shard // 2]}/d{shard * each + (sequence * LENGTH + token) // DOCUMENT}"


def test_a_step_is_told_by_rank_and_slot_and_every_token_has_its_document(run_anywhere: RunDir) -> None:
    run = run_anywhere
    train(run, recipe(root_of(run)), 1, 8, shares=(1, 3))
    found = traced(run, "5")
    order = schedule(manifest_of(run), recipe(root_of(run))).order
    assert places(found) == list(zip([0, 1, 1, 1], [0, 0, 1, 2], order.of_rank([5], 0, (1,)).tolist(), strict=True)), (
        "in the order of the batch, cut by the shares"
    )
    for sample in {passage["sample"] for passage in found}:
        mine = [passage for passage in found if passage["sample"] == sample]
        tokens = [(token, p["document"]) for p in mine for token in range(p["first"], p["last"] + 1)]
        assert tokens == [(token, document_at(sample, token)) for token in range(LENGTH)]
    for passage in found:
        assert (passage["step"], passage["attempt"], passage["excluded"]) == (5, 1, False)
        assert passage["source"] == passage["document"][0]
        assert passage["shard"] == f"shards/{passage['sample'] // SEQUENCES}.arrow"


def test_a_rank_and_a_slot_are_parts_of_the_step(run: RunDir) -> None:
    train(run, recipe(root_of(run), global_batch_size=7), 1, 8, shares=(2, 1, 2))
    whole = traced(run, "3")
    assert [(rank, slot) for rank, slot, _ in places(whole)] == [
        *[(0, slot) for slot in range(2)],
        *[(1, slot) for slot in range(2)],
        *[(2, slot) for slot in range(3)],
    ]
    for rank in range(3):
        part = [passage for passage in whole if passage["rank"] == rank]
        assert traced(run, f"3:{rank}") == part
        for slot in {passage["slot"] for passage in part}:
            assert traced(run, f"3:{rank}:{slot}") == [p for p in part if p["slot"] == slot]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("abc", "no number"),
        ("", "no number"),
        ("3:", "no number"),
        ("3.5", "no number"),
        ("0", "the run's steps go from 1 to 20"),
        ("-1", "the run's steps go from 1 to 20"),
        ("21", "the run's steps go from 1 to 20"),
        ("3:2", "the ranks of the step go from 0 to 1"),
        ("3:-1", "the ranks of the step go from 0 to 1"),
        ("3:1:2", "the slots of the rank go from 0 to 1"),
        ("3:1:-1", "the slots of the rank go from 0 to 1"),
        ("3:1:0:0", "too many parts"),
        ("15:0", "no attempt has come to step 15"),
        ("6", "step 6 is passed over"),
        ("18", "step 18 is passed over"),
    ],
)
def test_each_wrong_part_is_named(run: RunDir, what: str, said: str) -> None:
    train(run, recipe(root_of(run), skip_steps=[[6, 7], [18, 19]]), 1, 8)
    with pytest.raises(UserError) as refused:
        traced(run, what)
    assert f"--trace {what}" in refused.value.message
    assert said in refused.value.message
    if said in ("no number", "too many parts"):
        assert "STEP:RANK:SLOT" in refused.value.hint


def test_a_rank_without_sequences_is_said_to_have_none(run: RunDir) -> None:
    train(run, recipe(root_of(run), global_batch_size=1), 1, 2)
    with pytest.raises(UserError, match="rank 0 has no sequence in step 1"):
        traced(run, "1:0")
    assert [(rank, slot) for rank, slot, _ in places(traced(run, "1"))] == [(1, 0)]


def test_a_step_that_no_attempt_has_come_to_is_told_as_planned(run: RunDir) -> None:
    """By the recipe as it is now, not as the attempt before had it."""
    expected = schedule(manifest_of(run), recipe(root_of(run))).order
    found = traced(run, "15")
    assert {(passage["attempt"], passage["rank"]) for passage in found} == {(None, None)}
    assert [sample for _, _, sample in places(found)] == expected.step(15).tolist()
    train(run, recipe(root_of(run)), 1, 8)
    assert traced(run, "15") == found
    assert {passage["attempt"] for passage in traced(run, "8")} == {1}
    later = recipe(
        root_of(run),
        batch_ramp=[{"steps": 8, "sequences": 4}],
        global_batch_size=6,
        quarantine=[found[0]["document"]],
    )
    open_run(later, check=resume.check_past)
    after = traced(run, "15")
    assert {slot for _, slot, _ in places(after)} == set(range(6))
    for step in (8, 9, 15):
        for passage in traced(run, str(step)):
            assert passage["excluded"] == (step > 8 and passage["document"] == found[0]["document"])


def test_the_record_of_the_attempt_that_did_the_step_is_used(run: RunDir) -> None:
    root = root_of(run)
    first = recipe(root)
    train(run, first, 1, 8)
    quarantined = traced(run, "11")[0]["document"]
    later = {"batch_ramp": [{"steps": 8, "sequences": 4}], "global_batch_size": 6, "quarantine": [quarantined]}
    train(run, recipe(root, **later), 9, 12, shares=(1, 1, 1))
    before, after = traced(run, "8"), traced(run, "11")
    assert [(rank, slot) for rank, slot, _ in places(before)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(rank, slot) for rank, slot, _ in places(after)] == [(r, s) for r in range(3) for s in range(2)]
    assert ({p["attempt"] for p in before}, {p["attempt"] for p in after}) == ({1}, {2})
    assert not any(passage["excluded"] for passage in before)
    # Steps that an attempt did again are told as they were done the last time.
    train(run, recipe(root, **later), 10, 14, shares=(1,))
    assert {passage["attempt"] for passage in traced(run, "9")} == {2}
    assert {passage["attempt"] for passage in traced(run, "11")} == {3}
    assert {passage["rank"] for passage in traced(run, "11")} == {0}


def test_after_starting_over_only_the_new_attempts_tell(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 8)
    before = traced(run, "3")
    again = recipe(root_of(run), seed=1)
    resume.start_over(run, again)
    open_run(again, start_over=True)
    assert {passage["attempt"] for passage in traced(run, "3")} == {None}
    train(run, again, 1, 4)
    assert {passage["attempt"] for passage in traced(run, "3")} == {2}
    assert places(traced(run, "3")) != places(before)


def test_what_was_excluded_is_marked(run: RunDir) -> None:
    manifest, settings = manifest_of(run), recipe(root_of(run), global_batch_size=SHARDS * SEQUENCES)
    storage.delete(storage.join(run.corpus, "shards/2.arrow"))
    resume.lose(run, manifest, "shards/2.arrow", "is missing")
    train(run, settings.model_copy(update={"train": settings.train.model_copy(update={"quarantine": ("a/d3",)})}), 1, 4)
    whole = traced(run, "2")
    assert len({passage["sample"] for passage in whole}) == SHARDS * SEQUENCES
    for passage in whole:
        assert passage["excluded"] == (passage["document"] == "a/d3" or passage["shard"] == "shards/2.arrow")
    assert sum(p["last"] - p["first"] + 1 for p in whole if p["excluded"]) == DOCUMENT + SEQUENCES * LENGTH
    marked = [corpora.passage_line(passage).endswith("(excluded)") for passage in whole]
    assert marked == [passage["excluded"] for passage in whole]


def test_a_corpus_that_has_changed_since_tells_nothing_wrong(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 8)
    save_manifest(replace(manifest_of(run), hash="corpus-2"), run.corpus)
    with pytest.raises(UserError, match="the corpus has changed since"):
        traced(run, "3")


def test_a_bare_corpus_is_traced_by_sample(tmp_path: Path) -> None:
    uri = str(tmp_path)
    save_manifest(corpus(uri), uri)
    found = trace(find_corpus(uri), "13")
    assert [(p["first"], p["last"], p["document"]) for p in found] == [
        (0, 1, document_at(13, 0)),
        (2, 6, document_at(13, 2)),
        (7, 7, document_at(13, 7)),
    ]
    assert all("rank" not in passage and "excluded" not in passage for passage in found)
    for what, said in (("48", "samples go from 0 to 47"), ("-1", "samples go from 0"), ("3:0", "a corpus has samples")):
        with pytest.raises(UserError, match=said):
            trace(find_corpus(uri), what)


def test_a_large_step_is_told_in_no_time(run: RunDir) -> None:
    """1024 sequences out of 64 shards of 2000 documents each. Asked: 100 ms."""
    shards, documents, tokens, length = 64, 2000, 21, 64
    names = [f"a/file.jsonl#{number:07d}" for number in range(documents)]
    sequences = documents * tokens // length
    packed = Packed(np.zeros(sequences * length, np.uint32), [(tokens, name) for name in names])
    packed, _ = packed.split_at(sequences * length)
    written = [write_shard(run.corpus, f"shards/large-{n}.arrow", packed, length, 300) for n in range(shards)]
    split = {"sequences": shards * sequences, "tokens": 0, "shards": [asdict(shard) for shard in written]}
    save_manifest(
        replace(manifest_of(run), sequence_length=length, splits={"train": split, "held_out": split}), run.corpus
    )
    settings = recipe(root_of(run), sequence_length=length, global_batch_size=1024)
    train(run, settings, 1, 8, shares=(1,) * 64)
    found = find_corpus(run.uri)
    passages = trace(found, "3")
    assert len(places(passages)) == 1024
    assert len({passage["shard"] for passage in passages}) > 32
    times = []
    for step in range(1, 8):
        before = time.thread_time(), time.process_time()
        trace(found, str(step))
        times.append((time.thread_time() - before[0], time.process_time() - before[1]))
    thread, process = (sorted(values)[len(values) // 2] for values in zip(*times, strict=True))
    print(f"\n{len(passages)} passages: {thread * 1e3:.0f} ms of this thread, {process * 1e3:.0f} ms of all")
    assert thread < 0.1
    assert json.dumps(passages)
