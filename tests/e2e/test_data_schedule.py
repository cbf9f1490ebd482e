"""The data schedule of a run, with real training: what every step sees stays exact, whatever happens to the run."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.manifest import load_manifest
from orchestrator.runs import RunDir, find_run
from orchestrator.train.checkpoints import committed_steps, read_commit
from tests.e2e.conftest import terrane

STEPS = 16
KILLED_AT = (6, 7)
COMMITTED = 4
"""The last checkpoint before."""
RAMP = "train.batch_ramp: [{steps: 4, sequences: 6}]"
RECIPE = """
name: small
corpus:
  sources: [{{name: first, path: {folder}/first.jsonl}}, {{name: second, path: {folder}/second.jsonl}}]
  near_duplicates: null
  held_out: 0.05
  quality: {{min_characters: 10, min_prose_share: null, max_duplicate_line_share: null, max_top_ngram_share: null}}
tokenizer: {{vocab_size: 400}}
model: {{layers: 2, hidden_size: 32, heads: 2}}
train:
  sequence_length: 32
  global_batch_size: 6
  steps: 16
  lr: 1.0e-3
  checkpoint_every: 4
  keep_checkpoints: 10
  workers: 2
  cpus_per_worker: 0.5
  max_restarts: 0
evaluation: {{held_out_sequences: 8}}
"""


def launch(recipe: Path, root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return terrane("run", str(recipe), f"storage={root}", "--stage", "train", *arguments, check=check)


def losses(run: RunDir) -> dict[int, float]:
    return {step: line["loss"] for step, line in sorted(run.loss_curve().items())}


def trace(run: RunDir, what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(terrane("corpus", run.uri, "--trace", what, "--json").stdout)
    return found


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def copy_of(run: RunDir, root: Path) -> RunDir:
    """The same run elsewhere, to go on from in another way."""
    shutil.copytree(run.uri, root / "small")
    return RunDir(str(root / "small"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file, beside 400 short documents in two sources: each source gives a shard of its own."""
    folder, rng = tmp_path_factory.mktemp("recipe"), random.Random(0)
    words = [begin + end for begin in "ca to ri mel sor ban lu pre".split() for end in "n der ment sis tal".split()]
    for source in ("first", "second"):
        texts = [" ".join(rng.choices(words, k=rng.randint(10, 40))) for _ in range(200)]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in texts))
    (folder / "small.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def corpus(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    terrane("run", str(recipe), f"storage={root}", "--stage", "corpus")
    return root / "small" / "corpus"


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(corpus, root / "small" / "corpus")
    launch(recipe, root)
    return find_run(str(root / "small"))


@pytest.fixture(scope="module")
def killed(recipe: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that lost a worker, went on from its first checkpoint, lost one again and was given up."""
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(corpus, root / "small" / "corpus")
    faults = ", ".join(f"{{kind: kill_rank, rank: 1, step: {step}}}" for step in KILLED_AT)
    done = launch(recipe, root, f"faults=[{faults}]", check=False)
    assert done.returncode == 1, done.stderr
    assert "1 attempts in a row without a new checkpoint (train.max_restarts)" in done.stderr
    run = find_run(str(root / "small"))
    assert committed_steps(run.checkpoints) == [COMMITTED]
    return run


@dataclass(frozen=True)
class Damaged:
    run: RunDir
    shard: str
    stopped: subprocess.CompletedProcess[str]
    """What a command that met the shard said."""


@pytest.fixture(scope="module")
def damaged(recipe: Path, killed: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """The killed run gone on with, after one shard of its corpus was damaged on disk."""
    run = copy_of(killed, tmp_path_factory.mktemp("damaged"))
    manifest = load_manifest(run.corpus)
    assert manifest is not None
    name = manifest.shards("train")[-1].name
    data = bytearray(Path(run.corpus, name).read_bytes())
    data[len(data) // 2] ^= 1
    Path(run.corpus, name).write_bytes(data)
    return Damaged(run, name, launch(recipe, Path(run.uri).parent, "train.workers=1", check=False))


def test_the_loss_curve_of_a_killed_run_is_bitwise_the_undisturbed_one(undisturbed: RunDir, killed: RunDir) -> None:
    lines = killed.metric_lines()
    attempts = {number: [line["step"] for line in lines if line["attempt"] == number] for number in (1, 2)}
    assert attempts == {1: [*range(1, KILLED_AT[0] + 1)], 2: [*range(COMMITTED + 1, KILLED_AT[1] + 1)]}
    assert all(line["loss"] == losses(undisturbed)[line["step"]] for line in lines)
    assert events(killed, "schedule_changed") == []


def test_a_damaged_checkpoint_is_found_by_its_readers_and_the_one_before_is_used(
    recipe: Path, undisturbed: RunDir, tmp_path: Path
) -> None:
    run = copy_of(undisturbed, tmp_path)
    shutil.rmtree(run.checkpoint(STEPS))
    newest = STEPS - COMMITTED
    fragments = Path(run.checkpoint(newest), "attempt-001", "__1_0.distcp")
    content = bytearray(fragments.read_bytes())
    content[len(content) // 2] ^= 1
    fragments.write_bytes(content)
    done = launch(recipe, tmp_path)
    assert f"checkpoint of step {newest} set aside: {fragments} is damaged between bytes" in done.stderr
    assert [event["outcome"] for event in events(run, "attempt_ended")] == [
        "finished",
        "checkpoint_damaged",
        "finished",
    ]
    assert [event["resume_step"] for event in events(run, "attempt_started")] == [0, newest, newest - COMMITTED]
    assert committed_steps(run.checkpoints) == [4, 8, 12, 16]
    assert losses(run) == losses(undisturbed)


def test_with_another_number_of_workers_only_the_rounding_differs(
    recipe: Path, undisturbed: RunDir, killed: RunDir, tmp_path: Path
) -> None:
    run = copy_of(killed, tmp_path)
    launch(recipe, tmp_path, "train.workers=3")
    assert [len(run.read_json(run.schedule(attempt))["shares"]) for attempt in run.attempts()] == [2, 2, 3]
    assert events(run, "schedule_changed") == [], "who takes what of a step is no part of what the step sees"
    found, expected = losses(run), losses(undisturbed)
    assert sorted(found) == sorted(expected) == [*range(1, STEPS + 1)]
    print("\nstep  3 workers from step 5  2 workers")
    for step, loss in expected.items():
        print(f"{step:4}  {found[step]:<22.15g}  {loss:.15g}")
        assert found[step] == pytest.approx(loss, rel=1e-5)
    whole = trace(run, "10")
    assert {(passage["rank"], passage["slot"]) for passage in whole} == {(r, s) for r in range(3) for s in range(2)}
    one, other = (
        [(passage["sample"], passage["first"], passage["last"], passage["document"]) for passage in found]
        for found in (whole, trace(undisturbed, "10"))
    )
    assert one == other, "a step sees the same documents in the same order"


def test_a_shard_that_was_damaged_stops_the_run(recipe: Path, damaged: Damaged) -> None:
    """The second command knows it from the first, and may still not go on without the shard."""
    attempts = damaged.run.attempts()
    again = launch(recipe, Path(damaged.run.uri).parent, "train.workers=1", check=False)
    for stopped in (damaged.stopped, again):
        assert stopped.returncode == 1, stopped.stderr
        assert damaged.shard in stopped.stderr
        assert "(train.max_lost_shards=1)" in stopped.stderr
        assert f"the state of step {COMMITTED} is committed" in stopped.stderr
    assert committed_steps(damaged.run.checkpoints) == [COMMITTED]
    assert damaged.run.attempts() == attempts


def test_another_batch_size_in_mid_run_is_refused_with_the_line_that_helps(recipe: Path, killed: RunDir) -> None:
    refused = launch(recipe, Path(killed.uri).parent, "train.global_batch_size=9", check=False)
    assert refused.returncode == 2, refused.stderr
    assert "ray: starting" not in refused.stderr
    assert "train.global_batch_size" in refused.stderr
    assert "corpus.mixture" not in refused.stderr
    assert RAMP in refused.stderr
    assert killed.recipe().train.global_batch_size == 6, "what was refused leaves no trace"


def test_what_comes_can_be_changed_and_what_was_stays(recipe: Path, killed: RunDir, damaged: Damaged) -> None:
    """All at once: a larger batch as the hint says, steps passed over, a document and a shard left out."""
    run, name = damaged.run, damaged.shard
    # With batches of 9 from step 5 on, step 10 begins at sample 69, and what was step 13 falls into it.
    document = next(p["document"] for p in trace(run, "13") if p["shard"] != name)
    done = launch(
        recipe,
        Path(run.uri).parent,
        "train.workers=1",
        "train.max_lost_shards=1",
        "train.global_batch_size=9",
        RAMP.replace(": ", "=", 1),
        "train.skip_steps=[[7,8],[16,16]]",
        f"train.quarantine=['{document}']",
    )
    assert f"data schedule changed from step {COMMITTED + 1} on: lost shards, train.global_batch_size" in done.stderr
    assert [event["shards"] for event in events(run, "shard_lost")] == [[name]]
    (change,) = events(run, "schedule_changed")
    assert change["changed"] == ["lost shards", "train.global_batch_size", "train.quarantine", "train.skip_steps"]
    recorded = run.read_json(run.schedule(run.attempts()[-1]))["exclusions"]
    assert [shard["name"] for shard in recorded["lost"]] == [name]
    assert list(recorded["quarantined"]) == [document]

    assert sorted(losses(run)) == [step for step in range(1, STEPS + 1) if step not in (7, 8, 16)]
    assert all(losses(run)[step] == losses(killed)[step] for step in range(1, COMMITTED + 1))
    assert run.loss_curve()[COMMITTED + 1]["tokens"] == (COMMITTED * 6 + 9) * 32
    last = read_commit(run.checkpoints, STEPS)
    assert (last.step, last.position.updates) == (STEPS, STEPS - 3)
    assert last.position.past["skipped"] == [[7, 8], [16, 16]]
    assert last.position.past["batches"] == [[COMMITTED, 6], [STEPS - COMMITTED, 9]]

    before, after = trace(run, str(COMMITTED)), trace(run, "10")
    assert not any(passage["excluded"] for passage in before), "what was trained was trained"
    assert len({(passage["rank"], passage["slot"]) for passage in before}) == 6
    assert {passage["attempt"] for passage in before} == {1}
    assert len({(passage["rank"], passage["slot"]) for passage in after}) == 9
    assert document in {passage["document"] for passage in after}
    for passage in after:
        assert passage["excluded"] == (passage["document"] == document or passage["shard"] == name)
    refused = terrane("corpus", run.uri, "--trace", "8", check=False)
    assert refused.returncode == 2
    assert "step 8 is passed over" in refused.stderr


def test_starting_over_begins_at_step_1_with_other_values(recipe: Path, undisturbed: RunDir, tmp_path: Path) -> None:
    run = copy_of(undisturbed, tmp_path)
    values = ("train.seed=1", "train.global_batch_size=8", "train.steps=8", "train.workers=1")
    refused = launch(recipe, tmp_path, *values, check=False)
    assert refused.returncode == 2
    assert "--start-over" in refused.stderr
    refused = launch(recipe, tmp_path, *values, "train.workers=8", "--start-over", check=False)
    assert refused.returncode == 2
    assert "train.workers asks for 8 workers" in refused.stderr
    assert committed_steps(run.checkpoints)[-1] == STEPS, "nothing is set aside for what cannot be begun"
    assert run.recipe().train.seed == 0
    done = terrane("run", str(recipe), f"storage={tmp_path}", "--start-over", *values)
    assert "from step 0 of 8" in done.stderr
    assert sorted(losses(run)) == [*range(1, 9)]
    assert {line["attempt"] for line in run.loss_curve().values()} == {2}
    assert losses(run)[1] != losses(undisturbed)[1]
    assert committed_steps(run.checkpoints) == [4, 8]
    assert run.read_json(run.model_manifest)["step"] == 8
    status = json.loads(terrane("status", run.uri, "--json").stdout)
    assert (status["step"], status["steps"], status["checkpoints"]) == (8, 8, [4, 8])
    assert status["evaluation"] is not None
    assert Path(terrane("report", run.uri).stdout.strip()).is_file()
    again = terrane("run", str(recipe), f"storage={tmp_path}", *values)
    assert again.stderr.count("done before, skipped") == 5
    assert "serve: no serving.prompts to answer, skipped" in again.stderr
