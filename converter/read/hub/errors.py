"""The errors of huggingface_hub in our own words, without secrets; a call is tried again where that may help."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from converter.errors import ConverterError, HubFailed, HubGated, HubNotFound, HubOffline, WriteFailed
from converter.read.hub.answers import without_tokens

T = TypeVar("T")

RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
EXPIRED_STATUS = frozenset({400, 403})
"""What storage answers to a link that has expired."""

_SECRETS = (
    (re.compile(r"hf_[\w.-]+"), "hf_…"),
    (re.compile(r"(?i)(bearer\s+)\S+"), r"\1…"),
    (re.compile(r"(https?://)[^/\s@]+@"), r"\1"),
    (re.compile(r"(https?://[^\s?]+)\?\S+"), r"\1?…"),  # the query of a link to storage is its signature
)


class Subject(NamedTuple):
    """What a request is about."""

    repo_id: str
    revision: str
    name: str = ""
    """The file, if any."""
    writing: bool = False
    """Whether something is to be changed there."""

    def __str__(self) -> str:
        return f"{self.repo_id}: {self.name}" if self.name else self.repo_id


def retrying(action: Callable[[], T], subject: Subject, delays: Sequence[float] = RETRY_DELAYS) -> T:
    """The action's result; its errors become ours, after more tries where these may help."""
    for delay in (*delays, None):
        try:
            return action()
        except _library_errors() as exc:
            if delay is None or not _may_pass(exc):
                # Not chained: what the library says may quote signed links and tokens.
                raise _translated(exc, subject) from None
        time.sleep(delay)
    raise AssertionError("unreachable")


def not_a_hub(repo_id: str) -> HubFailed:
    return HubFailed(
        f"{repo_id}: {endpoint()} does not answer as a Hub does, with commit, files and sizes: "
        "check HF_ENDPOINT, and whether a proxy or a login page answers in its place"
    )


def endpoint() -> str:
    from huggingface_hub import constants

    return brief(constants.ENDPOINT)


def brief(text: object) -> str:
    """At most 200 characters of a server's text, without tokens, credentials and signatures."""
    words = without_tokens(" ".join(str(text).split()))
    for pattern, replacement in _SECRETS:
        words = pattern.sub(replacement, words)
    return words[:200]


def _translated(exc: Exception, subject: Subject) -> ConverterError:
    from huggingface_hub import errors

    match exc:
        case errors.OfflineModeIsEnabled():
            return HubOffline(f"{subject}: HF_HUB_OFFLINE was set: unset it, or download the file first")
        case errors.LocalEntryNotFoundError() if isinstance(exc.__cause__, Exception):
            # Its own text blames the cache; the cause is what the server or the connection did.
            return _translated(exc.__cause__, subject)
        case errors.GatedRepoError():
            return HubGated(
                f"{subject}: the repository is gated: accept the terms at {endpoint()}/{subject.repo_id} and "
                "log in with `hf auth login`, or set HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            return HubNotFound(
                f"{subject}: no such repository at {endpoint()}, or a private one: check the name, or log "
                "in with `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return HubNotFound(f"{subject}: no revision {subject.revision!r}: check the branch, tag or commit")
        case errors.RemoteEntryNotFoundError():
            return HubNotFound(f"{subject}: the repository has no such file")
        case errors.HfHubHTTPError():
            return _of_status(subject, exc.response.status_code, exc.server_message)
        case errors.FileMetadataError():
            return not_a_hub(subject.repo_id)
        case OSError() if _is_local(exc):
            return WriteFailed(f"{subject}: {exc.filename or 'the cache of the Hub'}: {exc.strerror}")
        case RuntimeError() if isinstance(exc.__cause__, Exception):  # of an upload, which says only that it failed
            return _translated(exc.__cause__, subject)
    if subject.writing:
        return HubFailed(
            f"{subject}: not written to {endpoint()}: {brief(exc)}: check connection, HF_ENDPOINT and proxy"
        )
    return HubFailed(
        f"{subject}: not read from {endpoint()}: {brief(exc)}: check connection, HF_ENDPOINT and proxy, "
        "or work offline from the cache"
    )


def _of_status(where: Subject, status: int, server_message: str | None) -> ConverterError:
    said = f" ({brief(server_message)})" if server_message else ""
    match status:
        case 401:
            advice = "the login is not accepted, renew it with `hf auth login` or HF_TOKEN"
            return HubGated(f"{where}: status 401{said}: {advice}")
        case 403:
            right = "write there: it needs the role write" if where.writing else "read this"
            return HubGated(f"{where}: status 403{said}: the login or token lacks the right to {right}")
        case 409 | 412 if where.writing:
            return HubFailed(f"{where}: status {status}{said}: somebody else has changed it meanwhile; run it again")
        case 404 | 410:
            return HubNotFound(f"{where}: status {status}{said}: not at {endpoint()}, check the name")
        case 429:
            return HubFailed(f"{where}: status 429{said}: too many requests, wait or log in with `hf auth login`")
    return HubFailed(f"{where}: {endpoint()} answered with status {status}{said}: try again later")


def _library_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the HTTP client's errors, which is httpx or httpx2 depending on the library's version.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    # Disk and cache errors are OSError; hf_xet, which the library downloads with, raises RuntimeError, too.
    return (client_error, OSError, RuntimeError)


def _may_pass(exc: Exception) -> bool:
    """Whether another try may help."""
    from huggingface_hub import constants, errors

    if isinstance(exc, RuntimeError) and isinstance(exc.__cause__, Exception):
        return _may_pass(exc.__cause__)
    if isinstance(exc, errors.HfHubHTTPError):
        status, host = exc.response.status_code, exc.response.request.url.host
        # A link to storage lasts for a while, and each try gets a new one.
        return status in RETRIED_STATUS or (status in EXPIRED_STATUS and host != urlsplit(constants.ENDPOINT).hostname)
    # LocalEntryNotFoundError: the library could not reach the server, having tried for half a minute itself.
    final = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.FileMetadataError)
    return not isinstance(exc, final) and not _is_local(exc)


def _is_local(exc: Exception) -> bool:
    """Whether the file system, and not the connection, failed."""
    return isinstance(exc, OSError) and exc.errno is not None and not isinstance(exc, ConnectionError | TimeoutError)
