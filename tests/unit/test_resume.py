"""What a run goes on from, on run directories made by hand: no Ray, no torch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import resume, storage
from orchestrator.config import Recipe
from orchestrator.data import inspection, shards
from orchestrator.data.encoding import end_of_document
from orchestrator.data.exclusions import Exclusions, Run
from orchestrator.data.manifest import Manifest, save_manifest, schedule
from orchestrator.data.schedule import Schedule
from orchestrator.errors import StorageError, UserError
from orchestrator.runs import RunDir, open_run
from orchestrator.train import checkpoints
from tests.made_runs import SEQUENCES, SHARDS, damage, manifest_of, recipe, root_of, run_at, train


def refusal(run: RunDir, settings: Recipe) -> UserError:
    with pytest.raises(UserError) as refused:
        resume.check_past(run, settings)
    assert refused.value.exit_code == 2
    assert "step 8" in refused.value.message
    assert "--start-over" in refused.value.hint
    return refused.value


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a shard counts as lost, it is tried again; a test need not wait for that."""
    monkeypatch.setattr(shards, "PAUSE_S", 0.0)


# --- the past ---------------------------------------------------------------------------------------------------------

MIXED = ({"weights": {"a": 0.75, "b": 0.25}},)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"train\.seed was 0, is 1"),
        ({"global_batch_size": 6}, r"train\.global_batch_size.* was \[\[8, 4\]\], is \[\[8, 6\]\]"),
        ({"batch_ramp": [{"steps": 3, "sequences": 2}]}, r"train\.global_batch_size.* is \[\[3, 2\], \[5, 4\]\]"),
        ({"corpus_mixture": [{"weights": {"a": 1}}]}, r"corpus\.mixture.* was .*7500, 2500.*, is .*10000, 0"),
        ({"corpus_mixture": [{"weights": {"a": 3, "b": 1}, "tokens": 40}, {"weights": {"b": 1}}]}, r"corpus\.mixture"),
        ({"skip_steps": [[8, 9]]}, r"train\.skip_steps was \[\], is \[\[8, 8\]\]"),
    ],
    ids=["seed", "batch", "ramp", "mixture", "mixture-stage", "skip"],
)
def test_a_past_that_would_change_is_refused_by_name(
    tmp_path: Path, tokenizer: Path, changed: dict[str, Any], named: str
) -> None:
    run = run_at(str(tmp_path), tokenizer, corpus_mixture=MIXED)
    train(run, recipe(str(tmp_path), corpus_mixture=MIXED), 1, 8)
    refused = refusal(run, recipe(str(tmp_path), **{"corpus_mixture": MIXED, **changed}))
    assert re.search(named, refused.message), refused.message
    assert refused.message.count(" was ") == 1, "what did not change is not named"


def test_steps_that_were_passed_over_stay_so(run: RunDir) -> None:
    train(run, recipe(root_of(run), skip_steps=[[2, 3]]), 1, 8)
    assert "train.skip_steps was [[2, 3]], is []" in refusal(run, recipe(root_of(run))).message
    resume.check_past(run, recipe(root_of(run), skip_steps=[[3, 3], [2, 2], [9, 12]]))


def test_another_corpus_is_refused(run_anywhere: RunDir) -> None:
    train(run_anywhere, recipe(root_of(run_anywhere)), 1, 8)
    save_manifest(replace(manifest_of(run_anywhere), hash="corpus-2"), run_anywhere.corpus)
    refused = refusal(run_anywhere, recipe(root_of(run_anywhere)))
    assert "the corpus was corpus-1, is corpus-2" in refused.message


def test_a_mixture_where_there_was_none_is_refused(run: RunDir) -> None:
    """Without one the sources are packed together, so that none of them can be drawn from."""
    manifest = manifest_of(run)
    together = [{**shard, "source": ""} for shard in manifest.splits["train"]["shards"]]
    splits = {**manifest.splits, "train": {**manifest.splits["train"], "shards": together}}
    save_manifest(replace(manifest, splits=splits), run.corpus)
    resume.check_past(run, recipe(root_of(run)))
    train(run, recipe(root_of(run)), 1, 8)
    refused = refusal(run, recipe(root_of(run), corpus_mixture=MIXED))
    assert "packed without corpus.mixture" in refused.message


