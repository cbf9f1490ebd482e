"""torch.distributed.checkpoint planners for fragments: each is a chunk of its parameter, in its coordinates."""

from __future__ import annotations

import io

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    Metadata,
    ReadItem,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from orchestrator.errors import RunFailed
from orchestrator.train.fragments import PARAM, Fragment


def key(kind: str, name: str) -> str:
    """Name of a tensor in the checkpoint: `param/model.decoder...`."""
    return f"{kind}/{name}"


class FragmentSavePlanner(DefaultSavePlanner):
    """Writes fragments where the default planner would walk a state dict."""

    def __init__(self, fragments: list[Fragment]) -> None:
        super().__init__(dedup_save_to_lowest_rank=False)
        self._tensors = {
            MetadataIndex(key(kind, fragment.name), fragment.box.offsets): (fragment.shape, tensor)
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        }

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(index, shape, t) for index, (shape, t) in self._tensors.items()]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._tensors[MetadataIndex(write_item.index.fqn, write_item.index.offset)][1].detach()


class FragmentLoadPlanner(DefaultLoadPlanner):
    """Reads whatever chunks of a checkpoint overlap the fragments, in place."""

    def __init__(self, fragments: list[Fragment]) -> None:
        super().__init__()
        self._fragments = fragments
        self._targets = {
            (key(kind, fragment.name), fragment.box.offsets): (fragment.shape, tensor)
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        }

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for (fqn, offsets), (shape, tensor) in self._targets.items():
            stored = self.metadata.state_dict_metadata.get(fqn)
            if not isinstance(stored, TensorStorageMetadata):
                raise RunFailed(f"the checkpoint holds no {fqn}")
            if tuple(stored.size) != shape:
                raise RunFailed(f"the checkpoint's {fqn} is {list(stored.size)}, the model's {list(shape)}")
            chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
            found = create_read_items_for_chunk_list(fqn, stored, [chunk])
            if sum(item.lengths.numel() for item in found) != tensor.numel():
                raise RunFailed(f"the checkpoint does not cover {fqn}")
            items += found
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        fqn, offset = read_item.dest_index.fqn, read_item.dest_index.offset
        assert offset is not None
        target = self._targets[fqn, tuple(offset)][1].detach()
        return narrow_tensor_by_index(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: resolve_tensor gave a view of the live state."""


def _write_item(index: MetadataIndex, shape: tuple[int, ...], tensor: torch.Tensor) -> WriteItem:
    assert index.offset is not None
    chunk = ChunkStorageMetadata(index.offset, tensor.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def stored_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter in a checkpoint, by name."""
    prefix = key(PARAM, "")
    return {
        fqn.removeprefix(prefix): tuple(stored.size)
        for fqn, stored in metadata.state_dict_metadata.items()
        if fqn.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
