"""What an answer of the Hub may hold: names that are no paths, no more bytes than somebody wants, and no tokens.

huggingface_hub makes file names of a digest and a commit that the server states, and reads what a listing or an error
has to its end. So each answer is looked at before the library sees it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from converter.errors import HubFailed

MAX_LISTING_BYTES = 20_000_000
"""Of a repository's list of files; one of 100,000 files has about as many."""
MAX_ERROR_BYTES = 100_000
"""Of what a server says of a failure; 200 characters of it are shown."""

SLOWEST = 1_000
"""The fewest bytes a second, over a minute, that a server must send."""
_MINUTE = 60.0

COMMIT = re.compile(r"[0-9a-f]{40}")
_sent: set[str] = set()
"""Tokens that servers were given, and might repeat."""


def checking(make_client: Callable[[], Any], clock: Callable[[], float] = time.monotonic) -> Callable[[], Any]:
    """A factory of HTTP clients that look at every answer; `clock` tells how long it takes, in seconds."""

    def make() -> Any:
        client = make_client()
        client.event_hooks["request"].append(_remember_token)
        client.event_hooks["response"].append(lambda response: _check(response, clock))
        return client

    make.checks = True  # type: ignore[attr-defined]
    return make


def without_tokens(text: str) -> str:
    """A server's text without the tokens that we sent to it."""
    for token in tuple(_sent):  # another thread may send one
        text = text.replace(token, "…")
    return text


def _remember_token(request: Any) -> None:
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token:
        _sent.add(token)


def _check(response: Any, clock: Callable[[], float]) -> None:
    """`HubFailed` for an answer that leads out of the cache, or a listing too long; a long error is cut."""
    _refuse_paths(response)
    response.stream = _in_time(response, clock)
    if response.status_code >= 400:
        _read(response, MAX_ERROR_BYTES)
    elif "/api/models/" in response.request.url.path and not _read(response, MAX_LISTING_BYTES):
        raise HubFailed(f"{response.request.url.host}: the list of files has more than {MAX_LISTING_BYTES:,} bytes")


def _in_time(response: Any, clock: Callable[[], float]) -> Any:
    """The answer's stream of bytes, which ends with `HubFailed` after a minute that has brought too little."""
    # The HTTP client's own class, which is httpx's or httpx2's depending on the library's version.
    (kind,) = (base for base in type(response.stream).__mro__ if base.__name__ == "SyncByteStream")
    stream, host = response.stream, response.request.url.host

    class InTime(kind):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            since, done = clock(), 0
            for chunk in stream:
                yield chunk
                done += len(chunk)
                if (now := clock()) - since < _MINUTE:
                    continue
                if done < SLOWEST * (now - since):
                    raise HubFailed(f"{host}: sends less than {SLOWEST:,} bytes a second; try again later")
                since, done = now, 0

        def close(self) -> None:
            stream.close()

    return InTime()


def _refuse_paths(response: Any) -> None:
    commit = response.headers.get("X-Repo-Commit")
    if commit is None:
        return  # not about a file of the Hub; storage may name its digests as it likes
    # As huggingface_hub.file_download takes it, for which the blob is called.
    etag = (response.headers.get("X-Linked-ETag") or response.headers.get("ETag", "-")).lstrip("W/").strip('"')
    if COMMIT.fullmatch(commit) is None or etag in ("", ".", "..") or "/" in etag:
        raise HubFailed(
            f"{response.request.url.host} does not answer as a Hub does: it states the commit {commit[:80]!r} and "
            f"the digest {etag[:80]!r}"
        )


def _read(response: Any, most: int) -> bool:
    """Read a body, or as much of it as is wanted; whether that was all."""
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > most:
            break
    response.close()
    response._content = bytes(content[:most])  # where `response.read` keeps it
    return len(content) <= most
