"""Copies of a checkpoint's files in the memory of nodes, as ranks see them: kept as they are written, and read first.

A rank puts its file into the memory of its own node and of the next in the ring of the plan's nodes, where a
fragment_memory.CopyServer stands, so that all of a checkpoint outlives any worker and any one node. Storage has all of
it, too: a copy that cannot be kept or read is never an error. Imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from orchestrator.train.checkpoints import Commit, attempt_folder, step_folder
from orchestrator.train.fragment_memory import Held, Refused, Save, lines, prepare, receive, receive_into, tell

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""Without a byte from a node, after which its memory is given up."""
AHEAD = 2**20
"""Bytes. Small items that follow each other come in one request."""


# --- for the supervisor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the ranks of an attempt keep copies, and where they find those of the checkpoint to go on from. Crosses
    process borders as plain values."""

    token: str
    ring: dict[str, str]
    """Address of every node's server by node id, in the order of the plan's nodes."""
    found: dict[str, list[str]] = field(default_factory=dict)
    """Addresses that hold a file of the checkpoint, by its name below the attempt's folder."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def sizes(listings: Mapping[str, Iterable[Held]]) -> dict[str, int]:
    """Bytes of every file that survives in a memory, by its name below the checkpoints: for `checkpoints.newest`.

    Args:
        listings: by the address of the server.
    """
    return {
        f"{step_folder(held.step)}/{attempt_folder(held.attempt)}/{held.name}": held.bytes
        for listing in listings.values()
        for held in listing
    }


def found(listings: Mapping[str, Iterable[Held]], commit: Commit) -> dict[str, list[str]]:
    """The addresses that hold each file of a checkpoint: for `Places`."""
    places: dict[str, list[str]] = {}
    for address, listing in listings.items():
        for held in listing:
            of_commit = (held.attempt, held.step) == (commit.attempt, commit.step)
            if of_commit and commit.files.get(f"{commit.folder}/{held.name}") == held.bytes:
                places.setdefault(held.name, []).append(address)
    return places


# --- for a rank -------------------------------------------------------------------------------------------------------


class Holder:
    """A node's memory, over the network. What fails is an OSError, whatever it is."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._token = token

    def put(self, save: Save, name: str, file: IO[bytes]) -> None:
        """All of a file, from its beginning."""
        size = file.seek(0, io.SEEK_END)
        with self._connected() as connection:
            _ask(connection, do="put", **save._asdict(), name=name, size=size)
            file.seek(0)  # sendfile begins there only with what has a descriptor
            connection.sendfile(file)
            _answer(connection)

    def commit(self, save: Save) -> None:
        with self._connected() as connection:
            _ask(connection, do="commit", **save._asdict())

    @contextlib.contextmanager
    def open(self, save: Save, name: str) -> Iterator[IO[bytes]]:
        """A seekable stream of a file."""
        with self._connected() as connection, io.BufferedReader(_Remote(connection, save, name), AHEAD) as stream:
            yield stream

    def listing(self) -> list[Held]:
        with self._connected() as connection:
            return [Held(*row) for row in json.loads(receive(connection, _ask(connection, do="list")))]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
                prepare(connection, PATIENCE_S)
                connection.sendall(self._token.encode())
                yield connection
        except (EOFError, Refused) as error:
            raise OSError(f"the memory of {self.address}: {error}") from None


class Copies:
    """A rank's: without arguments, of a rank that has none.

    Args:
        keep: the memories that hold what it writes.
        found: those that hold files of the checkpoint to go on from, the nearest first.
    """

    def __init__(self, keep: Sequence[Holder] = (), found: Mapping[str, Sequence[Holder]] | None = None) -> None:
        self._keep = keep
        self._found = found or {}

    @staticmethod
    def of(places: dict[str, Any] | None, node_id: str) -> Copies:
        """Those of a rank on this node."""
        if places is None:
            return Copies()
        known = Places(**places)
        nodes, own = list(known.ring), known.ring.get(node_id)
        neighbour = known.ring[nodes[(nodes.index(node_id) + 1) % len(nodes)]] if own else None
        keep = dict.fromkeys(address for address in (own, neighbour) if address)
        return Copies(
            keep=[Holder(address, known.token) for address in keep],
            found={
                name: [Holder(address, known.token) for address in sorted(addresses, key=lambda a: a != own)]
                for name, addresses in known.found.items()
            },
        )

    @contextlib.contextmanager
    def keeping(self, save: Save, name: str, file: IO[bytes]) -> Iterator[None]:
        """Put a file into the memories while the block runs; at its end they have it, or the log says why not.

        Args:
            file: whole, and left to this function, which closes it.
        """
        putting = threading.Thread(target=self._put, args=(save, name, file), name=f"copy-{name}", daemon=True)
        putting.start()
        try:
            yield
        finally:
            putting.join()

    def _put(self, save: Save, name: str, file: IO[bytes]) -> None:
        with file:
            for holder in self._keep:
                with _told(f"step {save.step}: storage has {name}, and {holder.address} no copy"):
                    holder.put(save, name, file)

    def commit(self, save: Save) -> None:
        """The save is committed: those before it may go."""
        for holder in self._keep:
            with _told(f"step {save.step}: {holder.address} does not know of the commit"):
                holder.commit(save)

    def places(self, save: Save, name: str) -> Iterator[tuple[str, AbstractContextManager[IO[bytes]]]]:
        """Where a file can be read, in words and opened."""
        for holder in self._found.get(name, ()):
            yield f"{name} in the memory of {holder.address}", holder.open(save, name)


@contextlib.contextmanager
def _told(consequence: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", consequence, error)


class _Remote(io.RawIOBase):
    """A file in a node's memory; each read is one request."""

    def __init__(self, connection: socket.socket, save: Save, name: str) -> None:
        super().__init__()
        self._connection = connection
        self._file = {**save._asdict(), "name": name}
        self._size = int(receive(connection, _ask(connection, do="size", **self._file)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        _ask(self._connection, do="get", **self._file, offset=self._position, length=length)
        receive_into(self._connection, memoryview(buffer)[:length])
        self._position += length
        return length


def _ask(connection: socket.socket, **request: Any) -> int:
    """Returns the bytes that follow the answer."""
    tell(connection, request)
    return _answer(connection)


def _answer(connection: socket.socket) -> int:
    answer = next(lines(connection), None)
    if answer is None:
        raise EOFError("no answer came")
    if "refused" in answer:
        raise Refused(answer["refused"])
    return int(answer["bytes"])
