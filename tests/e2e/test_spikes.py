"""A document of garbage in real training: its steps are spikes, it is named, and training goes on without it."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import load_recipe
from orchestrator.data.inspection import occurrences
from orchestrator.data.manifest import data_order, load_manifest
from orchestrator.runs import RunDir
from orchestrator.train.checkpoints import committed_steps, read_commit
from tests.e2e.conftest import terrane

STEPS, LENGTH = 48, 32
GARBAGE = "papers/garbage.txt"
RECIPE = """
name: spiky
corpus:
  sources: [{{name: papers, path: {folder}/texts}}]
  near_duplicates: null
  held_out: 0.05
  quality: {{min_characters: 10, min_prose_share: null, max_duplicate_line_share: null, max_top_ngram_share: null,
    min_plain_word_share: null, max_mean_word_length: null, max_compression_ratio: null}}
tokenizer: {{vocab_size: 400}}
model: {{layers: 2, hidden_size: 32, heads: 2}}
train:
  sequence_length: 32
  global_batch_size: 6
  steps: 48
  lr: 3.0e-3
  checkpoint_every: 8
  keep_checkpoints: 10
  evaluate_every: 16
  workers: 2
  cpus_per_worker: 0.5
  max_restarts: 1
  spikes: {{window: 16, jump: 2}}
