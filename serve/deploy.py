"""Start a service on the connected Ray cluster, talk to it, and print how to deploy the same elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.errors import RunFailed, UserError
from serve.args import ServeArgs, parse_args
from serve.auth import read_keys

APP_NAME = "terrane"
POLL_S = 0.2


def deploy(
    args: ServeArgs | Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    app_name: str = APP_NAME,
    timeout_s: float = 600.0,
) -> str:
    """Deploy on the Ray cluster this process is connected to and wait until /health answers.

    Args:
        port: 0 takes a free one, or the one where Serve already listens in this cluster.

    Returns:
        The base URL, such as http://127.0.0.1:8000.

    Raises:
        UserError: an argument, the model directory or the API keys are wrong, or Serve already listens elsewhere.
        RunFailed: no replica came up within the time; says what Serve says.
    """
    from ray import serve

    from serve.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    parsed = parse_args(args)
    application = build(parsed.model_dump())
    url = _listen(host, port)
    deadline = time.monotonic() + timeout_s
    try:
        target = serve.RunTarget(target=application, name=app_name, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(app_name, deadline)
        _wait_until_healthy(url, deadline)
    except RunFailed:
        with contextlib.suppress(
            TimeoutError
        ):  # a replica that waits for resources goes away only after its grace time
            serve.delete(app_name)
        raise
    return url


def stop() -> None:
    """Shut Serve down on the connected cluster, with every application."""
    from ray import serve

    serve.shutdown()


def ask(url: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One completion at temperature 0.

    Returns:
        {"text", "usage", "finish_reason", "seconds"}; seconds is what the client waited.

    Raises:
        UserError: the service refused the request.
        RunFailed: there is no service at url, or it failed.
    """
    body = {"model": _served(url)["id"], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    start = time.monotonic()
    with _open(url, "/v1/completions", body) as response:
        answer = json.load(response)
    choice = answer["choices"][0]
    return {
        "text": choice["text"],
        "usage": answer["usage"],
        "finish_reason": choice["finish_reason"],
        "seconds": time.monotonic() - start,
    }


def converse(
    url: str, read: Callable[[str], str] = input, write: Callable[..., None] = print, *, max_tokens: int = 128
) -> None:
    """Talk in a terminal until an empty line or the end of input. A base model completes each line by itself.

    Args:
        write: called with text, end="" and flush=True for every piece of an answer.

    Raises:
        RunFailed: there is no service at url, or it failed.
    """
    model = _served(url)
    max_tokens = min(max_tokens, model["max_model_length"] // 2)
    messages: list[dict[str, str]] = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while line := read("> ").strip():
            messages.append({"role": "user", "content": line})
            path, body = "/v1/chat/completions", {"messages": messages}
            if not model["chat"]:
                path, body = "/v1/completions", {"prompt": line}  # type: ignore[dict-item]
            pieces: list[str] = []
            try:
                for piece in stream(url, path, {"model": model["id"], "max_tokens": max_tokens, **body}):
                    pieces.append(piece)
                    write(piece, end="", flush=True)
                messages.append({"role": "assistant", "content": "".join(pieces)})
            except UserError as error:  # too long, most likely: the conversation starts anew
                messages.clear()
                write(f"error: {error.message}", end="", flush=True)
            write("", end="\n", flush=True)


def stream(url: str, path: str, body: dict[str, Any]) -> Iterator[str]:
    """Pieces of an answer's text as they come; raises as `ask` does."""
    with _open(url, path, body | {"stream": True}) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RunFailed(f"the service at {url} failed: {event['error']['message']}")
            for choice in event["choices"]:
                yield choice["text"] if "text" in choice else choice["delta"].get("content", "")


def serve_config(args: ServeArgs | Mapping[str, Any]) -> dict[str, Any]:
    """The Serve config document that deploys the same service declaratively."""
    parsed = parse_args(args)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "args": parsed.model_dump(exclude_defaults=True),
            }
        ],
    }


def equivalents(args: ServeArgs | Mapping[str, Any]) -> str:
    """How to deploy the same on a running cluster and on Kubernetes: text to print."""
    import yaml

    return f"""\
# On a running Ray cluster, with this in serve.yaml (the model must be readable from every node):
#     serve deploy serve.yaml --address http://HEAD:8265
# On Kubernetes it is the text of spec.serveConfigV2 of a KubeRay RayService; k8s/ has the manifests.
{yaml.safe_dump(serve_config(args), sort_keys=False)}"""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _listen(host: str, port: int) -> str:
    """Start Serve's proxy. Its address is fixed while Serve runs, so a running one must be where we are asked to be."""
    from ray import serve
    from ray.serve.context import _get_global_client  # no public call tells where Serve listens

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        options = {"host": host, "port": port or free_port(host)}
        serve.start(proxy_location="HeadOnly", http_options=options)
        running = _get_global_client()
    http = running.http_config
    if port not in (0, http.port):
        raise UserError(
            f"Serve listens on {http.host}:{http.port} in this Ray cluster, not on port {port}",
            f"use port {http.port}, or shut Serve down first",
        )
    return f"http://{'127.0.0.1' if http.host in ('0.0.0.0', '::') else http.host}:{http.port}"


def _wait_until_running(app_name: str, deadline: float) -> None:
    from ray import serve

    status, message = "NOT_STARTED", ""
    while status != "RUNNING":
        if application := serve.status().applications.get(app_name):
            status = application.status.value
            message = next((d.message for d in application.deployments.values() if d.message), application.message)
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RunFailed(
                f"the service did not start: {_reason(message)}", "Serve's controller log has the traceback"
            )
        if time.monotonic() > deadline:
            hint = "does the cluster have the CPUs, GPUs and memory that a replica asks for?"
            raise RunFailed(f"the service is still {status}: {_reason(message)}", hint)
        time.sleep(POLL_S)


def _reason(message: str) -> str:
    """The exception, out of a message that ends with its traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1].removeprefix("orchestrator.errors.UserError: ") if lines else "Serve says nothing more"


def _wait_until_healthy(url: str, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=max(1.0, deadline - time.monotonic())):
                return
        except OSError as error:  # URLError, HTTPError and timeouts
            if time.monotonic() > deadline:
                raise RunFailed(f"{url}/health does not answer: {error}") from None
        time.sleep(POLL_S)


def _served(url: str) -> dict[str, Any]:
    """The entry of /v1/models."""
    with _open(url, "/v1/models") as response:
        models: list[dict[str, Any]] = json.load(response)["data"]
    return models[0]


def _open(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if keys := read_keys():
        headers["Authorization"] = f"Bearer {keys[0]}"
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from None
    except OSError as error:
        raise RunFailed(f"no service at {url}: {error}", "is it running? `terrane serve MODEL` starts one") from None


def _refusal(url: str, error: urllib.error.HTTPError) -> UserError:
    text = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    if error.code < 500 and error.code != 429:
        return UserError(text)
    return RunFailed(f"the service at {url} answers {error.code}: {text}")
