"""A run whose layout changes on the way, with real training: a pipeline of tensor-parallel stages, then ZeRO-3."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir, find_run
from orchestrator.train.checkpoints import committed_steps
from tests.e2e.conftest import terrane

STEPS, COMMITTED, KILLED_AT = 10, 4, (6, 7)
RECIPE = """
name: cut
corpus:
  sources: [{{name: words, path: {folder}/words.jsonl}}]
  near_duplicates: null
  held_out: 0.05
  quality: {{min_characters: 10, min_prose_share: null, max_duplicate_line_share: null, max_top_ngram_share: null}}
tokenizer: {{vocab_size: 400}}
model: {{architecture: llama, layers: 4, hidden_size: 32, heads: 4, kv_heads: 2}}
train:
  sequence_length: 32
  global_batch_size: 6
  steps: 10
  lr: 1.0e-3
  checkpoint_every: 4
  workers: 2
  cpus_per_worker: 0.25
  max_restarts: 0
evaluation: {{held_out_sequences: 8}}
"""
CUT = ("train.layout={tensor_parallel: 2, pipeline_stages: 2, layers_per_stage: [1, 3]}", "train.workers=4")
SPLIT = ("train.layout={zero_stage: 3}", "train.workers=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("recipe"), random.Random(0)
    words = [begin + end for begin in "ca to ri mel sor ban lu pre".split() for end in "n der ment sis tal".split()]
    texts = [" ".join(rng.choices(words, k=rng.randint(10, 40))) for _ in range(300)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in texts))
    (folder / "cut.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "cut.yaml"


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two replicas, ZeRO-2, to the exported model and its held-out perplexity."""
    root = tmp_path_factory.mktemp("undisturbed")
    terrane("run", str(recipe), f"storage={root}")
    return find_run(str(root / "cut"))


@pytest.fixture(scope="module")
def changed(recipe: Path, undisturbed: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Four workers, one of which is killed, and again in the next attempt; then two that go on from the checkpoint."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(undisturbed.corpus, root / "cut" / "corpus")
    faults = ", ".join(f"{{kind: kill_rank, rank: 3, step: {step}}}" for step in KILLED_AT)
    lost = terrane("run", str(recipe), f"storage={root}", *CUT, f"faults=[{faults}]", check=False)
    assert lost.returncode == 1, lost.stderr
    run = find_run(str(root / "cut"))
    assert committed_steps(run.checkpoints) == [COMMITTED], lost.stderr
    terrane("run", str(recipe), f"storage={root}", *SPLIT)
    return run


def test_the_losses_are_those_of_the_undisturbed_run(undisturbed: RunDir, changed: RunDir) -> None:
    expected, found = undisturbed.loss_curve(), changed.loss_curve()
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert {step: line["attempt"] for step, line in found.items()} == {
        step: 1 if step <= COMMITTED else 3 for step in found
    }
    for step, line in found.items():
        for what in ("loss", "grad_norm"):
            assert line[what] == pytest.approx(expected[step][what], rel=1e-5), f"step {step}, {what}"


def test_each_attempt_ran_in_the_layout_that_was_asked_for(changed: RunDir) -> None:
    keys = ("tensor_parallel", "pipeline_stages", "layers_per_stage", "data_parallel", "zero_stage")
    plans = [changed.read_json(changed.plan(attempt)) for attempt in (1, 2, 3)]
    assert [[plan[key] for key in keys] for plan in plans] == [*[[2, 2, [1, 3], 1, 1]] * 2, [1, 1, [4], 2, 3]]


def test_layouts_on_trial_train_on_and_the_fastest_by_measurement_stays(
    recipe: Path, undisturbed: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.corpus, tmp_path / "cut" / "corpus")
    larger = "model={architecture: llama, layers: 4, hidden_size: 128, heads: 4, kv_heads: 2}"
    settings = ("train.trials=3", "train.steps=300", "train.global_batch_size=48", "train.standby=false")
    terrane("run", str(recipe), f"storage={tmp_path}", larger, *settings, "--stage", "train")
    run = find_run(str(tmp_path / "cut"))
    seconds = {event["layout"]: event["step_s"] for event in run.events() if event["event"] == "tried"}
    assert len(seconds) == 3
    plans = [event["plan"] for event in run.events() if event["event"] == "planned"]
    assert [plan["trial"] for plan in plans[:3]] == [True] * 3
    assert len({(plan["tensor_parallel"], plan["pipeline_stages"]) for plan in plans[:3]}) == 3
    *_, last = run.metric_lines()
    lasting = Plan(**plans[last["attempt"] - 1])
    assert str(lasting) == min(seconds, key=lambda layout: seconds[layout])
    assert sorted(run.loss_curve()) == list(range(1, 301))
    assert len(list(run.metric_lines())) == 300, "no step was done twice"


def test_the_exported_models_are_the_same_to_rounding(undisturbed: RunDir, changed: RunDir) -> None:
    from safetensors.torch import load_file

    models = [load_file(Path(run.model) / "model.safetensors") for run in (undisturbed, changed)]
    assert models[0].keys() == models[1].keys()
    for name, expected in models[0].items():
        assert (models[1][name] - expected).abs().max() < 1e-5, name
    perplexities = [run.read_json(run.evaluation(STEPS))["model"]["perplexity"] for run in (undisturbed, changed)]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-5)


def test_the_plan_tells_of_the_layout(recipe: Path) -> None:
    told = terrane("plan", str(recipe), *CUT, "train.layout.recompute=true").stdout
    assert "4 cpu workers, ZeRO-1, tensor parallel 2, 2 stages of 1+3 layers, recompute, micro-batch" in told


def test_a_layout_that_cannot_be_is_said_before_anything_starts(recipe: Path, tmp_path: Path) -> None:
    for command in ("plan", "run"):
        refused = terrane(command, str(recipe), f"storage={tmp_path}", "train.layout={tensor_parallel: 4}", check=False)
        assert refused.returncode == 2
        assert "error: train.layout.tensor_parallel=4 does not divide the model's 2 heads of keys" in refused.stderr
        assert "hint: use 1, 2" in refused.stderr
    assert not list(tmp_path.iterdir())