evaluation: {{held_out_sequences: 9}}
"""


def launch(recipe: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return terrane("run", str(recipe), f"storage={root}", "--stage", "train", *arguments)


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file, beside 400 documents of made-up words, of which one is no words at all."""
    folder, rng = tmp_path_factory.mktemp("recipe"), random.Random(0)
    words = [begin + end for begin in "ca to ri mel sor ban lu pre".split() for end in "n der ment sis tal".split()]
    texts = [" ".join(rng.choices(words, k=rng.randint(10, 40))) + "." for _ in range(400)]
    (folder / "texts").mkdir()
    (folder / "texts" / "papers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "texts" / "garbage.txt").write_text("".join(chr(rng.randint(0x400, 0x4FF)) for _ in range(80)))
    (folder / "spiky.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "spiky.yaml"


@pytest.fixture(scope="module")
def corpus(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    terrane("run", str(recipe), f"storage={root}", "--stage", "corpus")
    return root / "spiky" / "corpus"


def begin(corpus: Path, root: Path) -> RunDir:
    shutil.copytree(corpus, root / "spiky" / "corpus")
    return RunDir(str(root / "spiky"))


def garbage_in(recipe: Path, corpus: Path, seed: int) -> dict[int, int]:
    """Tokens of the garbage by step."""
    manifest = load_manifest(str(corpus))
    assert manifest is not None
    tokens = {
        sample: last + 1 - first for sample, first, last in occurrences(str(corpus), manifest, [GARBAGE])[GARBAGE]
    }
    order = data_order(manifest, load_recipe(recipe, [f"train.seed={seed}"]))
    found = {step: sum(tokens.get(sample, 0) for sample in order.step(step).tolist()) for step in range(1, STEPS + 1)}
    return {step: count for step, count in found.items() if count}


@pytest.fixture(scope="module")
def seed(recipe: Path, corpus: Path) -> int:
    """One with which the model knows the words before it meets the garbage, and then a whole sequence of it."""

    def late(seed: int) -> bool:
        first, tokens = next(iter(garbage_in(recipe, corpus, seed).items()), (0, 0))
        return 34 < first < 44 and tokens >= LENGTH

    return next(seed for seed in range(1000) if late(seed))


@pytest.fixture(scope="module")
def skipped(recipe: Path, corpus: Path, seed: int, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("skipped")
    run = begin(corpus, root)
    launch(recipe, root, f"train.seed={seed}")
    return run


@pytest.fixture(scope="module")
def rolled_back(recipe: Path, corpus: Path, seed: int, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("rolled-back")
    run = begin(corpus, root)
    launch(recipe, root, f"train.seed={seed}", "train.spikes.action=rollback")
    return run


def lines_of(run: RunDir) -> dict[int, dict[str, Any]]:
    """Records of the steps that count, without their times."""
    kept = ("loss", "grad_norm", "lr", "applied", "held_out_loss")
    return {step: {key: line.get(key) for key in kept} for step, line in sorted(run.loss_curve().items())}


def test_the_updates_of_the_garbage_are_dropped_and_it_is_named(
    recipe: Path, corpus: Path, seed: int, skipped: RunDir
) -> None:
    garbage = list(garbage_in(recipe, corpus, seed))
    lines = lines_of(skipped)
    dropped = [step for step, line in lines.items() if not line["applied"]]
    assert dropped[0] == garbage[0]
    assert set(dropped) <= set(garbage)
    assert [event["step"] for event in events(skipped, "spike")] == dropped
    assert all(GARBAGE in event["documents"] for event in events(skipped, "spike"))
    assert not any(event["quarantined"] for event in events(skipped, "spike"))
    last = read_commit(skipped.checkpoints, STEPS)
    assert last.position.updates == STEPS - len(dropped)
    assert skipped.attempts() == [1]
    status = terrane("status", skipped.uri).stdout
    assert f"loss spike   step {dropped[0]}" in status
    assert GARBAGE in status


def test_the_held_out_loss_is_taken_on_the_way_and_kept_with_the_checkpoint(skipped: RunDir) -> None:
    held_out = {step: line["held_out_loss"] for step, line in lines_of(skipped).items() if line["held_out_loss"]}
    assert sorted(held_out) == [16, 32, 48]
    assert held_out[48] < held_out[16] < math.log(400)
    kept = {step: read_commit(skipped.checkpoints, step).held_out_loss for step in committed_steps(skipped.checkpoints)}
    assert kept == {step: held_out.get(step) for step in range(8, STEPS + 1, 8)}


def test_a_resumed_run_judges_as_the_undisturbed_one(recipe: Path, seed: int, skipped: RunDir, tmp_path: Path) -> None:
    """From a checkpoint shortly before the spike, whose history is older than the attempt."""
    spike = events(skipped, "spike")[0]["step"]
    shutil.copytree(skipped.uri, tmp_path / "spiky")
    run = RunDir(str(tmp_path / "spiky"))
    before = max(step for step in committed_steps(run.checkpoints) if step < spike)
    for step in committed_steps(run.checkpoints):
        if step > before:
            shutil.rmtree(run.checkpoint(step))
    launch(recipe, tmp_path, f"train.seed={seed}")
    again = [line["step"] for line in run.metric_lines() if line["attempt"] == 2]
    assert again == list(range(before + 1, STEPS + 1))
    assert lines_of(run) == lines_of(skipped)


def test_behind_the_spike_training_goes_on_without_the_document(
    recipe: Path, corpus: Path, seed: int, rolled_back: RunDir
) -> None:
    run, first = rolled_back, next(iter(garbage_in(recipe, corpus, seed)))
    (spike,) = events(run, "spike")
    assert (spike["step"], spike["action"]) == (first, "rollback")
    assert spike["quarantined"][0] == GARBAGE
    (back,) = events(run, "rolled_back")
    assert back["back_to"] == max(step for step in range(0, STEPS, 8) if step < first - 2)
    assert (back["first"], back["last"]) == (first - 2, first + 2)
    ended = events(run, "attempt_ended")
    assert [(event["outcome"], event["failed_step"]) for event in ended] == [("spike", first), ("finished", 0)]
    lines = lines_of(run)
    assert sorted(lines) == [step for step in range(1, STEPS + 1) if not first - 2 <= step <= first + 2]
    assert all(line["applied"] and math.isfinite(line["loss"]) for line in lines.values())
    assert lines[STEPS]["loss"] < lines[16]["loss"]
    recorded = run.read_json(run.schedule(2))
    assert GARBAGE in recorded["exclusions"]["quarantined"]
    assert read_commit(run.checkpoints, STEPS).position.past["skipped"] == [[first - 2, first + 2]]
    assert "passed over" in terrane("status", run.uri).stdout
    terrane("report", run.uri)
    assert GARBAGE in Path(run.report_markdown).read_text().replace("\\", "")
    judged = json.loads(terrane("corpus", run.uri, "--suspects", str(first), "--json").stdout)
    assert judged["checkpoint"] < first - 2
    worst, *others = judged["documents"]
    assert worst["document"] == GARBAGE, "also where a sample holds it beside others"
    assert worst["z"] > 6 > max([document["z"] for document in others if document["document"] != GARBAGE], default=0)
    refused = terrane("corpus", run.uri, "--suspects", "1", check=False)
    assert (refused.returncode, f"steps with one: {first}" in refused.stderr) == (2, True)
    again = launch(recipe, Path(run.uri).parent, f"train.seed={seed}", "train.spikes.action=rollback")
    assert "train: done before, skipped" in again.stderr
