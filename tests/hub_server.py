"""A stand-in for the Hugging Face Hub: folders served as repositories on 127.0.0.1, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Thread
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

PIECE = 65_536  # bytes sent at a time
MOST = 200_000_000  # bytes of a body that does not end


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0
    """Bytes of the answer's body."""


@dataclass
class Repository:
    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


class StandInHub:
    """Serves repositories, given as {repo_id: folder}, from entering the context until leaving it.

    What a test wants to go wrong is set on its attributes.
    """

    def __init__(self, folders: Mapping[str, Path], answer: type[Answer] | None = None) -> None:
        self.log: list[Request] = []
        self.user = "somebody"  # whose the `tokens` are
        self.gated: set[str] = set()  # repositories that want a token from `tokens`
        self.private: set[str] = set()  # likewise, but hidden from everyone else
        self.tokens: set[str] = set()
        self.failures = 0  # requests of `failing_method` still to be answered with `failing_status`
        self.failing_method = "GET"
        self.failing_status = 503
        self.failing_message = "try later"
        self.failing_body: str | None = None  # where the failure is an answer of another kind
        self.ignores_range = False
        self.flips: dict[str, int] = {}  # file name → the byte of which a bit is another when it arrives
        self.cuts: dict[str, int] = {}  # file name → bytes after which the connection is cut, of whole files, once
        self.expired = 0  # links to storage still to be refused
        self.watch: Callable[[], None] = lambda: None  # called before each piece of a file is sent
        self.states_digests = True  # in the list of files
        self.stores_elsewhere = False  # redirect for large files to another host, as the Hub does
        self.headers: dict[str, str] = {}  # of every answer about a file, in the place of the right ones
        self.endless = ""  # what does not end (until MOST bytes are sent): the listing, files or failures
        self.repositories: dict[str, Repository] = {}
        for repo_id, folder in folders.items():
            self.push(repo_id, folder)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (answer or Answer,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def push(self, repo_id: str, folder: Path, branch: str = "main") -> str:
        """Make what `folder` holds a commit, move the branch to it, and return it."""
        listing = "".join(f"{path.name} {git_sha1(path)}\n" for path in sorted(folder.iterdir()) if path.is_file())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.commits[commit] = folder
        repository.branches[branch] = commit
        return commit

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have huggingface_hub in this process ask only this server, without a token, and use this cache.

        Nobody sleeps between two tries.
        """
        monkeypatch.setattr("time.sleep", lambda _: None)
        huggingface_hub.close_session()  # its client would keep the proxies it was made with
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        # The environment of the same names is read on import only, which may have been long ago.
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.with_name("token")))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache.with_name("stored_tokens")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)  # it is for our code to disable it

    def environment(self, cache: Path) -> dict[str, str]:
        """The same for a process of its own, to be added to its environment."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HOME": str(cache),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def asked(self, text: str) -> list[Request]:
        """The requests so far whose path contains `text`."""
        return [request for request in self.log if text in request.path]

    @property
    def sent(self) -> int:
        """Bytes of all bodies so far."""
        return sum(request.sent for request in self.log)

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        huggingface_hub.close_session()
        self._server.shutdown()
        self._server.server_close()


class Answer(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"
    # An answer's head and body are two packets, and the second would wait until the first is acknowledged.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.request_log = Request(self.command, self.path, self.headers.get("Range"), token)
        self.hub.log.append(self.request_log)
        if self.hub.failures and self.command == self.hub.failing_method:
            self.hub.failures -= 1
            self._refuse(self.hub.failing_status, None, self.hub.failing_message)
        elif match := re.fullmatch(r"/api/models/(.+?)/revision/([^/]+)", urlsplit(self.path).path):
            self._answer(unquote(match[1]), unquote(match[2]), None)
        elif urlsplit(self.path).path == "/api/whoami-v2":
            if token in self.hub.tokens:
                body = json.dumps({"name": self.hub.user, "type": "user"}).encode()
                self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, [body])
            else:
                self._refuse(401, None, "Invalid user token.")
        elif match := re.fullmatch(r"/storage/(.+)/([^/]+)/([^/]+)", urlsplit(self.path).path):
            if self.hub.expired:
                self.hub.expired -= 1
                self._refuse(403, None, "Request has expired")
            else:
                self._send_file(match[2], self.hub.repositories[match[1]].commits[match[2]] / match[3])
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", urlsplit(self.path).path):
            self._answer(unquote(match[1]), unquote(match[2]), unquote(match[3]))
        else:
            self._refuse(404, None, "no such page")

    do_HEAD = do_GET  # noqa: N815  (so called by the base class)

    def _answer(self, repo_id: str, revision: str, name: str | None) -> None:
        repository = self.hub.repositories.get(repo_id)
        welcome = self.request_log.token in self.hub.tokens
        if repository is None or (repo_id in self.hub.private and not welcome):
            return self._refuse(404 if welcome else 401, "RepoNotFound", "Repository not found")
        commit = repository.branches.get(revision, revision)
        folder = repository.commits.get(commit)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name is None:
            return self._send_listing(repo_id, commit, folder)
        if repo_id in self.hub.gated and not welcome:
            return self._refuse(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        if not (folder / name).is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if self.hub.stores_elsewhere and _is_large(folder / name):
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            location = f"{elsewhere}/storage/{repo_id}/{commit}/{name}?X-Signature=secret"
            headers = _identity(commit, folder / name) | {"Location": location, "Content-Length": "0"}
            return self._send(302, headers, [])
        return self._send_file(commit, folder / name)

    def _send_listing(self, repo_id: str, commit: str, folder: Path) -> None:
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [{"rfilename": str(path.relative_to(folder)), **(_blob(path) if blobs else {})} for path in files]
        if not self.hub.states_digests:
            siblings = [{key: one[key] for key in ("rfilename", "size")} for one in siblings]
        body = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(200, headers | {"X-HF-Warning": "login; You have not logged in."}, [body])

    def _send_file(self, commit: str, path: Path) -> None:
        size = path.stat().st_size
        first, last, status = 0, size - 1, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.range or "")
        headers = _identity(commit, path)
        if match and not self.hub.ignores_range:
            first, last, status = int(match[1]), min(int(match[2] or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        headers["Content-Length"] = str(last + 1 - first)
        with path.open("rb") as file:
            file.seek(first)
            starts = range(first, last + 1, PIECE)
            flip = self.hub.flips.get(path.name, -1)
            pieces = (_flipped(file.read(min(PIECE, last + 1 - start)), flip - start) for start in starts)
            if self.request_log.range is None and self.command == "GET" and path.name in self.hub.cuts:
                pieces = self._cut(pieces, self.hub.cuts.pop(path.name))
            self._send(status, headers, pieces)

    def _cut(self, pieces: Iterable[bytes], left: int) -> Iterator[bytes]:
        for piece in pieces:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                self.close_connection = True
                return

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        body = (self.hub.failing_body or json.dumps({"error": message})).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Error-Message": message,
        }
        self._send(status, headers | ({"X-Error-Code": code} if code else {}), [body])

    def _send(self, status: int, headers: Mapping[str, str], pieces: Iterable[bytes]) -> None:
        if "ETag" in headers or status >= 400:
            headers = {**headers, **self.hub.headers}
        kind = "failures" if status >= 400 else "files" if "ETag" in headers else "listing"
        if kind == self.hub.endless:
            headers = {name: value for name, value in headers.items() if name != "Content-Length"}
            headers |= {"Connection": "close"}
            pieces = chain(pieces, repeat(b" " * PIECE, MOST // PIECE))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in pieces:
            # Counted before it is sent, so that a client that has it all finds it counted.
            self.request_log.sent += len(piece)
            self.hub.watch()
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return

    def log_message(self, *args: object) -> None:
        pass


def _flipped(piece: bytes, at: int) -> bytes:
    return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :] if 0 <= at < len(piece) else piece


def _is_large(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _identity(commit: str, path: Path) -> dict[str, str]:
    digest = sha256(path) if _is_large(path) else git_sha1(path)
    headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
    if _is_large(path):
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
    return headers


def _blob(path: Path) -> dict[str, object]:
    lfs = {"size": path.stat().st_size, "sha256": sha256(path), "pointerSize": 134}
    return {"size": path.stat().st_size, "blobId": git_sha1(path)} | ({"lfs": lfs} if _is_large(path) else {})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_sha1(path: Path) -> str:
    """The id that git gives to this file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
