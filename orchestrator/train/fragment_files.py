"""The files of a checkpoint: torch.distributed.checkpoint's format, every item with its hash, on any storage.

A rank writes one file, item after item as torch.save has them; `.metadata` says where each item lies and what it hashes
to, and COMMITTED what `.metadata` hashes to. A reader takes of the files what it needs, and checks all that it takes.
torch's own FileSystemReader reads them too. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import groupby
from typing import IO, Any, TypeVar, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from orchestrator import storage
from orchestrator.errors import CheckpointDamaged, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

METADATA, XXH3, RAW = ".metadata", "xxh3", "raw"
LARGE = 2**14
"""Bytes. All else that torch.save writes of a tensor is far smaller."""

Finish = Callable[[dict[str, int], str], None]
"""Called on rank 0 with the bytes of every file by name, and the hash of `.metadata`."""
Keep = Callable[[str, IO[bytes]], AbstractContextManager[None]]
"""Called with the name of a file and all of it; copies it somewhere else while its block runs."""
Elsewhere = Callable[[str], Iterable[tuple[str, AbstractContextManager[IO[bytes]]]]]
"""The other places of a file, by its name: each in words and opened."""


def keep_nothing(name: str, file: IO[bytes]) -> AbstractContextManager[None]:
    file.close()
    return contextlib.nullcontext()


def no_copies(name: str) -> Iterable[tuple[str, AbstractContextManager[IO[bytes]]]]:
    return ()


class SaveFailed(Exception):
    """A checkpoint could not be written."""


class FragmentWriter(StorageWriter):
    """
    Args:
        finish: called when every file is on storage, and where it is kept besides.
    """

    def __init__(self, uri: str, finish: Finish, keep: Keep = keep_nothing) -> None:
        super().__init__()
        self._uri = uri
        self._finish = finish
        self._keep = keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data}{DEFAULT_SUFFIX}"
        uri = storage.join(self._uri, name)
        with _plain_error(), ExitStack() as keeping, storage.writing(uri) as path, path.open("wb") as file:
            results = [_write_item(file, name, item, planner) for item in plan.items]
            file.flush()
            keeping.enter_context(self._keep(name, path.open("rb")))  # beside the flush to disk and the upload
            os.fsync(file.fileno())
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for part in results for result in part]
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.version = CURRENT_DCP_VERSION
        data = pickle.dumps(metadata)
        files = {METADATA: len(data)}
        for where in metadata.storage_data.values():
            files[where.relative_path] = max(files.get(where.relative_path, 0), where.offset + where.length)
        with _plain_error():
            with self._keep(METADATA, io.BytesIO(data)):
                storage.write(storage.join(self._uri, METADATA), data)
            self._finish(files, digest(data))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: storage makes directories as they are needed."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, f"__{rank}_0", plan.planner_data) for rank, plan in enumerate(plans)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class FragmentReader(StorageReader):
    """
    Args:
        metadata_digest: what `.metadata` must hash to.
        copies: tried before storage. One that fails or holds something else is passed over.
    """

    def __init__(self, uri: str, metadata_digest: str, copies: Elsewhere = no_copies) -> None:
        super().__init__()
        self._uri = uri
        self._digest = metadata_digest
        self._copies = copies
        self.origin: Counter[str] = Counter()
        """Files by where they were read."""
        self._where: dict[Any, Any] = {}
        self._fault: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Empty where it could not be read; torch would take an error here for a file by rank, and go on without."""
        try:
            return self._read(METADATA, self._metadata)
        except Exception as error:
            self._fault = error
        return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            CheckpointDamaged: `.metadata` is not what was committed.
        """
        if self._fault:
            raise self._fault
        self._where = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """
        Raises:
            CheckpointDamaged: what was read is not what was written; the planner's tensors are not to be used.
        """

        def place(item: ReadItem) -> tuple[str, int]:
            where = self._where[item.storage_index]
            return where.relative_path, where.offset

        items = sorted(plan.items, key=place)
        self._room = bytearray(max((self._where[item.storage_index].length for item in items), default=0))
        for name, of_file in groupby(items, key=lambda item: place(item)[0]):
            self._read(name, partial(self._fill, list(of_file), planner))
        return _done(None)

    def _read(self, name: str, take: Callable[[str, IO[bytes]], T]) -> T:
        """What is taken from a file, at the first place where it is what was written."""
        for place, copy in self._copies(name):
            try:
                with copy as file:
                    taken = take(place, file)
                self.origin["memory"] += 1
                return taken
            except (OSError, CheckpointDamaged) as error:
                log.warning("%s; passed over", error)
        uri = storage.join(self._uri, name)
        try:
            with storage.reading(uri) as file:
                taken = take(uri, file)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CheckpointDamaged(f"{uri} is missing") from None
        self.origin["storage"] += 1
        return taken

    def _metadata(self, place: str, file: IO[bytes]) -> Metadata:
        data = file.read()
        if digest(data) != self._digest:
            raise CheckpointDamaged(f"{place} is damaged")
        return cast(Metadata, pickle.loads(data))

    def _fill(self, items: list[ReadItem], planner: LoadPlanner, place: str, file: IO[bytes]) -> None:
        for tensor, item in self._tensors(items, place, file):
            part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).copy_(part)

    def _tensors(self, items: list[ReadItem], place: str, file: IO[bytes]) -> Iterator[tuple[torch.Tensor, ReadItem]]:
        """What is stored for each item; for items that follow each other and need the same it is read once."""
        for index, needing in groupby(items, key=lambda item: item.storage_index):
            where = self._where[index]
            data = memoryview(self._room)[: where.length]
            file.seek(where.offset)
            if cast(io.BufferedReader, file).readinto(data) != where.length or digest(data) != vars(where)[XXH3]:
                end = where.offset + len(data)
                raise CheckpointDamaged(f"{place} is damaged between bytes {where.offset} and {end}")
            tensor = _tensor(data, vars(where).get(RAW))
            for item in needing:
                yield tensor, item

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader is for one checkpoint."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Hashed:
    """A file that hashes what is written to it, as far as torch.save needs a file.

    Args:
        raw_bytes: of the elements of the tensor to write.
    """

    def __init__(self, file: IO[bytes], raw_bytes: int) -> None:
        import xxhash

        self._file = file
        self._digest = xxhash.xxh3_128()
        self._raw_bytes = raw_bytes if raw_bytes >= LARGE else None
        self.length = 0
        self.raw: int | None = None
        """Where the elements of a large tensor lie: torch.save writes them in one piece."""
        self.error: OSError | None = None
        """What a write has failed with: torch.save ends with a complaint of its own about it."""

    def write(self, data: Any) -> int:
        if len(data) == self._raw_bytes:
            self.raw = self.length
        self._digest.update(data)
        self.length += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing to do: the whole file is made durable at its end."""

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())


