"""A proxy in front of an S3 server that can be told to fail, as a real store does under load."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""
_OF_ONE_CONNECTION = {"connection", "transfer-encoding", "content-length", "date", "server"}
"""Headers of an answer that the proxy writes for itself."""


@contextlib.contextmanager
def s3_proxy(endpoint: str, address: str) -> Iterator[S3Proxy]:
    """
    Args:
        endpoint: of the server, http://host:port; it must not verify signatures, which name the host that was asked.
        address: to listen on.
    """
    proxy = S3Proxy(endpoint, address)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class S3Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, endpoint: str, address: str) -> None:
        super().__init__((address, 0), _Handler)
        self.server_at = urlsplit(endpoint)
        self.refused = self.delayed = 0
        self._errors_until = self._slow_until = self._delay_s = 0.0

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def fail(self, seconds: float) -> None:
        """Answer 503 SlowDown."""
        self._errors_until = time.monotonic() + seconds

    def slow_down(self, seconds: float, delay_s: float) -> None:
        """Answer late."""
        self._slow_until, self._delay_s = time.monotonic() + seconds, delay_s

    def refuses(self) -> bool:
        refuses = time.monotonic() < self._errors_until
        self.refused += refuses
        return refuses

    def wait(self) -> None:
        if time.monotonic() < self._slow_until:
            self.delayed += 1
            time.sleep(self._delay_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Proxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses():
            self._send(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        self.server.wait()
        at = self.server.server_at
        connection = http.client.HTTPConnection(at.hostname or "", at.port or 80, timeout=60)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            found = connection.getresponse()
            self._send(found.status, found.getheaders(), found.read(), found.getheader("Content-Length"))

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _OF_ONE_CONNECTION:
                self.send_header(name, value)
        # The answer to HEAD has the length of what is not sent.
        self.send_header("Content-Length", length or "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
