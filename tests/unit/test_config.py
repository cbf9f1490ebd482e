from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Recipe, changed_values, load_recipe
from orchestrator.errors import UserError
from tests.conftest import ROOT

RECIPE = """\
name: r
corpus:
  sources:
    - {name: a, path: /data}
train:
  steps: 3
  lr: 1e-4
  schedule: cosine
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return file


def refusal(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value


@pytest.mark.parametrize("shipped", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads(shipped: Path) -> None:
    assert load_recipe(shipped).name


def test_exponents_without_a_dot_are_numbers(path: Path) -> None:
    assert load_recipe(path).train.lr == 1e-4
    assert load_recipe(path, ["train.lr=3e-5"]).train.lr == 3e-5


def test_yes_is_text_not_true(path: Path) -> None:
    assert load_recipe(path, ["name=yes"]).name == "yes"


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(path: Path) -> None:
    path.write_text(RECIPE + "  warm_up_steps: 5\n")
    error = refusal(path)
    assert f"{path}:9 train.warm_up_steps" in error.message
    assert error.hint == "did you mean warmup_steps?"


def test_an_unknown_key_inside_a_list_is_found(path: Path) -> None:
    path.write_text(RECIPE.replace("{name: a, path: /data}", "{name: a, pth: /data}"))
    error = refusal(path)
    assert f"{path}:4 corpus.sources.0.pth" in error.message
    assert error.hint == "did you mean path?"


def test_a_wrong_value_is_named_with_its_line(path: Path) -> None:
    path.write_text(RECIPE.replace("steps: 3", "steps: many"))
    assert f'{path}:6 train.steps="many"' in refusal(path).message


def test_a_wrong_override_is_named_as_such(path: Path) -> None:
    assert "command line, train.lr=-1: train.lr=-1" in refusal(path, "train.lr=-1").message
    assert "train.lr" in refusal(path, "train.lr").message
    assert "is a value and has no fields" in refusal(path, "name.x=1").message
    assert "has 1 entries" in refusal(path, "corpus.sources.7.name=b").message


def test_every_wrong_value_is_named_at_once(path: Path) -> None:
    message = refusal(path, "train.lr=0", "train.steps=0").message
    assert "train.lr" in message
    assert "train.steps" in message


def test_a_missing_section_is_named(path: Path) -> None:
    path.write_text("name: r\ncorpus: {sources: [{name: a, path: /x}]}\n")
    assert "train is missing" in refusal(path).message


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    path.write_text(RECIPE + "name: again\n")
    assert f"{path}:9 name stands twice" in refusal(path).message


@pytest.mark.parametrize("text", ["", "- a\n", "a: [1\n", "\tname: x\n"])
def test_what_is_no_recipe_is_refused_without_a_traceback(path: Path, text: str) -> None:
    path.write_text(text)
    assert str(path) in refusal(path).message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nothere.yaml" in refusal(tmp_path / "nothere.yaml").message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.workers={min: 3, max: 2}", "min=3 is more than max=2"),
        ("model={hidden_size: 100, heads: 3}", "heads=3 does not divide hidden_size=100"),
        ("corpus.sources=[{name: a, path: x}, {name: a, path: y}]", "two sources share a name"),
        ("serving.min_replicas=5", "min_replicas=5 is more than max_replicas=1"),
        ("name=a/b", "name"),
        ("train.keep_best=true", "keep_best goes by the held-out loss: give evaluate_every"),
        ("train={steps: 9, lr: 1, keep_best: true, evaluate_every: 5, checkpoint_every: 3}", "5 is no multiple of"),
        ("train.spikes={window: 4}", "train.spikes.window"),
        ("train.checkpoint_every=0", "train.checkpoint_every=0: input should be greater than or equal to 1, or input"),
        ("corpus.languages=[english]", "corpus.languages.0"),
        ("corpus.quality.max_digit_share=40", "corpus.quality.max_digit_share"),
    ],
)
def test_values_that_contradict_each_other_are_refused(path: Path, override: str, expected: str) -> None:
    assert expected in refusal(path, override).message


def test_one_number_of_workers_means_exactly_that_many(path: Path) -> None:
    workers = load_recipe(path, ["train.workers=4"]).train.workers
    assert (workers.min, workers.max) == (4, 4)


def test_only_values_that_change_the_result_count_as_changes(path: Path) -> None:
    before = load_recipe(path).model_dump(mode="json")
    steered = load_recipe(path, ["train.workers=4", "faults=[]", "serving.max_tokens=3"]).model_dump(mode="json")
    changed = load_recipe(path, ["train.lr=0.1", "train.workers=4"]).model_dump(mode="json")
    assert changed_values(before, steered) == []
    assert changed_values(before, changed) == ["train.lr was 0.0001, is 0.1"]


def test_a_digest_changes_with_its_sections_only(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.digest_of("corpus") == load_recipe(path, ["train.lr=1"]).digest_of("corpus")
    assert recipe.digest_of("corpus") != load_recipe(path, ["corpus.quality.min_characters=1"]).digest_of("corpus")


def test_a_recipe_survives_json(path: Path) -> None:
    recipe = load_recipe(path, ["faults=[{kind: kill_rank, rank: 1, step: 2}]"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=.inf",
        "train.clip_norm=.inf",
        "train.betas=[2, 3]",
        "train.lr=!!int q",
        "name=2024-13-45",
        "storage=''",
    ],
)
def test_numbers_that_are_none_are_refused(path: Path, override: str) -> None:
    assert override.split("=")[0] in refusal(path, override).message


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "x: " + "[" * 3000, "name: !!int abc\n"])
def test_yaml_that_cannot_be_a_value_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    assert str(path) in refusal(path).message


def test_input_paths_are_settled_where_the_command_was_given(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, ["model.path=sub/m", "tokenizer.path=~/t", "corpus.sources.0.path=${site_packages}"])
    assert recipe.model.path == str(tmp_path / "sub" / "m")
    assert recipe.tokenizer.path == str(Path.home() / "t")
    assert recipe.corpus.sources[0].path == "${site_packages}"


@pytest.mark.parametrize("key", ["model.layers=4", "model.heads=2", "tokenizer.vocab_size=500"])
def test_what_a_given_model_decides_must_not_stand_beside_it(path: Path, key: str) -> None:
    error = refusal(path, "model.path=/m", key)
    assert f"{key.split('=')[0]} does nothing beside model.path" in error.message
    load_recipe(path, [key])


@pytest.mark.parametrize("key", ["layers=4", "architecture=llama", "ffn_size=64"])
def test_what_a_preset_decides_must_not_stand_beside_it(path: Path, key: str) -> None:
    error = refusal(path, "model.preset=galactica-125m", f"model.{key}")
    assert f"model.{key.split('=')[0]} does nothing beside model.preset" in error.message
    load_recipe(path, ["model.preset=galactica-125m", "tokenizer.vocab_size=500"])


def test_a_preset_does_nothing_beside_a_model(path: Path) -> None:
    assert "model.preset does nothing" in refusal(path, "model.path=/m", "model.preset=galactica-125m").message


def with_mixture(path: Path, mixture: str) -> Path:
    path.write_text(RECIPE.replace("train:", f"    - {{name: b, path: /more}}\n  mixture: {mixture}\ntrain:", 1))
    return path


def test_a_mixture_is_read(path: Path) -> None:
    recipe = load_recipe(with_mixture(path, "[{weights: {a: 0.8, b: 0.2}, tokens: 1000}, {weights: {b: 1}}]"))
    assert [stage.tokens for stage in recipe.corpus.mixture] == [1000, None]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[{weights: {a: 1, c: 1}}]", "mixture names c, which is no source"),
        ("[{weights: {a: 0}}]", "every weight is 0"),
        ("[{weights: {a: -1}}]", "greater than or equal to 0"),
        ("[{weights: {}}]", "at least 1 item"),
        ("[{weights: {a: 1, b: 0.00001}}]", "below 1/10000"),
        ("[{weights: {a: 1}}, {weights: {b: 1}}]", "only the last stage"),
        ("[{weights: {a: 1}, tokens: 5}]", "lasts to the end"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(path: Path, mixture: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(with_mixture(path, mixture))
