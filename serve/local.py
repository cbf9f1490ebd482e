"""`terrane serve` and `terrane chat`: a service on one machine, for as long as somebody wants it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator import cluster
from orchestrator.errors import UserError
from serve import deploy
from serve.args import check_model, parse_args


def serve_until_interrupted(
    args: Mapping[str, Any], *, host: str, port: int, address: str | None, say: Callable[[str], Any]
) -> None:
    """Serve a model until Ctrl-C or SIGTERM, then take the service down.

    Raises:
        UserError: the model or an argument is wrong, before anything starts.
    """
    with _service(args, host=host, port=port, address=address) as url:
        say(f"serving on {url} (Ctrl-C stops)\n")
        say(f"  curl {url}/v1/completions -H 'Content-Type: application/json' \\")
        say(f"""    -d '{{"model": "{parse_args(args).model_id}", "prompt": "The", "max_tokens": 16}}'\n""")
        say(deploy.equivalents(args))
        _wait_for_signal()
        say("stopping")


def _wait_for_signal() -> None:
    """Sleep until Ctrl-C or SIGTERM, and take either as the wish to stop."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()


def chat_with(target: str, say: Callable[[str], Any]) -> None:
    """Talk to the service at a URL, or serve a model directory and talk to it."""
    if target.startswith(("http://", "https://")):
        deploy.converse(target)
        return
    with _service({"model": target}, host="127.0.0.1", port=0, address=None) as url:
        say(f"{url}; an empty line ends the talk")
        deploy.converse(url)


def _check_port(host: str, port: int) -> None:
    """
    Raises:
        UserError: nobody could listen there.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}", "give another --port; 0 takes a free one") from None


@contextmanager
def _service(args: Mapping[str, Any], *, host: str, port: int, address: str | None) -> Iterator[str]:
    check_model(parse_args(args))
    _check_port(host, port)
    with cluster.connection(address):
        try:
            yield deploy.deploy(args, host=host, port=port)
        finally:
            deploy.stop()