def test_a_mixture_that_is_taken_away_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    run = run_at(str(tmp_path), tokenizer, corpus_mixture=MIXED)
    train(run, recipe(str(tmp_path), corpus_mixture=MIXED), 1, 8)
    refused = refusal(run, recipe(str(tmp_path)))
    assert "corpus.mixture" in refused.message
    assert "corpus.mixture" not in refused.hint, "no line would help"


def test_when_nothing_is_to_come_no_lines_are_given_for_it(run: RunDir) -> None:
    train(run, recipe(root_of(run), steps=8), 1, 8)
    assert "batch_ramp" not in refusal(run, recipe(root_of(run), steps=8, global_batch_size=6)).hint


def test_before_the_first_checkpoint_anything_goes(run: RunDir) -> None:
    resume.check_past(run, recipe(root_of(run), seed=5, global_batch_size=7))
    storage.delete(run.corpus_manifest)
    resume.check_past(run, recipe(root_of(run), seed=5))


def test_a_commit_that_cannot_be_read_stops_nothing(run: RunDir) -> None:
    """It is set aside when training resumes; what the one before holds is held to meanwhile."""
    train(run, recipe(root_of(run)), 1, 8)
    train(run, recipe(root_of(run)), 9, 12)
    storage.write(checkpoints.marker(run.checkpoints, 12, attempt=2), b'{"for')
    resume.check_past(run, recipe(root_of(run)))
    refusal(run, recipe(root_of(run), global_batch_size=5))
    found = resume.resume_point(run)
    assert found is not None
    assert found.step == 8


