"""A tiny random model behind the real thing: Ray Serve, its proxy, the engine and OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.errors import RunFailed, UserError
from serve.deploy import ask, converse, deploy, stop

POSITIONS = 1024
PROMPTS = ["The crust", "A terrane docks", "plate", "onto a plate it did not come from: " * 5]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
KEY = "a key"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the export stage leaves it: Galactica's layout, two layers, a byte-level BPE tokenizer."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    directory = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=POSITIONS,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        init_std=0.5,  # logits far apart: the batch an answer is made in cannot change it
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(directory)
    return directory


def make_tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>"]
    bpe.train_from_iterator(PROMPTS, vocab_size=300, min_frequency=1, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket on this machine; processes started meanwhile find it too."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._s3.cache_clear()
        boto3.client("s3").create_bucket(Bucket="models")
        yield "s3://models"
        storage._s3.cache_clear()
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[None]:
    import ray

    directory = tempfile.mkdtemp(prefix="ts", dir="/tmp")  # socket paths have 107 characters
    environ = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            _temp_dir=directory,
            log_to_driver=False,
        )
        try:
            yield
        finally:
            stop()
            ray.shutdown()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def url(cluster: None, model: Path) -> str:
    args = {"model": str(model), "cpus_per_replica": 0.5, "max_ongoing_requests": 8, "max_queued_requests": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERRANE_API_KEYS", KEY)
        return deploy(args, port=0)


@pytest.fixture(autouse=True)
def client_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERRANE_API_KEYS", KEY)


def post(url: str, body: Any, path: str = "/v1/completions", key: str = KEY) -> tuple[int, dict[str, Any], Any]:
    """Status, document and headers, whatever the status."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def complete(url: str, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
    status, document, _ = post(url, {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 20} | fields)
    assert status == 200, document
    return document


