from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import storage
from orchestrator.data import shards
from orchestrator.data.shards import Packed, ShardReader
from orchestrator.errors import ShardLost


def packed(sequences: int, length: int, first: int = 0) -> Packed:
    tokens = np.arange(first, first + sequences * length, dtype=np.uint32)
    return Packed(tokens, [(len(tokens) - 3, "a"), (3, "b")])


def test_sequences_are_found_by_sample_id_across_shards(anywhere: str) -> None:
    written = [shards.write_shard(anywhere, f"shards/{n}.arrow", packed(5, 8, n * 40), 8, 1000) for n in range(3)]
    reader = ShardReader(anywhere, written, 8, 1000)
    assert len(reader) == 15
    ids = np.array([14, 0, 5, 4, 14])
    assert np.array_equal(reader.take(ids), np.arange(120).reshape(15, 8)[ids])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50_000, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_tokens_take_the_narrowest_type(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    shard = shards.write_shard(str(tmp_path), "s.arrow", packed(2, 4), 4, vocab_size)
    assert ShardReader(str(tmp_path), [shard], 4, vocab_size).take(np.array([0])).dtype == dtype


def test_the_sidecar_traces_every_token(tmp_path: Path) -> None:
    shards.write_shard(str(tmp_path), "s.arrow", packed(5, 8), 8, 1000)
    data = storage.read(str(tmp_path / ("s.arrow" + shards.SIDECAR)))
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
    assert table == [{"start": 0, "length": 37, "document": "a"}, {"start": 37, "length": 3, "document": "b"}]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shard = shards.write_shard(str(tmp_path), "s.arrow", packed(50, 8), 8, 1000)
    data = bytearray((tmp_path / "s.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "s.arrow").write_bytes(data)
    with pytest.raises(ShardLost, match=r"s\.arrow is damaged"):
        ShardReader(str(tmp_path), [shard], 8, 1000).take(np.array([0]))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = shards.write_shard(str(tmp_path), "s.arrow", packed(5, 8), 8, 1000)
    (tmp_path / "s.arrow").unlink()
    with pytest.raises(ShardLost, match=r"s\.arrow is missing"):
        ShardReader(str(tmp_path), [shard], 8, 1000).take(np.array([0]))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(0, 250))
def test_a_split_keeps_every_token_with_its_document(lengths: list[int], position: int) -> None:
    documents = [(length, str(n)) for n, length in enumerate(lengths)]
    whole = Packed(np.arange(sum(lengths), dtype=np.uint32), documents)
    position = min(position, sum(lengths))
    before, after = whole.split_at(position)
    for part in (before, after):
        assert len(part.tokens) == sum(length for length, _ in part.documents)
    assert len(before.tokens) == position
    again = shards.join([before, after])
    owners = np.repeat([d for _, d in documents], [n for n, _ in documents])
    assert np.array_equal(again.tokens, whole.tokens)
    assert np.array_equal(np.repeat([d for _, d in again.documents], [n for n, _ in again.documents]), owners)
