"""The part of a Hub that takes uploads: repositories are made, large files stored by their sha256, commits added.

`UploadHub` is the stand-in that the tests of reading have, with the protocol that huggingface_hub speaks to write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub_server import Answer, StandInHub

TOKEN = "hf_a-token-of-the-tests"


class UploadHub(StandInHub):
    """`before` is called with a request's method and path; it may give a status to answer with, or "drop"."""

    def __init__(self, folders: Mapping[str, Path], place: Path) -> None:
        super().__init__(folders, _Uploading)
        self.place = place
        """Where commits lie."""
        self.stored: dict[str, bytes] = {}
        """Large files, by sha256."""
        self.commits: list[dict[str, Any]] = []
        self.made: list[dict[str, Any]] = []
        """What was asked for each repository that was made."""
        self.before: Callable[[str, str], int | str | None] | None = None
        self.tokens.add(TOKEN)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        folder = repository.commits[repository.branches[branch]]
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def commit(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        folder = self.place / f"{len(list(self.place.iterdir()))}"
        for name, raw in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
        folder.mkdir(exist_ok=True)
        return self.push(repo_id, folder, branch)


class _Uploading(Answer):
    hub: UploadHub

    def do_GET(self) -> None:  # noqa: N802  (so called by the base class)
        if not self._hindered():
            super().do_GET()

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_PUT(self) -> None:  # noqa: N802
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._hindered():
            return
        oid = urlsplit(self.path).path.rpartition("/")[2]
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.stored[oid] = self.body
        self._json({})

    def do_POST(self) -> None:  # noqa: N802
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") else self._sized()
        if self._hindered():
            return
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.request_log = self._log()
            self._refuse(401, None, "Invalid username or password.")
        elif path == "/api/validate-yaml":  # of the model card
            self._json({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            asked = json.loads(self.body)
            self.hub.made.append(asked)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.hub.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.hub.url}/{repo_id}"})
        elif match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            files = json.loads(self.body)["files"]
            modes = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if _is_large(f["path"]) else "regular"}
                for f in files
            ]
            self._json({"files": modes})
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            self._json(
                {"transfer": "basic", "objects": [self._action(one) for one in json.loads(self.body)["objects"]]}
            )
        elif match := re.fullmatch(r"/lfs/verify/(.+)", path):
            asked = json.loads(self.body)
            there = self.hub.stored.get(asked["oid"])
            self._json({}, 200 if there is not None and len(there) == asked["size"] else 400)
        elif match := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            branches = self.hub.repositories[match[1]].branches
            branches.setdefault(match[2], branches["main"])
            self._json({})
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            self._commit(match[1], match[2])
        else:
            raise AssertionError(path)

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.stored:
            return dict(one)
        upload = {"href": f"{self.hub.url}/lfs/{one['oid']}?X-Signature=secret"}
        return {**one, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify/{one['oid']}"}}}

    def _commit(self, repo_id: str, branch: str) -> None:
        repository = self.hub.repositories[repo_id]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            self.request_log = self._log()
            self._refuse(412, None, "A commit has happened since.")
            return
        files = self.hub.files(repo_id, branch)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        is_pr = "create_pr=1" in self.path
        target = "refs/pr/1" if is_pr else branch
        commit = self.hub.commit(repo_id, files, target)
        self.hub.commits.append({"branch": target, "files": files, "header": header})
        url = f"{self.hub.url}/{repo_id}"
        found = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "hookOutput": ""}
        self._json(found | ({"pullRequestUrl": f"{url}/discussions/1"} if is_pr else {}))

    def _hindered(self) -> bool:
        fault = self.hub.before(self.command, self.path) if self.hub.before is not None else None
        if fault is None:
            return False
        if fault == "drop":
            self.close_connection = True
        else:
            self.request_log = self._log()
            self._refuse(int(fault), None, "try later")
        return True

    def _log(self) -> Any:
        from tests.hub_server import Request

        return Request(self.command, self.path, None, None)

    def _json(self, value: Any, status: int = 200) -> None:
        self.request_log = self._log()
        self.hub.log.append(self.request_log)
        body = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": str(len(body))}, [body])

    def _sized(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> bytes:
        raw = b""
        while size := int(self.rfile.readline(), 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return raw


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


@contextmanager
def upload_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, repositories: Mapping[str, Path] | None = None
) -> Iterator[UploadHub]:
    """The Hub of this process, for a user who may write to it; what it keeps lies in `folder`."""
    (folder / "commits").mkdir()
    with UploadHub(repositories or {}, folder / "commits") as server:
        server.use(monkeypatch, folder / "hub")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
