"""The command line as a user meets it: wrong input, Ctrl-C, help, doctor."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.runs import RunDir, find_run
from orchestrator.train.checkpoints import committed_steps
from tests.conftest import ROOT
from tests.e2e.conftest import BIN, RECIPE, interrupt, terrane, wait_for


def refused(*arguments: str, cwd: Path = ROOT) -> str:
    """What a command says that must be refused."""
    done = terrane(*arguments, cwd=cwd, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_unknown_key_is_refused_with_line_and_nearest_name(tmp_path: Path) -> None:
    text = (ROOT / RECIPE).read_text().replace("warmup_steps", "warm_steps")
    (tmp_path / "r.yaml").write_text(text)
    line = 1 + text.splitlines().index(next(line for line in text.splitlines() if "warm_steps" in line))
    said = refused("run", "r.yaml", cwd=tmp_path)
    assert f"r.yaml:{line} train.warm_steps is not a key" in said
    assert "hint: did you mean warmup_steps?" in said
    assert not (tmp_path / "runs").exists()


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    said = refused("run", RECIPE, f"storage={tmp_path}", "corpus.sources.0.path=/no/such/place")
    assert "source readmes: nothing at /no/such/place" in said


def test_an_empty_corpus_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("too little")
    source = f"corpus.sources=[{{name: a, path: {tmp_path}/a.md}}]"
    said = refused("run", RECIPE, f"storage={tmp_path}/runs", source)
    assert "the corpus is empty: none of 1 documents was kept (1 too short)" in said
    assert committed_steps(str(tmp_path / "runs" / "tiny" / "checkpoints")) == []
    assert not (tmp_path / "runs" / "tiny" / "attempts").exists()


def test_a_model_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    said = refused("run", RECIPE, f"storage={tmp_path}/runs", f"model={{path: {tmp_path}/model}}", "tokenizer={}")
    assert "has no tokenizer" in said


@pytest.mark.parametrize("uri", ["/proc/nowhere", "gs://bucket/x"])
def test_storage_that_cannot_be_written_is_refused(uri: str) -> None:
    assert uri in refused("run", RECIPE, f"storage={uri}")


def test_a_missing_bucket_is_refused(s3_endpoint: str) -> None:
    assert "cannot write to s3://no-such-bucket-here" in refused("run", RECIPE, "storage=s3://no-such-bucket-here")


def test_more_workers_than_devices_are_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    said = refused("run", RECIPE, f"storage={tmp_path}", "train.workers=16")
    assert "train.workers asks for 16 workers" in said
    assert "hint: set train.workers=" in said
    assert not (tmp_path / "tiny" / "corpus").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("status", "/no/run"), "no run at /no/run"),
        (("logs", "/no/run"), "no run at /no/run"),
        (("report", "/no/run"), "no run at /no/run"),
        (("export", "/no/run"), "no run at /no/run"),
        (("serve", "/no/model"), "/no/model"),
        (("run", RECIPE, "--stage", "trian"), "--stage trian is no stage"),
        (("run", RECIPE, "train.lr"), "cannot read 'train.lr' as key=value"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused(*arguments)


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in (
        ("config.json", b'{"max_position_embeddings": 64}'),
        ("tokenizer.json", b"{}"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0{}"),
    ):
        (model / name).write_bytes(content)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused("serve", str(model), "--port", str(taken.getsockname()[1]))
    assert "cannot listen on 127.0.0.1:" in said


def test_a_damaged_last_checkpoint_is_trained_again(calm: RunDir, tmp_path: Path) -> None:
    shutil.copytree(calm.uri, tmp_path / "tiny")
    run = RunDir(str(tmp_path / "tiny"))
    before, last = committed_steps(run.checkpoints)[-2:]
    file = next(Path(run.checkpoint(last)).rglob("__0_0.distcp"))
    data = bytearray(file.read_bytes())
    data[4096] ^= 1  # in the first fragment, of a parameter: an export reads no moments
    file.write_bytes(data)
    done = terrane("run", RECIPE, f"storage={tmp_path}", "faults=[]", "serving.prompts=[]")
    assert f"checkpoint of step {last} set aside" in done.stderr
    assert f"from step {before} of {last}" in done.stderr
    assert f"export: step {last} as a Hugging Face model" in done.stderr
    assert committed_steps(run.checkpoints)[-1] == last
    expected = calm.loss_curve()
    assert all(line["loss"] == expected[step]["loss"] for step, line in run.loss_curve().items())


def test_a_damaged_shard_is_named_and_not_tried_again(calm: RunDir, tmp_path: Path) -> None:
    storage.download_directory(calm.corpus, tmp_path / "tiny" / "corpus")
    for file in (tmp_path / "tiny" / "corpus" / "shards").glob("train-*-????????.arrow"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    done = terrane("run", RECIPE, f"storage={tmp_path}", "faults=[]", "--stage", "train", check=False)
    assert done.returncode == 1
    assert "error: attempt 1 ended: shard" in done.stderr
    assert "is damaged" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("report",),
        ("plan", RECIPE, "--adress", "auto"),
        ("export", "runs/x", "--step", "abc"),
        ("run", "--stage"),
    ],
)
def test_wrong_usage_is_explained_without_a_traceback(arguments: tuple[str, ...]) -> None:
    done = terrane(*arguments, check=False)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_finds_this_environment_sound() -> None:
    checks = json.loads(terrane("doctor", "--json").stdout)
    assert all(check["ok"] for check in checks), checks


def test_ctrl_c_in_the_corpus_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(BIN / "terrane"), "run", RECIPE, f"storage={tmp_path}"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_for(lambda: list(tmp_path.glob("tiny/corpus/facts/unit-*.json")), "the first unit")
        interrupt(process)
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 130, said
    assert "stopped: interrupted; finished work is kept" in said
    assert "hint: run the same command to go on" in said


def test_ctrl_c_commits_and_the_same_command_goes_on(calm: RunDir, tmp_path: Path) -> None:
    storage.download_directory(calm.corpus, tmp_path / "tiny" / "corpus")
    # Within the warm-up, so that the number of steps does not change the learning rate.
    command = ["run", RECIPE, f"storage={tmp_path}", "faults=[]", "train.steps=20", "--stage", "train"]
    process = subprocess.Popen(
        [str(BIN / "terrane"), *command], stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    run = RunDir(str(tmp_path / "tiny"))
    try:
        wait_for(lambda: process.poll() is not None or len(run.metric_lines()) >= 2, "the second step")
        interrupt(process)
        _, said = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 130, said
    stopped = committed_steps(run.checkpoints)[-1]
    assert stopped < 20
    assert f"stopped: stopped at step {stopped}, its state is committed" in said
    assert "hint: run the same command" in said
    assert f"step {stopped}/20" in said

    terrane(*command)
    found, expected = find_run(run.uri).loss_curve(), calm.loss_curve()
    assert sorted(found) == list(range(1, 21))
    assert [found[step]["loss"] for step in found] == [expected[step]["loss"] for step in found]
    assert len(run.metric_lines()) == 20, "no step was repeated"
