"""Links between nodes: measured, and who measures when."""

from __future__ import annotations

import itertools
import math
import socket
from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.links import ALL_PAIRS_UP_TO, LinkServer, measure_link, rounds


def names(count: int) -> list[str]:
    return [f"n{number:04d}" for number in range(count)]


@pytest.mark.parametrize("count", [*range(ALL_PAIRS_UP_TO + 1), 17, 18, 31, 64, 513])
def test_in_a_round_every_node_is_in_one_pair_and_no_pair_comes_twice(count: int) -> None:
    found = rounds(names(count))
    for pairs in found:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs)
    assert max(Counter(frozenset(pair) for pairs in found for pair in pairs).values(), default=1) == 1


@pytest.mark.parametrize("count", range(2, ALL_PAIRS_UP_TO + 1))
def test_few_nodes_measure_every_pair_in_as_few_rounds_as_there_can_be(count: int) -> None:
    found = rounds(names(count))
    assert sum(map(len, found)) == count * (count - 1) // 2
    assert len(found) == count - 1 + count % 2


@pytest.mark.parametrize("count", [17, 100, 1000])
def test_many_nodes_measure_a_ring_and_a_few_random_pairs(count: int) -> None:
    found = rounds(names(count))
    pairs = {frozenset(pair) for pair in itertools.chain(*found)}
    assert {frozenset(pair) for pair in zip(names(count), [*names(count)[1:], "n0000"], strict=True)} <= pairs
    assert len(found) <= 3 + math.ceil(math.log2(count))
    degree = Counter(itertools.chain(*pairs))
    assert min(degree.values()) >= 2
    assert len(degree) == count


def test_the_schedule_is_the_same_for_the_same_nodes() -> None:
    assert rounds(names(40)) == rounds(names(40)[::-1])
    assert rounds(names(9)) == rounds(names(9)[::-1])


def test_a_link_has_a_latency_and_a_bandwidth() -> None:
    with LinkServer("127.0.0.1") as server:
        for _ in range(2):
            link = measure_link(server.endpoint)
            assert not link.error
            assert 0 < link.latency_s < 1
            assert link.bytes_per_s > 1e6


def test_nothing_listens_once_the_server_is_closed() -> None:
    with LinkServer("127.0.0.1") as server:
        pass
    assert "refused" in measure_link(server.endpoint).error


def test_a_server_ends_by_itself() -> None:
    server = LinkServer("127.0.0.1", lifetime_s=0.05)
    server._thread.join(10)
    assert "refused" in measure_link(server.endpoint).error
    server.close()


def test_a_server_listens_on_the_address_of_its_node_alone() -> None:
    for host in ("", "0.0.0.0", "::"):
        with pytest.raises(ValueError, match="every address"):
            LinkServer(host)
    with LinkServer("127.0.0.1") as server:
        assert server._listener.getsockname()[0] == "127.0.0.1"


def test_strangers_are_sent_away_and_the_next_is_served() -> None:
    with LinkServer("127.0.0.1") as server:
        assert measure_link(replace(server.endpoint, token=b"x" * 16)).error
        with socket.create_connection((server.endpoint.host, server.endpoint.port)) as connection:
            connection.sendall(server.endpoint.token + b"\xff" * 8)  # more bytes than anyone may send
            assert connection.recv(1) == b""
        assert not measure_link(server.endpoint).error
