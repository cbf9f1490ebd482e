"""What a node keeps in memory of the checkpoints that its ranks, and those of the node before it, have written last.

It outlives the ranks, in a process of its own, and serves them over TCP: the same way for its own node and for others.
A connection begins with the run's token. A request is a line of JSON, and so is its answer; the bytes of a file follow
the request (put) or the answer (get).

Nothing here is trusted: a reader goes by COMMITTED, which is on storage, and checks the hash of all that it reads.
Imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import mmap
import secrets
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

SHARE_OF_NODE = 0.25
"""Of a node's memory that copies may take."""
TOKEN_BYTES = 32
LONGEST_LINE = 2**16
PIECE = 2**22
IDLE_S = 120.0
"""After which a connection is given up that nothing comes on: its rank may be behind a cut link."""


class Save(NamedTuple):
    """One save of a run; of two the later one is the greater, also where training has gone back some steps."""

    attempt: int
    step: int


class Held(NamedTuple):
    """A whole file in a memory."""

    attempt: int
    step: int
    name: str
    bytes: int


class Refused(Exception):
    """A memory does not take a file, or does not have it; says why."""


@dataclass(eq=False)
class Room:
    """A file in the making, and later the file. However the process ends, the kernel takes the memory back."""

    data: memoryview
    sealed: bool = False

    @staticmethod
    def of(size: int) -> Room:
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return Room(memoryview(pages)[:size])