def _write_item(file: IO[bytes], name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    tensor = cast(torch.Tensor, planner.resolve_data(item))
    offset, hashed = file.tell(), _Hashed(file, tensor.nbytes)
    with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        try:
            torch.save(tensor, cast(IO[bytes], hashed))
        except RuntimeError as error:
            raise hashed.error or error from None
    where = _StorageInfo(name, offset, hashed.length)
    # These are pickled with the rest; torch's own reader does not look at them.
    vars(where)[XXH3] = hashed.hexdigest()
    if hashed.raw is not None:
        vars(where)[RAW] = (hashed.raw, tensor.dtype, tuple(tensor.shape))
    return WriteResult(item.index, hashed.length, where)


@contextlib.contextmanager
def _plain_error() -> Iterator[None]:
    """Of errors only the words travel to the other ranks: not every library's can be pickled."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise SaveFailed(f"{type(error).__name__}: {error}") from error


def _tensor(data: memoryview, raw: tuple[int, torch.dtype, tuple[int, ...]] | None) -> torch.Tensor:
    """What torch.save wrote; a large tensor lies on the data itself, where torch.load would make a copy."""
    if raw is None:
        return cast(torch.Tensor, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    offset, dtype, shape = raw
    return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def digest(data: bytes | memoryview) -> str:
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(data))


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
