"""What stands before a server on 127.0.0.1: it passes requests on, writes them down, and can get in their way."""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Self
from urllib.parse import urlsplit

import pytest

from tests.bucket_server import BucketServer, use


class Proxy:
    """`before` is called with a request's method and path. It may give a status to answer with, or "drop"."""

    def __init__(self, behind: str) -> None:
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[str, str], int | str | None] | None = None
        self.behind = urlsplit(behind).netloc
        self._server = _Server(("127.0.0.1", 0), type("Answer", (_Answer,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error of the server."""


class _Answer(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.proxy.log.append((self.command, self.path))
        fault = self.proxy.before(self.command, self.path) if self.proxy.before is not None else None
        if fault == "drop":
            self.close_connection = True
            return
        if fault is not None:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        link = http.client.HTTPConnection(self.proxy.behind, timeout=30)
        try:
            # The signature covers the name of the host: it is passed on as it came.
            link.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                link.putheader(name, value)
            link.endheaders(body)
            answer = link.getresponse()
            raw = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(raw))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            link.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815  (so called by the base class)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def proxied(server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy through which this process finds a server."""
    with Proxy(server.url) as found:
        use(monkeypatch, server.environment(found.url))
        yield found


def place_of_its_own(test: str) -> str:
    """A name in the bucket, for a test by its name."""
    return hashlib.sha256(test.encode()).hexdigest()[:12]