class FragmentMemory:
    """The files of the newest committed save, and of the one in flight. Thread-safe.

    Args:
        limit_bytes: of all files. Where the save in flight does not fit in beside the committed one, it takes its
            place; where it does not fit in at all, it is refused, and storage alone has it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._files: dict[Save, dict[str, Room]] = {}
        self._committed: Save | None = None
        self._lock = threading.Lock()

    def begin(self, save: Save, name: str, size: int) -> Room:
        """Room for a file of so many bytes, which counts once they are written and sealed.

        Raises:
            Refused: there is too little room, or a later save has been committed.
        """
        with self._lock:
            if self._committed and save < self._committed:
                raise Refused(f"a later save than {save} has been committed")
            self._files.get(save, {}).pop(name, None)
            self._make_room(save, size)
            room = self._files.setdefault(save, {})[name] = Room.of(size)
            return room

    def seal(self, save: Save, name: str, room: Room) -> None:
        """
        Raises:
            Refused: the file has had to make room meanwhile.
        """
        with self._lock:
            if self._files.get(save, {}).get(name) is not room:
                raise Refused(f"{name} of {save} has made room for another")
            room.sealed = True

    def abandon(self, save: Save, name: str, room: Room) -> None:
        """Of a file that was not written to its end."""
        with self._lock:
            if self._files.get(save, {}).get(name) is room:
                del self._files[save][name]

    def commit(self, save: Save) -> None:
        """All saves before this one are of no use any more."""
        with self._lock:
            self._committed = max(self._committed or save, save)
            self._files = {held: files for held, files in self._files.items() if held >= self._committed}

    def file(self, save: Save, name: str) -> memoryview:
        """All of a file; it stays as it is when it is dropped.

        Raises:
            Refused: it is not held.
        """
        with self._lock:
            room = self._files.get(save, {}).get(name)
        if room is None or not room.sealed:
            raise Refused(f"{name} of {save} is not held")
        return room.data.toreadonly()

    def listing(self) -> list[Held]:
        with self._lock:
            return [
                Held(*save, name, len(room.data))
                for save, files in self._files.items()
                for name, room in files.items()
                if room.sealed
            ]

    def _make_room(self, save: Save, size: int) -> None:
        needed = self._bytes(save) + size
        if needed > self._limit:
            raise Refused(f"copies of {save} take {needed} bytes or more here, and may take {self._limit}")
        # What was never committed goes before what was.
        for older in sorted((s for s in self._files if s < save), key=lambda s: (s == self._committed, s)):
            if size + sum(map(self._bytes, self._files)) <= self._limit:
                break
            del self._files[older]
        if size + sum(map(self._bytes, self._files)) > self._limit:
            raise Refused(f"copies of a later save than {save} take the room")

    def _bytes(self, save: Save) -> int:
        return sum(len(room.data) for room in self._files.get(save, {}).values())


def new_token() -> str:
    """Of a run: who does not know it can neither read nor write its copies."""
    return secrets.token_hex(TOKEN_BYTES // 2)


class CopyServer:
    """Serves a memory to ranks, on threads of its own: in any process, also one that runs an event loop.

    Args:
        token: as `new_token` makes it; who does not begin with it is not answered.
    """

    def __init__(self, memory: FragmentMemory, token: str) -> None:
        self._memory = memory
        self._token = token
        self._server: _Server | None = None

    def start(self, host: str) -> str:
        """Listen on an address of this node, on a free port. Returns `host:port`."""
        self._server = _Server(host, self._memory, self._token)
        threading.Thread(target=self._server.serve_forever, name="fragment-memory", daemon=True).start()
        return f"{host}:{self._server.server_address[1]}"

    def close(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server.disconnect()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, memory: FragmentMemory, token: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.memory = memory
        self.token = token
        self._connections: set[socket.socket] = set()
        super().__init__((host, 0), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def disconnect(self) -> None:
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("connection of %s to the copies in memory", client_address, exc_info=True)


class _Connection(socketserver.BaseRequestHandler):
    request: socket.socket
    server: _Server

    def handle(self) -> None:
        prepare(self.request, IDLE_S)
        with contextlib.suppress(OSError, EOFError):  # the rank is gone: it was killed, or has what it wanted
            if not hmac.compare_digest(bytes(receive(self.request, TOKEN_BYTES)), self.server.token.encode()):
                return
            for asked in lines(self.request):
                try:
                    data = self._answer(**asked)
                    tell(self.request, {"bytes": len(data)})
                    self.request.sendall(data)
                except Refused as refusal:
                    tell(self.request, {"refused": str(refusal)})

    def _answer(self, do: str, attempt: int = 0, step: int = 0, name: str = "", **of: int) -> bytes | memoryview:
        memory, save = self.server.memory, Save(attempt, step)
        if do == "put":
            self._put(save, name, of["size"])
        elif do == "commit":
            memory.commit(save)
        elif do == "size":
            return str(len(memory.file(save, name))).encode()
        elif do == "get":
            return memory.file(save, name)[of["offset"] : of["offset"] + of["length"]]
        elif do == "list":
            return json.dumps(memory.listing()).encode()
        else:
            raise Refused(f"{do!r} is no request")
        return b""

    def _put(self, save: Save, name: str, size: int) -> None:
        """Says yes before the bytes come: a file that is refused is not sent at all."""
        memory = self.server.memory
        room = memory.begin(save, name, size)
        try:
            tell(self.request, {"bytes": 0})
            receive_into(self.request, room.data)
        except BaseException:
            memory.abandon(save, name, room)
            raise
        memory.seal(save, name, room)


# --- on the wire ------------------------------------------------------------------------------------------------------


def prepare(connection: socket.socket, timeout_s: float) -> None:
    connection.settimeout(timeout_s)
    # A short message that waits for the acknowledgement of the one before it would wait for 40 ms.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tell(connection: socket.socket, values: dict[str, Any]) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What is told, until the other side has nothing more to say.

    Raises:
        OSError: the connection is broken, or what comes is no message.
    """
    while line := _line(connection):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise OSError(f"not a message: {error}") from None
        if not isinstance(values, dict):
            raise OSError("not a message")
        yield values


def _line(connection: socket.socket) -> bytes:
    """Up to its end and no further: what follows may be the bytes of a file."""
    line = bytearray()
    while not line.endswith(b"\n"):
        peeked = connection.recv(LONGEST_LINE, socket.MSG_PEEK)
        if not peeked or len(line) > LONGEST_LINE:
            return b""
        line += receive(connection, peeked.find(b"\n") + 1 or len(peeked))
    return bytes(line)


def receive(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    receive_into(connection, memoryview(data))
    return data


def receive_into(connection: socket.socket, room: memoryview) -> None:
    """
    Raises:
        EOFError: the other side has ended before the room was full.
    """
    received = 0
    while received < len(room):
        count = connection.recv_into(room[received : received + PIECE])
        if not count:
            raise EOFError(f"{received} of {len(room)} bytes came")
        received += count
