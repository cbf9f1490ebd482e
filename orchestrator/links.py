"""How fast one node reaches another, measured with plain sockets; and who measures with whom when."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from orchestrator.findings import Link

ALL_PAIRS_UP_TO = 16
"""Nodes. More of them measure a ring, and a number of random pairs that grows with the logarithm."""

_TOKEN_BYTES = 16
_SIZE = struct.Struct(">Q")
_DONE = b"."
_PINGS = 20
_WARM_UP_BYTES = 2**18
_MOST_BYTES = 2**26
_AIM_S = 0.1
"""That the timed transfer takes: long against the latency, short against a person's patience."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a LinkServer listens."""

    host: str
    port: int
    token: bytes
    """Shown first by who connects; others are sent away."""


class LinkServer:
    """The far end of measurements, on one address of this node: takes bytes and says when it has them.

    It listens until it is closed, and no longer than its lifetime.

    Args:
        host: this node's own address, as the other nodes know it.
    """

    def __init__(self, host: str, lifetime_s: float = 120.0) -> None:
        if not host or ipaddress.ip_address(host).is_unspecified:
            raise ValueError(f"{host!r} is every address of this machine: a link has one")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._ends_at = time.monotonic() + lifetime_s
        self.endpoint = Endpoint(
            host=host, port=self._listener.getsockname()[1], token=secrets.token_bytes(_TOKEN_BYTES)
        )
        self._thread = threading.Thread(target=self._serve, name="link-server", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread from its wait
        self._thread.join()

    def _serve(self) -> None:
        with self._listener:
            while (left := self._ends_at - time.monotonic()) > 0:
                self._listener.settimeout(left)
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # closed, or out of time
                    return
                with connection, contextlib.suppress(OSError, EOFError):
                    connection.settimeout(min(left, 10.0))
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        buffer = memoryview(bytearray(2**18))
        if not secrets.compare_digest(_receive(connection, _TOKEN_BYTES), self.endpoint.token):
            return
        while True:
            (left,) = _SIZE.unpack(_receive(connection, _SIZE.size))
            if left > _MOST_BYTES:
                return
            while left:
                left -= _got(connection.recv_into(buffer[: min(left, len(buffer))]))
            connection.sendall(_DONE)


def measure_link(endpoint: Endpoint, timeout_s: float = 10.0) -> Link:
    """The link from this node to a LinkServer. A link that carries nothing has an `error`, and no speed."""
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(endpoint.token)
            return _measured(connection)
    except (OSError, EOFError) as error:
        return Link(error=str(error) or type(error).__name__)


def _measured(connection: socket.socket) -> Link:
    latency_s = min(_transfer_s(connection, 1) for _ in range(_PINGS)) / 2
    estimate = min(_transfer_s(connection, _WARM_UP_BYTES) for _ in range(2)) / _WARM_UP_BYTES
    size = min(max(int(_AIM_S / estimate), _WARM_UP_BYTES), _MOST_BYTES)
    return Link(latency_s=latency_s, bytes_per_s=size / _transfer_s(connection, size))


def _transfer_s(connection: socket.socket, size: int) -> float:
    """Until the other end says that it has the bytes."""
    block = memoryview(bytes(min(size, 2**18)))
    began = time.perf_counter()
    connection.sendall(_SIZE.pack(size))
    for start in range(0, size, len(block)):
        connection.sendall(block[: size - start])
    _receive(connection, len(_DONE))
    return time.perf_counter() - began


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        _got(len(part))
        data += part
    return data


def _got(count: int) -> int:
    if not count:
        raise EOFError("the other end hung up")
    return count


# --- who measures with whom -------------------------------------------------------------------------------------------

Round = list[tuple[str, str]]
"""Pairs that measure at the same time: every node is in one of them at most, so that none shares its link."""


def rounds(nodes: Sequence[str]) -> list[Round]:
    """Every pair once for up to ALL_PAIRS_UP_TO nodes; a ring and ceil(log2(nodes)) random rounds for more. The same
    for the same nodes."""
    ordered = sorted(nodes)
    if len(ordered) <= ALL_PAIRS_UP_TO:
        return list(_circle(ordered))
    chosen = random.Random(len(ordered))
    tried = [*_ring(ordered), *(_shuffled(ordered, chosen) for _ in range(math.ceil(math.log2(len(ordered)))))]
    return list(_without_repeats(tried))


def _circle(nodes: Sequence[str]) -> Iterator[Round]:
    """The schedule of a round-robin tournament: one stands still, the others turn around it."""
    seats: list[str | None] = [*nodes, None] if len(nodes) % 2 else [*nodes]
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(one, other) for one, other in facing if one is not None and other is not None]
        seats.insert(1, seats.pop())


def _ring(nodes: Sequence[str]) -> Iterator[Round]:
    neighbours = [(node, nodes[(n + 1) % len(nodes)]) for n, node in enumerate(nodes)]
    odd = neighbours[-1:] if len(nodes) % 2 else []
    yield neighbours[: len(nodes) - len(odd) : 2]
    yield neighbours[1 : len(nodes) - len(odd) : 2]
    yield odd


def _shuffled(nodes: Sequence[str], chosen: random.Random) -> Round:
    order = chosen.sample(nodes, len(nodes))
    return list(zip(order[::2], order[1::2], strict=False))


def _without_repeats(tried: list[Round]) -> Iterator[Round]:
    seen: set[frozenset[str]] = set()
    for pairs in tried:
        fresh = [pair for pair in pairs if frozenset(pair) not in seen]
        seen |= {frozenset(pair) for pair in fresh}
        if fresh:
            yield fresh