def test_the_lines_of_the_hint_are_a_recipe_that_is_accepted(tmp_path: Path, tokenizer: Path) -> None:
    """Copied as they stand, with what is to come after them."""
    before = {
        "corpus_mixture": [{"weights": {"a": 0.29, "b": 0.71}, "tokens": 80}, *MIXED],
        "batch_ramp": [{"steps": 3, "sequences": 2}],
    }
    run = run_at(str(tmp_path), tokenizer, **before)
    train(run, recipe(str(tmp_path), **before), 1, 8)
    wanted: dict[str, Any] = {"global_batch_size": 7, "corpus_mixture": [{"weights": {"b": 1}}]}
    refused = refusal(run, recipe(str(tmp_path), **wanted))
    ramp, mixture = (
        yaml.safe_load(re.search(rf"{key}: (\[.*?\])(?= |,|;|$)", refused.hint)[1])  # type: ignore[index]
        for key in (r"train\.batch_ramp", r"corpus\.mixture")
    )
    assert ramp == [{"steps": 3, "sequences": 2}, {"steps": 5, "sequences": 4}]
    followed = recipe(
        str(tmp_path), batch_ramp=ramp, global_batch_size=7, corpus_mixture=[*mixture, {"weights": {"b": 1}}]
    )
    resume.check_past(run, followed)
    order = schedule(manifest_of(run), followed).order
    assert (order.batch_size(8), order.batch_size(9)) == (4, 7)
    assert {int(sample) // (SEQUENCES * 2) for sample in order.step(9)} == {1}, "only source b from step 9 on"


def test_the_hint_gives_only_the_lines_of_what_changed(tmp_path: Path, tokenizer: Path) -> None:
    run = run_at(str(tmp_path), tokenizer, corpus_mixture=MIXED)
    train(run, recipe(str(tmp_path), corpus_mixture=MIXED), 1, 8)
    said = {
        name: refusal(run, recipe(str(tmp_path), **{"corpus_mixture": MIXED, **changed})).hint
        for name, changed in {
            "seed": {"seed": 1},
            "batch": {"global_batch_size": 6},
            "mixture": {"corpus_mixture": [{"weights": {"a": 1}}]},
        }.items()
    }
    assert {name for name, hint in said.items() if "train.batch_ramp" in hint} == {"batch"}
    assert {name for name, hint in said.items() if "corpus.mixture" in hint} == {"mixture"}


def test_what_only_comes_may_change_and_is_recorded(run_anywhere: RunDir) -> None:
    run, root = run_anywhere, root_of(run_anywhere)
    train(run, recipe(root), 1, 8)
    later = recipe(
        root,
        batch_ramp=[{"steps": 8, "sequences": 4}, {"steps": 2, "sequences": 6}],
        global_batch_size=8,
        skip_steps=[[10, 11]],
        workers=3,
    )
    resume.check_past(run, later)
    open_run(later)
    train(run, later, 9, 14, shares=(1, 1, 1))
    (event,) = [event for event in run.events() if event["event"] == "schedule_changed"]
    assert (event["attempt"], event["from_step"], event["changed"]) == (
        2,
        9,
        ["train.global_batch_size", "train.skip_steps"],
    )
    record = run.read_json(run.schedule(2))
    assert (record["from_step"], record["shares"]) == (9, [1, 1, 1])
    assert Schedule.from_json(record) == schedule(manifest_of(run), later)


def test_the_same_schedule_again_is_no_event(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 8)
    train(run, recipe(root_of(run), workers=1), 9, 12, shares=(1,))
    assert not [event for event in run.events() if event["event"] == "schedule_changed"]


# --- learning rates ---------------------------------------------------------------------------------------------------

STABLE = {"schedule": "wsd", "decay_steps": 4}
"""Of 20 steps: the rates fall after step 16."""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (STABLE, {**STABLE, "steps": 40}),
        (STABLE, {**STABLE, "final_lr_share": 0.0}),
        (STABLE, {"schedule": "wsd", "decay_steps": 12}),
        ({"schedule": "constant"}, {**STABLE, "steps": 15}),
    ],
)
def test_rates_of_steps_to_come_may_change(run: RunDir, before: dict[str, Any], after: dict[str, Any]) -> None:
    train(run, recipe(root_of(run), **before), 1, 8)
    resume.check_past(run, recipe(root_of(run), **after))
    open_run(recipe(root_of(run), **after))


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({}, {"steps": 40}, "train.steps"),
        ({}, {"schedule": "wsd"}, "train.schedule"),
        (STABLE, {"schedule": "wsd", "decay_steps": 13}, "train.decay_steps"),
        (STABLE, {"schedule": "wsd", "decay_steps": 4, "steps": 9}, "train.steps"),
        ({"schedule": "cosine"}, {"schedule": "cosine", "final_lr_share": 0.2}, "train.final_lr_share"),
    ],
)
def test_rates_of_steps_that_are_done_may_not(
    run: RunDir, before: dict[str, Any], after: dict[str, Any], named: str
) -> None:
    train(run, recipe(root_of(run), **before), 1, 8)
    refused = refusal(run, recipe(root_of(run), **after))
    assert f"with another {named} the learning rates of its steps would change" in refused.message


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_a_quarantined_document_is_found_across_the_borders_of_sequences(run_anywhere: RunDir) -> None:
    """Documents of 5 tokens in sequences of 8: d1 of shard 0 is tokens 5 to 9, in the samples 0 and 1."""
    run, root = run_anywhere, root_of(run_anywhere)
    chosen = resume.data_schedule(run, recipe(root, quarantine=["a/d1", "b/d40"]), manifest_of(run))
    found = chosen.exclusions.quarantined
    assert found["a/d1"] == (Run(0, 5, 7), Run(1, 0, 1))
    assert found["b/d40"] == (Run(2 * SEQUENCES, 0, 4),), "the third shard begins with it"
    assert chosen.exclusions.filler == end_of_document(run.tokenizer)


def test_what_quarantine_takes_is_what_the_trace_says_of_the_document(run: RunDir) -> None:
    """Two ways to the same: from the document to its tokens, and from the samples to their documents."""
    wanted = [f"a/d{number}" for number in random.Random(0).sample(range(40), 12)]
    manifest = manifest_of(run)
    chosen = resume.data_schedule(run, recipe(root_of(run), quarantine=wanted), manifest)
    traced = inspection.trace(run.corpus, manifest, [*range(SHARDS * SEQUENCES)])
    expected = [(p.document, Run(p.sample, p.first, p.last)) for found in traced for p in found if p.document in wanted]
    found = [(document, place) for document, runs in chosen.exclusions.quarantined.items() for place in runs]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_document_that_is_not_in_training_is_refused(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"train\.quarantine: 'a/d999' is no training document") as refused:
        resume.data_schedule(run, recipe(root_of(run), quarantine=["a/d1", "a/d999"]), manifest_of(run))
    assert "--trace" in refused.value.hint


