"""Requests to an MLflow server. All mlflow is here.

The server and the login come from the environment, as MLflow's own tools have them. MLflow's client repeats what
failed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from converter.errors import StoreFailed, StoreRefused, WriteFailed

T = TypeVar("T")

SERVED = "mlflow-artifacts"
"""The scheme of artifacts that the server itself keeps, and gives."""
CHUNK = 1 << 20
"""Bytes that are read at a time."""
LOGIN = "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
_EXTRA = "pip install 'nf4-converter[mlflow]'"
_SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    number: int
    created: int
    """In seconds since 1970."""
    source: str
    """Where its files lie."""
    run_id: str
    tags: dict[str, str]


class Absent(StoreRefused):
    """There is no such model, version or alias."""


class Server:
    """The server that MLFLOW_TRACKING_URI names. `label`: what messages call that which is asked for."""

    def __init__(self, label: str) -> None:
        self.label = label
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            raise StoreRefused(f"{label}: which server? set MLFLOW_TRACKING_URI, such as https://mlflow.example.org")
        if urlsplit(uri).scheme not in ("http", "https"):
            raise StoreRefused(
                f"{label}: MLFLOW_TRACKING_URI is no http:// or https:// address; only servers are asked, not folders, "
                "databases or Databricks"
            )
        _prepare_library()
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise StoreRefused(f"{label}: mlflow-skinny is not installed, which asks the server: {_EXTRA}") from None
        self._uri = uri
        self.client: Any = self.trying("", lambda: MlflowClient(uri, registry_uri=uri))

    @property
    def at(self) -> str:
        """The server's address, without a login in it."""
        parts = urlsplit(self._uri)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")

    def version(self, name: str, number: int) -> Version:
        """`Absent` if there is none."""
        return _version(self.trying("", lambda: self.client.get_model_version(name, str(number))))

    def version_of_alias(self, name: str, alias: str) -> Version:
        """`Absent` if there is none."""
        aliases = self.trying("", lambda: self.client.get_registered_model(name)).aliases
        if alias not in aliases:
            raise Absent(f"{self.label}: {name} has no alias {alias!r}: check the name, and MLFLOW_TRACKING_URI")
        return self.version(name, int(aliases[alias]))

    def versions(self, name: str) -> list[Version]:
        """The versions of a model that are ready, the oldest first."""
        found, token = [], None
        while True:
            page = self.trying("", lambda: self.client.search_model_versions(f"name='{name}'", page_token=token))
            found += [_version(one) for one in page if one.status == "READY"]
            if not (token := page.token):
                return sorted(found, key=lambda version: version.number)

    def log(self, run_id: str, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Give a run metrics and tags."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in sorted(figures.items())]
        named = [RunTag(name, value) for name, value in sorted(tags.items())]
        self.trying("", lambda: self.client.log_batch(run_id, metrics, (), named))

    def place_of(self, version: Version) -> str:
        """The address or path at which a version's files lie."""
        uri = self.trying("", lambda: self.client.get_model_version_download_uri(version.name, str(version.number)))
        return str(uri)

    def names_at(self, uri: str, inside: str = "") -> list[tuple[str, int | None]]:
        """The files and folders of a folder of the server's own artifacts: name and bytes; None: a folder."""
        found = self.trying("", lambda: self._served(uri).list_artifacts(inside or None))
        return [(one.path, None if one.is_dir else int(one.file_size or 0)) for one in found]

    @contextmanager
    def reading(self, uri: str, name: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes from `start` to before `end` of one of the server's own artifacts, piece by piece."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

        def begin() -> Any:
            address = get_default_host_creds(self._served(uri).artifact_uri)
            # Without an encoding, for sizes are those of the file.
            how = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            answer = http_request(address, f"/{quote(name)}", "GET", stream=True, extra_headers=how)
            augmented_raise_for_status(answer)
            return answer

        def pieces() -> Iterator[bytes]:
            # A server that knows no ranges sends all of it.
            skip, left = (0 if answer.status_code == 206 else start), end - start
            for piece in self._chunks(answer, name):
                wanted = piece[skip : skip + left]
                skip, left = max(0, skip - len(piece)), left - len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return

        with closing(self.trying(name, begin)) as answer:
            yield pieces()

    def trying(self, what: str, action: Callable[[], T]) -> T:
        """The action's result; its errors become ours."""
        import requests
        from mlflow.exceptions import MlflowException

        where = f"{self.label}: {what}" if what else self.label
        try:
            return action()
        except MlflowException as exc:
            status, said = exc.get_http_status_code(), exc.message
        except requests.RequestException as exc:
            status, said = exc.response.status_code if exc.response is not None else 0, str(exc)
        except ImportError as exc:
            raise StoreRefused(
                f"{where}: the server has its files elsewhere, and MLflow's client needs {exc.name} there: install it, "
                "or let the server take and give them, as it does by default"
            ) from None
        except OSError as exc:
            raise WriteFailed(f"{where}: {exc.strerror}") from None
        said = _without_secrets(said)
        if status == 404:
            raise Absent(f"{where}: {said}: check the name, and MLFLOW_TRACKING_URI") from None
        if status in (401, 403):
            raise StoreRefused(f"{where}: {said}: check {LOGIN}") from None
        if status == 400:
            raise StoreRefused(f"{where}: {said}") from None
        raise StoreFailed(f"{where}: {said}: check the connection, MLFLOW_TRACKING_URI, and the server") from None

    def _chunks(self, answer: Any, name: str) -> Iterator[bytes]:
        pieces = answer.iter_content(CHUNK)
        while (piece := self.trying(name, lambda: next(pieces, b""))) != b"":
            yield piece

    def _served(self, uri: str) -> Any:
        from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

        parts = urlsplit(uri)
        if parts.netloc not in ("", urlsplit(self.at).netloc):
            raise StoreRefused(
                f"{self.label}: lies on another server, {parts.netloc.rpartition('@')[2][:120]}, which would get the "
                "login of this one; set MLFLOW_TRACKING_URI to that server"
            )
        return MlflowArtifactsRepository(uri, tracking_uri=self._uri)


def _version(found: Any) -> Version:
    seconds = int(found.creation_timestamp or 0) // 1000
    tags = {str(name): str(value) for name, value in (found.tags or {}).items()}
    return Version(str(found.name), int(found.version), seconds, str(found.source), str(found.run_id or ""), tags)


def _prepare_library() -> None:
    """Have mlflow send no telemetry, and print nothing."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",  # what matters comes as an error
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def _without_secrets(said: str) -> str:
    """What the library says, in short, without logins in addresses, their queries, and tokens."""
    text = re.sub(r"://[^/\s'\"]*@", "://…@", " ".join(said.split()))
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?…", text)
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    return text[:300]
