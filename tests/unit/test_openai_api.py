"""The serving layer without Ray and torch: arguments, keys, request schemas, errors and the text of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.errors import UserError
from serve.args import ServeArgs, check_model, parse_args
from serve.auth import Keys, load_keys, read_keys
from serve.deploy import equivalents, serve_config
from serve.engine import Sampling, cache_blocks, end_ids
from serve.schemas import ApiError, ChatRequest, CompletionRequest, as_api_error, validation_error
from serve.text import Detokenizer, StopStrings, Transcript

# --- Arguments --------------------------------------------------------------------------------------------------------


def test_args_take_their_name_from_the_model_directory(tmp_path: Path) -> None:
    assert parse_args({"model": f"{tmp_path}/"}).model_id == tmp_path.name
    assert parse_args({"model": "s3://bucket/run/model"}).model_id == "model"
    assert parse_args({"model": str(tmp_path), "name": "galactica"}).model_id == "galactica"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "model is missing"),
        ({"model": ""}, "model=''"),
        ({"model": "m", "min_replica": 1}, "min_replica is not an argument"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is more than max_replicas=2"),
        ({"model": "m", "cpus_per_replica": 0}, "cpus_per_replica=0"),
        ({"model": "m", "target_ongoing_requests": 20}, "target_ongoing_requests=20 is more than"),
        ({"model": "m", "max_model_length": "long"}, "max_model_length='long'"),
        ({"model": "gs://bucket/model"}, "unknown scheme"),
    ],
)
def test_wrong_args_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_args(args)
    assert words in error.value.message


def test_unknown_arg_hints_at_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        parse_args({"model": "m", "min_replica": 1})
    assert error.value.hint == "did you mean min_replicas?"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no safetensors"),
    ],
)
def test_incomplete_model_is_refused_before_anything_starts(tmp_path: Path, missing: str, words: str) -> None:
    make_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    check_model(ServeArgs(model=str(tmp_path)))
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=words):
        check_model(ServeArgs(model=str(tmp_path)))


def test_absent_model_and_too_long_a_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        check_model(ServeArgs(model=str(tmp_path / "nowhere")))
    make_files(tmp_path)
    with pytest.raises(UserError, match="max_model_length=129 is more than the model's 128 positions"):
        check_model(ServeArgs(model=str(tmp_path), max_model_length=129))


def test_unsafe_torch_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        check_model(ServeArgs(model=str(tmp_path)))


def test_shipped_serve_config_is_valid() -> None:
    import yaml

    import serve

    document = yaml.safe_load((Path(serve.__file__).parent / "config.yaml").read_text())
    application = document["applications"][0]
    assert application["import_path"] == "serve.app:build"
    parse_args(application["args"])


def test_equivalent_config_builds_the_same_service() -> None:
    import yaml

    args = parse_args({"model": "s3://bucket/model", "max_replicas": 3})
    document = yaml.safe_load(equivalents(args))
    assert document == serve_config(args)
    assert parse_args(document["applications"][0]["args"]) == args


def make_files(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    for name in ("tokenizer.json", "model.safetensors"):
        (directory / name).write_bytes(b"")


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_no_keys_accept_everyone() -> None:
    assert load_keys({}) == Keys()
    assert Keys().accept(None)


def test_keys_come_from_variable_and_file_and_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("three\n\n four \n")
    environ = {"TERRANE_API_KEYS": "one, two", "TERRANE_API_KEYS_FILE": str(tmp_path / "keys")}
    assert read_keys(environ) == ("one", "two", "three", "four")
    keys = load_keys(environ)
    assert all(keys.accept(f"Bearer {key}") for key in ("one", "two", "three", "four"))
    assert not any(keys.accept(header) for header in (None, "", "Bearer", "Bearer five", "Basic one", "one"))
    assert "one" not in repr(keys)


@pytest.mark.parametrize("environ", [{"TERRANE_API_KEYS": " , "}, {"TERRANE_API_KEYS_FILE": "/nowhere/keys"}])
def test_configured_but_absent_keys_are_an_error_and_not_an_open_service(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match="TERRANE_API_KEYS"):
        load_keys(environ)


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_one_prompt_and_one_stop_string_become_lists_and_null_is_unset() -> None:
    request = CompletionRequest.model_validate(
        {"model": "m", "prompt": "a", "stop": "b", "temperature": None, "logit_bias": None, "n": 1, "user": "u"}
    )
    assert (request.prompt, request.stop, request.temperature) == (["a"], ["b"], 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", ["a", ""]),
        ("prompt", [1, 2]),
        ("prompt", 3),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("temperature", -1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("top_p", "0.5"),
        ("stop", ["a", ""]),
        ("stop", list("abcde")),
        ("stream", 1),
        ("n", 2),
        ("best_of", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1.0),
        ("seed", 7),
        ("top_k", 5),
        ("logprobs", 1),
        ("suffix", "x"),
    ],
)
def test_refused_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"model": "m", "prompt": "a", field: value})
    items = [item | {"loc": ("body", *item["loc"])} for item in error.value.errors()]
    answer = validation_error(RequestValidationError(items))
    assert (answer.status, answer.param) == (400, field)
    assert field in answer.message


def test_seed_is_accepted_where_it_changes_nothing() -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": "a", "seed": 7, "temperature": 0}).seed == 7


def test_chat_parts_are_joined_and_other_kinds_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "ab"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for messages in ([], [{"role": "tool", "content": "a"}], [{"role": "user", "content": image}]):
        with pytest.raises(ValidationError):
            ChatRequest.model_validate({"model": "m", "messages": messages})


def test_errors_have_openai_shape_and_hide_what_is_internal() -> None:
    body = ApiError(429, "full", code="rate_limit_exceeded").body()
    assert body == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
    hidden = as_api_error(RuntimeError("secret path"))
    assert hidden.status == 500
    assert "secret" not in hidden.message


# --- Engine: what is pure of it ---------------------------------------------------------------------------------------


def test_greedy_never_divides_by_zero() -> None:
    for temperature in (0.0, 1e-12):
        assert Sampling(max_tokens=1, temperature=temperature).logits_arguments() == {"temperature": 0.01, "top_p": 0.0}
    assert Sampling(max_tokens=1, temperature=0.5, top_p=0.9).logits_arguments() == {"temperature": 0.5, "top_p": 0.9}


def test_cache_holds_all_sequences_or_what_the_budget_allows_or_says_so() -> None:
    assert cache_blocks(4, 8, 100, 1_000_000) == 32
    assert cache_blocks(4, 8, 100, 1_000) == 10
    with pytest.raises(UserError, match="one full-length sequence"):
        cache_blocks(4, 8, 100, 700)


def test_end_ids_of_every_form() -> None:
    assert (end_ids(None), end_ids(2), end_ids([2, 3])) == ((), (2,), (2, 3))


# --- Text -------------------------------------------------------------------------------------------------------------


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=40), st.text(max_size=10))
def test_streamed_characters_join_to_the_text(text: str, context: str) -> None:
    detokenizer = Detokenizer(decode_bytes, list(context.encode())[-4:])
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text


def test_bytes_that_make_no_character_come_out_at_the_end() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    stopper, out, rest = StopStrings(stops), "", text
    while rest and not stopper.found:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + stopper.push(rest[:size]), rest[size:]
    out += stopper.flush()
    seen = text[: len(text) - len(rest)]
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert out == (seen[: min(places)] if places else text)
    assert stopper.found == bool(places)


def test_transcript_tells_why_it_ended() -> None:
    def write(tokens: bytes, **options: Any) -> tuple[str, str | None, int]:
        transcript = Transcript(decode_bytes, prompt=[], end_ids=[0], **options)
        text = transcript.push(tokens) + transcript.finish()
        return text, transcript.finish_reason, transcript.tokens

    assert write(b"abc") == ("abc", "length", 3)
    assert write(b"ab\0c") == ("ab", "stop", 3)
    assert write(b"abcd", stops=["c"]) == ("ab", "stop", 3)
    assert write(b"abc", stops=["cd"]) == ("abc", "length", 3)