def test_documents_that_were_found_before_are_not_looked_for_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking reads every sidecar of the corpus."""
    train(run, recipe(root_of(run), quarantine=["a/d1"]), 1, 8)
    asked: list[list[str]] = []
    look = inspection.occurrences

    def looking(
        uri: str, manifest: Manifest, documents: Sequence[str], lost: Set[str]
    ) -> dict[str, list[tuple[int, int, int]]]:
        asked.append(list(documents))
        return look(uri, manifest, documents, lost)

    monkeypatch.setattr(inspection, "occurrences", looking)
    again = resume.data_schedule(run, recipe(root_of(run), quarantine=["a/d1"]), manifest_of(run))
    more = resume.data_schedule(run, recipe(root_of(run), quarantine=["a/d3", "a/d1"]), manifest_of(run))
    assert asked == [["a/d3"]]
    assert list(more.exclusions.quarantined) == ["a/d3", "a/d1"]
    assert again.exclusions.quarantined["a/d1"] == more.exclusions.quarantined["a/d1"]
    assert not resume.data_schedule(run, recipe(root_of(run)), manifest_of(run)).exclusions, "and back again"
    other = replace(manifest_of(run), hash="another")
    resume.data_schedule(run, recipe(root_of(run), quarantine=["a/d1"]), other)
    assert asked == [["a/d3"], ["a/d1"]], "places in another corpus are other places"


def test_a_plain_recipe_excludes_nothing(run: RunDir) -> None:
    storage.delete(run.tokenizer)  # and asks for nothing
    assert resume.data_schedule(run, recipe(root_of(run)), manifest_of(run)).exclusions == Exclusions()


# --- lost shards ------------------------------------------------------------------------------------------------------


def test_with_a_lost_shard_the_others_that_are_missing_are_found(run_anywhere: RunDir) -> None:
    """One restart for all of them, not one each. A shard that is there and whole for all a listing says stays."""
    run, manifest = run_anywhere, manifest_of(run_anywhere)
    names = [shard.name for shard in manifest.shards("train")]
    storage.delete(storage.join(run.corpus, names[0]))
    storage.write(storage.join(run.corpus, names[3]), b"short")
    found = resume.lose(run, manifest, names[1], "shard 1 is damaged: its hash")
    facts = {shard.name: (shard.first, shard.samples, shard.reason) for shard in found}
    assert facts == {
        names[0]: (0, SEQUENCES, "is missing"),
        names[1]: (SEQUENCES, SEQUENCES, "shard 1 is damaged: its hash"),
        names[3]: (3 * SEQUENCES, SEQUENCES, "has another size"),
    }
    assert resume.lost_shards(run) == found
    assert resume.lose(run, manifest, names[1], "again") == found, "what is known stays as it was first told"
    chosen = resume.data_schedule(run, recipe(root_of(run)), manifest)
    assert chosen.exclusions.lost == tuple(found)
    assert chosen.exclusions.filler == end_of_document(run.tokenizer)


def test_a_shard_that_is_whole_again_is_taken_back(run_anywhere: RunDir) -> None:
    run, manifest = run_anywhere, manifest_of(run_anywhere)
    names = [shard.name for shard in manifest.shards("train")]
    kept = {name: storage.read(storage.join(run.corpus, name)) for name in names[:2]}
    for name in kept:
        storage.delete(storage.join(run.corpus, name))
    resume.lose(run, manifest, names[0], "is missing")
    assert [shard.name for shard in resume.lost_shards(run)] == names[:2]
    resume.take_back(run, manifest)
    assert [shard.name for shard in resume.lost_shards(run)] == names[:2], "nothing has come back"
    storage.write(storage.join(run.corpus, names[0]), kept[names[0]])
    resume.take_back(run, manifest)
    assert [shard.name for shard in resume.lost_shards(run)] == names[1:2]
    storage.write(storage.join(run.corpus, names[1]), kept[names[1]])
    resume.take_back(run, manifest)
    assert resume.lost_shards(run) == []
    restored = [event["shard"] for event in run.events() if event["event"] == "shard_restored"]
    assert restored == names[:2]
    assert not resume.data_schedule(run, recipe(root_of(run)), manifest).exclusions


def test_a_shard_that_is_back_but_damaged_stays_lost(run: RunDir) -> None:
    manifest = manifest_of(run)
    name = manifest.shards("train")[2].name
    whole = damage(run, name)
    resume.lose(run, manifest, name, "is damaged")
    resume.take_back(run, manifest)
    assert [shard.name for shard in resume.lost_shards(run)] == [name]
    Path(run.corpus, name).write_bytes(whole)
    resume.take_back(run, manifest)
    assert resume.lost_shards(run) == []


def test_more_lost_shards_than_allowed_are_gone_on_without_by_no_command(run: RunDir) -> None:
    """The run stopped for the shard; typing the same command again is no leave to do without it."""
    manifest = manifest_of(run)
    for shard in manifest.shards("train")[:2]:
        damage(run, shard.name)
        resume.lose(run, manifest, shard.name, "is damaged")
    for allowed in (0, 1):
        with pytest.raises(UserError, match=r"shards/0\.arrow is damaged; shards/1\.arrow is damaged") as refused:
            resume.check_lost_shards(run, recipe(root_of(run), max_lost_shards=allowed))
        assert "train.max_lost_shards=2" in refused.value.hint
        assert refused.value.exit_code == 1
    resume.check_lost_shards(run, recipe(root_of(run), max_lost_shards=2))


# --- starting over ----------------------------------------------------------------------------------------------------


def test_starting_over_sets_aside_what_was_trained(run_anywhere: RunDir) -> None:
    run, root = run_anywhere, root_of(run_anywhere)
    train(run, recipe(root), 1, 4)
    train(run, recipe(root), 5, 8)
    run.write_json(run.evaluation(8), {"perplexity": 7})
    run.write_json(run.answers, {"answers": []})
    run.write_json(run.model_manifest, {"step": 8})
    run.write_json(run.lost_shards, [])
    another = recipe(root, seed=1, global_batch_size=6, lr=0.2)
    with pytest.raises(UserError, match=r"train\.seed") as refused:
        open_run(another)
    assert "--start-over" in refused.value.hint
    open_run(another, start_over=True)
    for _ in range(2):  # the second time finds nothing more to do
        resume.start_over(run, another)
        assert checkpoints.committed_steps(run.checkpoints) == []
        assert resume.resume_point(run) is None
        resume.check_past(run, another)
        for uri in (run.evaluation(8), run.answers, run.model_manifest, run.lost_shards):
            assert not storage.exists(uri)
        assert run.read_json(run.path("set-aside", "002", "evaluation", "step-00000008.json")) == {"perplexity": 7}
        assert run.read_json(run.path("set-aside", "002", "serving", "answers.json")) == {"answers": []}
        assert run.loss_curve() == {}
        assert (run.attempts(), run.current_attempts()) == ([1, 2], [])
        assert run.last_schedule() is None
    assert storage.exists(run.path("checkpoints", "step-00000008", "attempt-002", "__0_0.distcp")), "nothing is deleted"
    assert len(run.metric_lines()) == 8
    assert train(run, another, 1, 3) == 3
    assert {step: line["attempt"] for step, line in run.loss_curve().items()} == {1: 3, 2: 3, 3: 3}
    assert run.current_attempts() == [3]
    assert not [event for event in run.events() if event["event"] == "schedule_changed"], "nothing is compared with"
    resume.start_over(run, another)
    assert run.loss_curve() == {}
    assert train(run, another, 1, 2) == 4


def test_a_run_that_has_trained_nothing_can_be_started_over(run: RunDir) -> None:
    resume.start_over(run, recipe(root_of(run)))
    assert train(run, recipe(root_of(run)), 1, 4) == 1
    assert sorted(run.loss_curve()) == [1, 2, 3, 4]


@pytest.mark.parametrize("operation", range(1, 6))
def test_starting_over_holds_from_its_first_write_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """Killed before any later write or deletion, it is finished by the next command, and nothing of before counts."""
    train(run, recipe(root_of(run)), 1, 4)
    train(run, recipe(root_of(run)), 5, 8)
    run.write_json(run.evaluation(8), {"perplexity": 7})
    run.write_json(run.model_manifest, {"step": 8})
    calls: list[str] = []

    def breaking(call: Callable[..., None]) -> Callable[..., None]:
        def broken(uri: str, *rest: bytes) -> None:
            calls.append(uri)
            if len(calls) == operation + 1:
                raise KeyboardInterrupt
            call(uri, *rest)

        return broken

    with monkeypatch.context() as patched:
        for name in ("write", "delete"):
            patched.setattr(storage, name, breaking(getattr(storage, name)))
        with pytest.raises(KeyboardInterrupt):
            resume.start_over(run, recipe(root_of(run)))
    assert checkpoints.committed_steps(run.checkpoints) == []
    assert resume.resume_point(run) is None
    assert run.loss_curve() == {}
    resume.finish_start_over(run)
    assert checkpoints.committed_steps(run.checkpoints) == []
    assert not storage.exists(run.model_manifest)
    assert run.read_json(run.path("set-aside", "002", "evaluation", "step-00000008.json")) == {"perplexity": 7}


def test_an_attempt_from_before_the_start_over_commits_nothing(run: RunDir) -> None:
    """It may run on for a while: on a cluster workers outlive their driver."""
    settings = recipe(root_of(run))
    train(run, settings, 1, 4)
    late = checkpoints.read_commit(run.checkpoints, 4)
    resume.start_over(run, settings)
    with pytest.raises(StorageError, match="has been replaced"):
        checkpoints.publish(run.checkpoints, late)
    # It had looked before the start-over, and creates its marker after it.
    storage.create(checkpoints.marker(run.checkpoints, 4, attempt=1), checkpoints.sealed(late))
    assert checkpoints.committed_steps(run.checkpoints) == []
    checkpoints.publish(run.checkpoints, replace(late, attempt=2))
    assert checkpoints.committed_steps(run.checkpoints) == [4]


def test_a_start_over_that_does_not_go_with_the_corpus_sets_nothing_aside(run: RunDir) -> None:
    train(run, recipe(root_of(run)), 1, 4)
    with pytest.raises(UserError, match="no training document"):
        resume.start_over(run, recipe(root_of(run), quarantine=["nope"]))
    assert checkpoints.committed_steps(run.checkpoints) == [4]


def test_a_step_that_was_set_aside_can_be_committed_and_set_aside_again(run: RunDir) -> None:
    settings = recipe(root_of(run))
    for attempt in (1, 2, 3):
        assert train(run, settings, 1, 4) == attempt
        found = resume.resume_point(run)
        assert found is not None
        assert found.attempt == attempt
        resume.start_over(run, settings)


def test_status_and_report_count_only_what_came_after(run: RunDir) -> None:
    from orchestrator import report, report_content, status

    train(run, recipe(root_of(run)), 1, 8)
    resume.start_over(run, recipe(root_of(run)))
    assert status.summarize(run)["step"] == 0
    train(run, recipe(root_of(run)), 1, 4)
    summary = status.summarize(run)
    assert summary["step"] == 4
    assert [row["steps_repeated"] for row in summary["attempts"]] == [0, 0], "begun anew is not repeated"
    assert [line["step"] for line in report_content.load(run).counted] == [1, 2, 3, 4]
    report.write_report(run)


def test_a_step_that_is_passed_over_when_it_is_done_again_does_not_count(run: RunDir) -> None:
    """An attempt did steps 5 to 8 and was lost before it could commit them."""
    train(run, recipe(root_of(run)), 1, 8)
    storage.delete(checkpoints.step_directory(run.checkpoints, 8))
    train(run, recipe(root_of(run), skip_steps=[[6, 7], [9, 9]]), 5, 10)
    assert sorted(run.loss_curve()) == [1, 2, 3, 4, 5, 8, 10]
    assert {line["attempt"] for step, line in run.loss_curve().items() if step > 4} == {2}


# --- a recipe that is refused -----------------------------------------------------------------------------------------


def test_a_recipe_that_is_refused_leaves_no_trace(run: RunDir) -> None:
    """`resolved.json` is what later commands take the run for."""
    train(run, recipe(root_of(run)), 1, 8)
    before = storage.read(run.resolved)
    changed = recipe(root_of(run), global_batch_size=6)
    with pytest.raises(UserError, match="global_batch_size"):
        open_run(changed, "changed", check=resume.check_past)
    assert storage.read(run.resolved) == before
    assert not storage.exists(run.path("recipe.yaml"))
    open_run(changed, "changed", start_over=True, check=resume.start_over)
    assert run.recipe() == changed


def test_the_report_names_what_training_did_otherwise(run: RunDir) -> None:

    from orchestrator import report

    ramp = [{"steps": 4, "sequences": 3}]
    settings = recipe(root_of(run), skip_steps=[[6, 7]], quarantine=["a/d1"], batch_ramp=ramp)
    open_run(settings)
    train(run, settings, 1, 8)
    report.write_report(run)
    page = storage.read(run.report_markdown).decode()
    assert all(text in page for text in ("3 for 4 steps", "6 to 7", "a/d1"))
