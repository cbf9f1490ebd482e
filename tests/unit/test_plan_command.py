"""`terrane plan` for clusters that a file describes: what it chooses, why others lost, what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import UserError
from tests.conftest import SHARED_DATA

RECIPE = """\
name: r
corpus:
  sources: [{name: a, path: /nowhere}]
model: {preset: galactica-1.3b}
train:
  sequence_length: 2048
  global_batch_size: 256
  steps: 5000
  lr: 1e-4
"""
A100 = "pools: [{name: a, device: a100-40, nodes: 2}]\n"
DCU = "pools: [{name: dcu, device: z100, nodes: 512}]\n"
UNLIKE = """\
pools:
  - {name: old, device: v100-16, nodes: 4}
  - {name: new, device: a100-80, nodes: 2}
"""


def written(folder: Path, text: str, name: str = "cluster.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def terrane(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def plan(*arguments: str) -> dict[str, Any]:
    result = terrane(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: str) -> UserError:
    result = terrane(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return result.exception


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_recipe_is_planned_on_a_cluster_that_nobody_has(tmp_path: Path) -> None:
    found = plan(written(tmp_path, RECIPE, "my.yaml"), "--cluster", written(tmp_path, A100))
    chosen = found["chosen"]
    assert chosen["fits"]
    assert chosen["devices"] == 16
    assert chosen["peak_memory_bytes"] == max(stage["total_bytes"] for stage in chosen["stages"])
    assert chosen["step_time_s"] == pytest.approx(sum(chosen["phases_s"].values()))
    assert chosen["tokens_per_second"] == pytest.approx(256 * 2048 / chosen["step_time_s"])
    assert 0.1 < chosen["mfu"] < 0.65
    assert chosen["total_s"] == pytest.approx(5000 * chosen["step_time_s"])
    assert chosen["cost"] == pytest.approx(chosen["total_s"] / 3600 * 16 * 2.74)
    assert found["work"]["tokens"] == 5000 * 256 * 2048
    assert found["platform"]["tflops"]["bf16"] == 312
    assert "NVIDIA" in found["platform"]["sources"]["tflops"]


def test_every_loser_says_why(tmp_path: Path) -> None:
    found = plan("--model", "galactica-6.7b", "--cluster", written(tmp_path, A100), "--batch-size", "256")
    best, losers = found["chosen"]["step_time_s"], found["losers"]
    assert len(losers) >= 6
    for loser in losers:
        if loser["fits"]:
            assert loser["step_time_s"] >= best * (1 - 1e-6)
            assert "slow" in loser["why"] or "as fast" in loser["why"]
        else:
            assert loser["peak_memory_bytes"] > found["chosen"]["available_bytes"]
            assert "needs" in loser["why"] and "of 40.0 GiB" in loser["why"]
    assert any("s more" in loser["why"] for loser in losers)
    assert any(loser["change"] for loser in losers)
    assert any(not loser["change"] for loser in losers)


def test_deepspeed_configuration_is_the_engines(tmp_path: Path) -> None:
    found = plan("--model", "galactica-6.7b", "--cluster", written(tmp_path, A100), "train.layout.zero_stage=3")
    config, chosen = found["deepspeed"], found["chosen"]
    assert config["zero_optimization"]["stage"] == chosen["zero_stage"] == 3
    assert config["train_micro_batch_size_per_gpu"] == chosen["micro_batch_size"]
    assert config["gradient_accumulation_steps"] == chosen["accumulation"]
    assert config["bf16"]["enabled"]


def test_plan_fits_into_the_recipe_that_it_names(tmp_path: Path) -> None:
    """What is printed to be run is planned again as it is."""
    recipe, cluster = written(tmp_path, RECIPE, "my.yaml"), written(tmp_path, A100)
    first = plan(recipe, "--cluster", cluster)
    again = plan(recipe, *first["overrides"], "--cluster", cluster)
    assert again["chosen"] == first["chosen"]


def test_recipe_keeps_what_it_says(tmp_path: Path) -> None:
    recipe = written(tmp_path, RECIPE, "my.yaml")
    asked = ("train.layout={pipeline_stages: 4, recompute: true}", "train.workers=8")
    chosen = plan(recipe, *asked, "--cluster", written(tmp_path, A100))["chosen"]
    assert (chosen["pipeline_stages"], chosen["recompute"], chosen["devices"]) == (4, True, 8)


def test_flags_are_keys_of_the_recipe(tmp_path: Path) -> None:
    flags = ("--sequence-length", "1024", "--batch-size", "96", "--steps", "77", "--dtype", "fp32")
    found = plan("--model", "galactica-125m", "--cluster", written(tmp_path, A100), *flags)
    assert found["work"] == {
        "sequence_length": 1024,
        "global_batch_size": 96,
        "steps": 77,
        "tokens": 77 * 96 * 1024,
    }
    assert found["chosen"]["dtype"] == "fp32"


def test_model_directory_needs_no_more_than_its_configuration(tmp_path: Path) -> None:
    values = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    (tmp_path / "model").mkdir()
    written(tmp_path / "model", json.dumps(values), "config.json")
    found = plan("--model", str(tmp_path / "model"), "--cluster", written(tmp_path, A100))
    block = 2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert found["model"]["parameters"] == 2 * 32_000 * 1024 + 8 * block + 1024


def test_text_tells_the_same(tmp_path: Path) -> None:
    arguments = ("--model", "galactica-30b", "--cluster", written(tmp_path, DCU), "--dtype", "fp32")
    asked = (*arguments, "--batch-size", "4096", "--steps", "7324")
    text, chosen = terrane(*asked).stdout, plan(*asked)["chosen"]
    assert f"{chosen['step_time_s']:.4g} s, {chosen['tokens_per_second']:,.0f} tokens/s" in text
    assert "what lost, and why" in text
    assert f"stage {chosen['pipeline_stages'] - 1} " in text
    assert "by figures" in text and '"efficiency": 0.59' in text


def test_geogalactica_chose_well(tmp_path: Path) -> None:
    """Its layout is within a tenth of what is chosen for its cluster."""
    arguments = ("--model", "galactica-30b", "--cluster", written(tmp_path, DCU), "--dtype", "fp32")
    chosen = plan(*arguments, "--batch-size", "4096")["chosen"]
    theirs = plan(
        *arguments,
        *("--batch-size", "4096", "train.layout={tensor_parallel: 4, pipeline_stages: 16, recompute: true}"),
    )["chosen"]
    assert theirs["micro_batch_size"] == 1
    assert theirs["data_parallel"] == 32
    assert theirs["layers_per_stage"] == [3] * 16
    assert theirs["step_time_s"] <= 1.1 * chosen["step_time_s"]


# --- unlike pools -----------------------------------------------------------------------------------------------------


def test_of_several_pools_the_fastest_is_chosen_and_all_are_told(tmp_path: Path) -> None:
    found = plan("--model", "galactica-6.7b", "--cluster", written(tmp_path, UNLIKE), "--batch-size", "128")
    first, second = found["pools"]
    assert (first["name"], first["why"]) == ("new", "chosen")
    assert found["chosen"]["pool"] == "new"
    assert second["step_time_s"] > first["step_time_s"]
    assert "slower" in second["why"]
    shares = {one["pool"]: one["sequences"] for one in found["islands"]["islands"]}
    assert sum(shares.values()) == 128
    assert shares["new"] > shares["old"]
    stages = found["mixed_pipeline"]["stages"]
    assert sum(stage["layers"] for stage in stages) == 32
    names = [stage["pool"] for stage in stages]
    assert names == sorted(names), "new has more memory than old"
    assert set(names) == {"new", "old"}
    text = terrane(
        "--model", "galactica-6.7b", "--cluster", str(tmp_path / "cluster.yaml"), "--batch-size", "128"
    ).stdout
    assert "as islands" in text and "as one pipeline" in text


def test_pool_on_which_nothing_fits_is_no_reason_to_give_up(tmp_path: Path) -> None:
    found = plan("--model", "galactica-120b", "--cluster", written(tmp_path, UNLIKE), "--batch-size", "64")
    assert [(pool["name"], pool["fits"]) for pool in found["pools"]] == [("new", True), ("old", False)]
    assert "nothing fits" in found["pools"][1]["why"]
    assert found["islands"] is None


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_what_would_be_enough(tmp_path: Path) -> None:
    cluster = written(tmp_path, "pools: [{name: a, device: rtx-3090, nodes: 1}]\n")
    arguments = ("--model", "galactica-30b", "--cluster", cluster, "--batch-size", "64")
    error = refused(*arguments, "train.layout.offload=false")
    assert "no layout fits" in error.message and "of 24.0 GiB" in error.message
    assert "nodes in place of 1" in error.hint
    assert "devices of" in error.hint
    nodes = int(error.hint.split(" nodes in place of 1")[0].split()[-1])
    bigger = f"pools: [{{name: a, device: rtx-3090, nodes: {nodes}}}]\n"
    assert plan(*arguments, "train.layout.offload=false", "--cluster", written(tmp_path, bigger))["chosen"]["fits"]
    fewer = f"pools: [{{name: a, device: rtx-3090, nodes: {nodes - 1}}}]\n"
    refused(*arguments, "train.layout.offload=false", "--cluster", written(tmp_path, fewer))
    memory = float(error.hint.split("devices of ")[1].split()[0])
    larger = f"pools: [{{name: a, device: rtx-3090, nodes: 1, memory_gib: {memory}}}]\n"
    assert plan(*arguments, "train.layout.offload=false", "--cluster", written(tmp_path, larger))["chosen"]["fits"]


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        ("recompute: false, zero_stage: 3, tensor_parallel: 1, offload: false", "train.layout.recompute=true"),
        ("zero_stage: 1, pipeline_stages: 1, tensor_parallel: 1", "train.layout.zero_stage=3"),
        ("pipeline_stages: 1, zero_stage: 1, tensor_parallel: 8, offload: false", "train.layout.pipeline_stages="),
    ],
)
def test_key_of_the_recipe_that_is_in_the_way_is_named(layout: str, hint: str, tmp_path: Path) -> None:
    cluster = written(tmp_path, "pools: [{name: a, device: a100-40, nodes: 4, memory_gib: 30}]\n")
    arguments = ("--model", "galactica-30b", "--cluster", cluster, "--batch-size", "64")
    error = refused(*arguments, f"train.layout={{{layout}}}")
    assert hint in error.hint


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    error = refused("--model", "galactica-125m", "--cluster", written(tmp_path, A100), "train.workers=100")
    assert error.message == "train.workers asks for 100 workers, and no pool has more than 16 devices"
    assert error.hint.startswith("any of these is enough: train.workers=16; ")
    assert "13 nodes in place of 2, which are 104 devices" in error.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to plan"),
        (("--model", "galactica-7b"), "galactica-7b is no directory and no preset"),
        (("my.yaml", "--model", "galactica-125m"), "stands beside the recipe"),
        (("--model", "galactica-125m", "train.layout.tensor_parallel=5"), "tensor_parallel=5 does not divide"),
        (("--model", "galactica-125m", "--sequence-length", "4096"), "more than the 2048 positions"),
        (("--model", "galactica-125m", "--batch-size", "0"), "train.global_batch_size=0"),
        (("--model", "galactica-125m", "train.layuot=1"), "train.layuot is not a key"),
        (("--model", "galactica-125m", "--dtype", "int8"), "train.dtype="),
        (("--model", "galactica-125m", "--batch-size", "8", "train.workers=9"), "has room for"),
        (("--model", "galactica-125m", "train.layout={pipeline_stages: 2, zero_stage: 2}"), "does not go with"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refused(*arguments, "--cluster", written(tmp_path, A100)).message


def test_device_that_nobody_knows(tmp_path: Path) -> None:
    cluster = written(tmp_path, A100.replace("a100-40", "a100-41"))
    error = refused("--model", "galactica-125m", "--cluster", cluster)
    assert "no device is known by the name a100-41" in error.message and "a100-40" in error.message
    error = refused("--model", "galactica-125m", "--cluster", written(tmp_path, A100.replace("a100-40", "a100")))
    assert "did you mean a100-40 or a100-80?" in error.message


def test_a_device_is_known_in_any_case_and_one_without_a_speed_is_told(tmp_path: Path) -> None:
    known = terrane("--model", "galactica-125m", "--cluster", written(tmp_path, A100.replace("a100-40", "A100-40")))
    assert known.exit_code == 0 and "beware" not in known.output
    unknown = "pools: [{name: a, nodes: 2, devices_per_node: 4, memory_gib: 16}]\n"
    told = terrane("--model", "galactica-125m", "--cluster", written(tmp_path, unknown)).output
    assert "beware      a tells no speed" in told
    cluster = written(tmp_path, unknown.replace("nodes: 2", "nodes: 2, tflops: {bf16: 300}"))
    assert "beware" not in terrane("--model", "galactica-125m", "--cluster", cluster).output


def test_dtype_without_a_known_speed(tmp_path: Path) -> None:
    cluster = written(tmp_path, "pools: [{name: a, device: v100-16, nodes: 1}]\n")
    assert "bf16" in refused("--model", "galactica-125m", "--dtype", "bf16", "--cluster", cluster).message


# --- a layout that is given -------------------------------------------------------------------------------------------

LAYOUT: dict[str, Any] = {
    "tensor_parallel": 4,
    "pipeline_stages": 16,
    "data_parallel": 32,
    "layers_per_stage": [3] * 16,
    "micro_batch_size": 1,
    "global_batch_size": 4096,
    "sequence_length": 2048,
    "zero_stage": 1,
    "dtype": "fp32",
    "recompute": True,
}


def judged(folder: Path, *arguments: str, model: str = "galactica-30b", cluster: str = DCU, **values: Any) -> Any:
    layout = written(folder, json.dumps({**LAYOUT, **values}), "layout.json")
    return plan("--model", model, "--cluster", written(folder, cluster), "--validate", layout, *arguments)


def test_layout_that_ran_is_judged(tmp_path: Path) -> None:
    found = judged(tmp_path)
    assert list(found) == ["fits", "peak_memory_bytes", "step_time_s", "tokens_per_second", "stages", "reason"]
    assert found["fits"] is True
    assert found["step_time_s"] == pytest.approx(180, rel=0.1)
    assert found["tokens_per_second"] == pytest.approx(4096 * 2048 / found["step_time_s"])
    assert len(found["stages"]) == 16
    assert found["peak_memory_bytes"] == max(stage["total_bytes"] for stage in found["stages"])


def test_layouts_of_geogalactica_are_judged_as_they_went(tmp_path: Path) -> None:
    """Four that were tried on 192 cards, of one platform: two ran out of memory, two ran, and one was the faster."""
    tried = [(8, 12, 2, 2), (4, 24, 2, 2), (4, 48, 1, 2), (4, 48, 1, 1)]
    found = [
        judged(
            tmp_path,
            tensor_parallel=tensor,
            pipeline_stages=stages,
            data_parallel=replicas,
            layers_per_stage=[48 // stages] * stages,
            micro_batch_size=micro_batch,
            global_batch_size=448,
        )
        for tensor, stages, replicas, micro_batch in tried
    ]
    assert [one["fits"] for one in found] == [True, False, False, True]
    assert found[3]["step_time_s"] < found[0]["step_time_s"]
    assert "does not fit" in found[1]["reason"] and "16.0 GiB" in found[1]["reason"]


def test_layout_may_bring_figures_of_its_platform(tmp_path: Path) -> None:
    plain = judged(tmp_path)
    heavier = judged(tmp_path, platform={"bytes_per_parameter": 24, "base_memory_gib": 3.0})
    slower = judged(tmp_path, platform={"efficiency": 0.3})
    assert heavier["peak_memory_bytes"] > plain["peak_memory_bytes"] + 2**30
    assert slower["step_time_s"] > 1.5 * plain["step_time_s"]


@pytest.mark.skipif(not (SHARED_DATA / "measured_plans").exists(), reason=f"{SHARED_DATA} is not there")
def test_measured_layouts_are_judged_by_the_command(tmp_path: Path) -> None:
    file = SHARED_DATA / "measured_plans" / "opt350m_gh200.jsonl"
    run = json.loads(file.read_text().splitlines()[0])
    blocks = list(run["layers_per_stage"])
    blocks[0] -= 1  # the embedding
    blocks[-1] -= 1  # the head
    values = {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "model").mkdir()
    written(tmp_path / "model", json.dumps(values), "config.json")
    found = judged(
        tmp_path,
        model=str(tmp_path / "model"),
        cluster="pools: [{name: g, device: gh200-megatron, nodes: 16}]\n",
        tensor_parallel=run["tp_per_stage"][0][0],
        pipeline_stages=len(blocks),
        data_parallel=run["dp"][0],
        layers_per_stage=blocks,
        micro_batch_size=run["micro_batch_size"],
        global_batch_size=run["global_batch_size"],
        zero_stage=0,
        dtype="fp16",
        recompute=False,
    )
    assert found["peak_memory_bytes"] == pytest.approx(run["peak_memory_bytes"], rel=0.05)
    assert found["step_time_s"] == pytest.approx(run["step_time_s"], rel=0.15)


def test_layout_of_more_devices_than_there_are_does_not_fit(tmp_path: Path) -> None:
    found = judged(tmp_path, data_parallel=64)
    assert found["fits"] is False
    assert "needs 4096 devices, and 2048 are there" in found["reason"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stag": 1}, "zero_stag is not a key of a layout"),
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"tensor_parallel": 0}, "tensor_parallel=0"),
        ({"tensor_parallel": 5}, "tensor_parallel=5 does not divide"),
        ({"layers_per_stage": [3] * 15}, "layers_per_stage="),
        ({"layers_per_stage": [4] * 16}, "add up to the model's 48 layers"),
        ({"zero_stage": 2}, "does not go with pipeline_stages=16"),
        ({"global_batch_size": 8}, "without a sequence"),
        ({"dtype": "int8"}, "dtype="),
        ({"recompute": "perhaps"}, "recompute="),
        ({"platform": {"efficency": 0.5}}, "efficency"),
        ({"platform": {"efficiency": 2}}, "efficiency"),
    ],
)
def test_bad_layouts(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    layout = written(tmp_path, json.dumps({**LAYOUT, **values}), "layout.json")
    arguments = ("--model", "galactica-30b", "--cluster", written(tmp_path, DCU), "--validate", layout)
    assert message in refused(*arguments).message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds no layout"), ("{}", "tensor_parallel is missing")],
)
def test_files_that_are_no_layout(text: str, message: str, tmp_path: Path) -> None:
    layout = written(tmp_path, text, "layout.json")
    arguments = ("--model", "galactica-30b", "--cluster", written(tmp_path, DCU), "--validate", layout)
    assert message in refused(*arguments).message
    assert "no layout at" in refused(*arguments[:-1], str(tmp_path / "none.json")).message