def get(url: str, path: str) -> dict[str, Any]:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        document: dict[str, Any] = json.load(response)
    return document


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(model: Path) -> Callable[[str, int], str]:
    """What transformers itself generates greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = network.generate(ids, do_sample=False, max_new_tokens=tokens)
        text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    return generate


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_greedy_completion_is_what_generate_gives(url: str, expected: Callable[[str, int], str]) -> None:
    for prompt in PROMPTS:
        document = complete(url, prompt)
        assert document["choices"][0]["text"] == expected(prompt, 20)
        assert document["usage"]["completion_tokens"] == 20
        assert document["choices"][0]["finish_reason"] == "length"


def test_concurrent_requests_get_the_answers_they_get_alone(url: str) -> None:
    prompts = [f"{prompt} {i}" for i in range(6) for prompt in PROMPTS]
    alone = [complete(url, prompt)["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = [a["choices"][0]["text"] for a in pool.map(lambda prompt: complete(url, prompt), prompts)]
    assert together == alone
    several = complete(url, prompts)
    assert [choice["text"] for choice in several["choices"]] == alone
    assert several["usage"]["completion_tokens"] == 20 * len(prompts)


def test_stop_string_ends_and_echo_repeats(url: str) -> None:
    whole = complete(url, "plate")["choices"][0]["text"]
    stopper = whole[7:10]
    choice = complete(url, "plate", stop=stopper, echo=True)["choices"][0]
    assert choice["text"] == "plate" + whole[: whole.index(stopper)]
    assert choice["finish_reason"] == "stop"


def test_sampling_follows_temperature_and_top_p(url: str) -> None:
    greedy = complete(url, "plate")["choices"][0]["text"]
    hot = {complete(url, "plate", temperature=2)["choices"][0]["text"] for _ in range(4)}
    assert len(hot) > 1
    assert complete(url, "plate", temperature=2, top_p=0)["choices"][0]["text"] == greedy


def test_openai_client_completes_streams_and_counts(url: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        assert [entry.id for entry in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        options: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[:2], "max_tokens": 30, "temperature": 0}
        whole = client.completions.create(**options)
        texts, usage = ["", ""], None
        for event in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
            usage = event.usage or usage
            for choice in event.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage


def test_base_model_refuses_chat_with_openais_error(url: str) -> None:
    import openai

    messages: Any = [{"role": "user", "content": "a"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client, pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=messages)
    assert error.value.code == "no_chat_template"


def test_ask_and_converse_speak_to_the_service(url: str, expected: Callable[[str, int], str]) -> None:
    answer = ask(url, "The crust", 12)
    assert answer["text"] == expected("The crust", 12)
    assert answer["usage"]["completion_tokens"] == 12
    lines = iter(["plate", "plate " * POSITIONS, "crust", ""])
    written: list[tuple[str, str]] = []
    converse(url, lambda _: next(lines), lambda text, end, flush: written.append((text, end)), max_tokens=5)
    assert [end for _, end in written].count("\n") == 3
    assert [text.startswith("error: a prompt of") for text, _ in written].count(True) == 1
    with pytest.raises(UserError, match="do not fit"):
        ask(url, "plate", POSITIONS)
    with pytest.raises(RunFailed, match="no service at"):
        ask("http://127.0.0.1:9", "plate", 1)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": POSITIONS}, 400, "max_tokens"),
        ({"max_tokens": 10**12}, 400, "max_tokens"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "plate " * POSITIONS}, 400, "max_tokens"),
        ({"prompt": "x" * POSITIONS * 100}, 400, "prompt"),
        ({"prompt": ["plate"] * 100}, 400, "prompt"),
        ({"model": "other"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"top_k": 5}, 400, "top_k"),
        ({"seed": 5, "temperature": 1}, 400, "seed"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"prompt": {"text": "plate"}}, 400, "prompt"),
        (b"{not json", 400, None),
        (b"[]", 400, None),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    ],
)
def test_bad_request_is_refused_by_name_and_the_next_one_answered(
    url: str, change: Any, status: int, param: str | None
) -> None:
    good = {"model": "tiny", "prompt": "plate", "max_tokens": 3}
    for stream in (False, True):
        body = change if isinstance(change, bytes) else good | {"stream": stream} | change
        got, document, _ = post(url, body)
        assert (got, document["error"]["param"]) == (status, param), document
        assert set(document["error"]) == {"message", "type", "param", "code"}
    assert post(url, good)[0] == 200


def test_longest_possible_answer_is_given(url: str) -> None:
    tokens = len(make_tokenizer()("plate").input_ids)
    answer = complete(url, "plate", max_tokens=POSITIONS - tokens)
    assert answer["usage"]["total_tokens"] == POSITIONS or answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), ("/v1/models", 405)])
def test_unknown_route_and_method_have_openais_shape(url: str, path: str, status: int) -> None:
    got, document, _ = post(url, {}, path)
    assert (got, document["error"]["type"]) == (status, "invalid_request_error")


def test_key_is_asked_for_but_not_by_health(url: str) -> None:
    for key in ("", "another"):
        status, document, headers = post(url, {"model": "tiny", "prompt": "plate"}, key=key)
        assert (status, document["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    with urllib.request.urlopen(f"{url}/health") as response:
        assert json.load(response) == {"status": "ok", "model": "tiny", "sequences": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_hangs_up_frees_its_places(url: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": ["plate"] * 30, "max_tokens": POSITIONS - 10, "temperature": 0, "stream": stream}
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    wait_until(lambda: get(url, "/health")["sequences"] == 30, "all are running")
    connection.close()  # the answers would take some twenty seconds
    wait_until(lambda: get(url, "/health")["sequences"] == 0, "the places are free", 5)


def test_serve_elsewhere_in_the_same_cluster_is_refused(url: str, model: Path) -> None:
    with pytest.raises(UserError, match="Serve listens on"):
        deploy({"model": str(model)}, port=int(url.rsplit(":", 1)[1]) + 1)


# --- The engine alone -------------------------------------------------------------------------------------------------


def test_engine_cancels_overcommits_and_tells_when_it_is_dead(model: Path, expected: Callable[[str, int], str]) -> None:
    from serve.engine import Engine, EngineError, Sampling

    tokenizer = make_tokenizer()
    engine = Engine(model, max_sequences=8, max_length=128)
    scheduler = engine._manager.batch_processor.scheduler

    async def text(prompt: str) -> str:
        ids = [
            i
            async for new in engine.generate(tokenizer(prompt).input_ids, Sampling(max_tokens=60, temperature=0))
            for i in new
        ]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    async def cancel_one() -> None:
        async with contextlib.aclosing(engine.generate([5], Sampling(max_tokens=127))) as pieces:
            await anext(pieces)
        while scheduler.active_requests or scheduler.waiting_requests:
            await asyncio.sleep(0.01)
        engine.check()

    async def use() -> None:
        prompts = PROMPTS[:3] * 5
        assert await asyncio.gather(*map(text, prompts)) == [expected(prompt, 60) for prompt in prompts]
        await asyncio.wait_for(cancel_one(), 30)
        assert not engine._manager.output_router.result_handlers
        for prompt, sampling in (
            ([], Sampling(max_tokens=1)),
            ([5], Sampling(max_tokens=128)),
            ([9999], Sampling(max_tokens=1)),
        ):
            with pytest.raises(ValueError, match=r"token|together"):
                await anext(engine.generate(prompt, sampling))
        engine._manager.add_request([9999], max_new_tokens=1)  # what the checks above keep out
        with pytest.raises(EngineError):
            await text("plate")
        with pytest.raises(EngineError):
            engine.check()

    asyncio.run(use())
    engine.stop()


def test_engine_generates_with_llama_as_generate_does(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from serve.engine import Engine, Sampling

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        eos_token_id=[2, 3],
    )
    network = LlamaForCausalLM(config).eval()
    network.save_pretrained(tmp_path)
    engine = Engine(tmp_path, max_sequences=4)
    assert (engine.max_length, engine.end_ids) == (128, (2, 3))

    async def answer(prompt: list[int]) -> list[int]:
        return [i async for new in engine.generate(prompt, Sampling(max_tokens=40, temperature=0)) for i in new]

    async def answers(prompts: list[list[int]]) -> list[list[int]]:
        return await asyncio.gather(*map(answer, prompts))

    prompts = [list(range(4, 4 + n)) for n in (1, 7, 40, 88, 3, 64)]
    for prompt, ids in zip(prompts, asyncio.run(answers(prompts)), strict=True):
        whole = network.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=1)
        assert ids == whole[0, len(prompt) :].tolist()
    engine.stop()


# --- A second deployment over the first -------------------------------------------------------------------------------


def test_replicas_from_s3_follow_load_refuse_when_full_and_chat(
    url: str, bucket: str, model: Path, tmp_path: Path
) -> None:
    import openai
    from ray import serve

    chatty = tmp_path / "chatty"
    shutil.copytree(model, chatty)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(chatty)
    storage.upload_directory(chatty, f"{bucket}/run/chatty")
    args = {
        "model": f"{bucket}/run/chatty",
        "max_replicas": 2,
        "cpus_per_replica": 0.5,
        "target_ongoing_requests": 1,
        "max_ongoing_requests": 2,
        "max_queued_requests": 1,
        "upscale_delay_s": 0.5,
    }
    assert deploy(args, port=0) == url
    messages: Any = [{"role": "user", "content": "plate"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        options: dict[str, Any] = {"model": "chatty", "messages": messages, "max_tokens": 20, "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        pieces = [event.choices[0].delta.content for event in client.chat.completions.create(**options, stream=True)]
    assert "".join(piece or "" for piece in pieces) == whole
    lines = iter(["plate", "", ""])
    converse(url, lambda _: next(lines), lambda text, **_: None)

    def replicas() -> int:
        return int(serve.status().applications["terrane"].deployments["model"].replica_states.get("RUNNING", 0))

    assert replicas() == 1
    answers: list[tuple[int, Any]] = []
    loading = True

    def load() -> None:
        while loading:
            status, document, headers = post(
                url, {"model": "chatty", "prompt": "plate", "max_tokens": 300, "temperature": 0}
            )
            answers.append((status, document["choices"][0]["text"] if status == 200 else headers["Retry-After"]))

    with ThreadPoolExecutor(8) as pool:
        loaders = [pool.submit(load) for _ in range(8)]
        try:
            wait_until(lambda: replicas() == 2, "a second replica", 60)
            wait_until(lambda: {status for status, _ in answers} >= {200, 429}, "some are refused")
        finally:
            loading = False
    for loader in loaders:
        loader.result()
    assert {status for status, _ in answers} == {200, 429}
    assert {value for status, value in answers if status == 429} == {"5"}
    assert len({value for status, value in answers if status == 200}) == 1
