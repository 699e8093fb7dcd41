"""A branch of a repository on the Hub: shards go into its large-file storage, one commit shows them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from converter.errors import HubFailed, HubGated, HubNotFound, StoreFailed, StoreRefused
from converter.read.hub.answers import COMMIT
from converter.read.hub.errors import RETRY_DELAYS, Subject, brief, endpoint, not_a_hub, retrying
from converter.read.hub.folder import DEFAULT_REVISION, is_repo_id, prepare_library
from converter.write.journal import Upload
from converter.write.store import MAX_READ_BYTES, NOTHING, Told

T = TypeVar("T")


class HubStore:
    """A branch; None: main. What doesn't exist is made: a repository, private; a branch, from main."""

    is_versioned = False

    def __init__(self, repo_id: str, branch: str | None = None, *, create_pr: bool = False) -> None:
        self.label = f"hf://{repo_id[:120]}" + (f"@{branch[:120]}" if branch else "")
        if not is_repo_id(repo_id) or "/" not in repo_id:
            raise StoreRefused(
                f"{self.label}: give owner and name of a repository: hf://ORG/NAME, or hf://ORG/NAME@BRANCH"
            )
        if branch is not None and (COMMIT.fullmatch(branch) or branch.startswith("refs/") or ".." in branch):
            raise StoreRefused(f"{self.label}: give a branch: a commit can't be changed")
        self._repo_id, self._branch, self._create_pr = repo_id, branch or DEFAULT_REVISION, create_pr
        prepare_library()
        from huggingface_hub import HfApi, constants, get_token

        if constants.is_offline_mode():
            raise StoreRefused(f"{self.label}: HF_HUB_OFFLINE is set, and nothing can be written there; unset it")
        if get_token() is None:
            raise HubGated(
                f"{self.label}: writing to {endpoint()} needs a login: log in with `hf auth login`, or set HF_TOKEN to "
                "a token with the role write"
            )
        self._api: Any = HfApi()
        self._exists, self._branch_exists = True, True
        self._parent: str | None = None
        self._files: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self._look()

    @property
    def note(self) -> str:
        if not self._exists:
            return f"{self.label}: there is no such repository; it will be made, and be private"
        return "" if self._branch_exists else f"{self.label}: there is no such branch; it will be made from main"

    def look_for(self, content: str, adapter: str | None, layout: str) -> None:
        """Nothing: one conversion lies there."""

    def files(self) -> Mapping[str, int]:
        return self._files

    def read(self, name: str) -> bytes:
        from converter.read.hub.folder import HubFolder

        folder = HubFolder(self._repo_id, self._parent)
        raw = bytearray(min(folder.size(name), MAX_READ_BYTES))
        folder.read_into(name, 0, memoryview(raw))
        return bytes(raw)

    def begin(self) -> None:
        if not self._exists:
            self._writing("", lambda: self._api.create_repo(self._repo_id, private=True, exist_ok=True))
            self._look()

    def has(self, upload: Upload) -> bool:
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        info = UploadInfo(upload.size, b"", bytes.fromhex(upload.sha256))

        def ask() -> bool:
            # What is stored already needs no action. Asking for a transfer starts none.
            actions, errors, _ = post_lfs_batch_info([info], None, "model", self._repo_id)
            return not errors and len(actions) == 1 and actions[0].get("actions") is None

        return self._writing(upload.shard, ask)

    def take(self, upload: Upload, path: Path) -> None:
        addition = self._addition(upload, path)

        def send() -> None:
            self._api.preupload_lfs_files(
                self._repo_id, [addition], revision=self._from, create_pr=self._create_pr, free_memory=False
            )

        self._writing(upload.shard, send)
        if addition._upload_mode != "lfs":
            raise StoreFailed(
                f"{self.label}: {upload.shard}: the repository keeps such files in git: let its .gitattributes say "
                "'*.safetensors filter=lfs diff=lfs merge=lfs -text'"
            )

    def publish(
        self, uploads: Collection[Upload], small: Mapping[str, Path], gone: Collection[str], told: Told = NOTHING
    ) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        shards = []
        folder = next(iter(small.values())).parent
        for upload in uploads:
            addition = self._addition(upload, folder / upload.shard)
            # They are there already. Here only thin files are left of them, which must not be sent in their place.
            addition._upload_mode, addition._is_uploaded = "lfs", True
            shards.append(addition)
        rest = [CommitOperationAdd(name, str(path)) for name, path in small.items()]
        if not self._branch_exists and not self._create_pr:
            self._writing("", lambda: self._api.create_branch(self._repo_id, branch=self._branch, exist_ok=True))
        old = [CommitOperationDelete(name) for name in sorted(gone)]

        def commit() -> Any:
            return self._api.create_commit(
                self._repo_id,
                [*shards, *rest, *old],
                commit_message="Upload a conversion",
                revision=self._from if self._create_pr else self._branch,
                create_pr=self._create_pr,
                parent_commit=self._parent,
            )

        try:
            # Tried again, it could make a second pull request. A second commit is refused, for it names its parent.
            done = self._writing("", commit, () if self._create_pr else RETRY_DELAYS)
        except HubFailed:
            # The commit may have been made, and the answer lost: then it isn't made again.
            self._look()
            if self._create_pr or not self._is_there(uploads, small):
                raise
            return f"{endpoint()}/{self._repo_id}/tree/{self._branch}"
        self._look(done.pr_revision)
        if not self._is_there(uploads, small):
            raise StoreFailed(f"{self.label}: {done.oid} has not the files that were sent; look at it before use")
        return str(done.pr_url or f"{endpoint()}/{self._repo_id}/tree/{done.oid}")

    def forget(self, uploads: Collection[Upload]) -> None:
        """Nothing: the Hub itself removes what no commit names."""

    @property
    def _from(self) -> str:
        """The branch that what is uploaded is meant for, or that such a branch will be made from."""
        return self._branch if self._branch_exists else DEFAULT_REVISION

    def _addition(self, upload: Upload, path: Path) -> Any:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(upload.shard, str(path))
        addition.upload_info.sha256 = bytes.fromhex(upload.sha256)  # it is known, and need not be computed again
        return addition

    def _look(self, revision: str | None = None) -> None:
        """Find out what the branch has. Of a missing one, what main has, which it will be made from."""
        subject = Subject(self._repo_id, revision or self._branch)

        def ask(which: str) -> Any:
            return retrying(lambda: self._api.model_info(self._repo_id, revision=which, files_metadata=True), subject)

        try:
            found = ask(revision or self._branch)
            self._exists = self._branch_exists = True
        except HubNotFound:
            try:
                found = ask(DEFAULT_REVISION)
                self._exists, self._branch_exists = True, False
            except HubNotFound:
                self._exists, self._branch_exists = False, self._branch == DEFAULT_REVISION
                return
        try:
            commit = str(found.sha)
            self._files = {one.rfilename: int(one.size) for one in found.siblings or ()}
            self._digests = {one.rfilename: one.lfs.sha256 for one in found.siblings or () if one.lfs is not None}
        except (TypeError, AttributeError, ValueError):
            raise not_a_hub(self._repo_id) from None
        if not COMMIT.fullmatch(commit):
            raise not_a_hub(self._repo_id)
        self._parent = commit

    def _is_there(self, uploads: Collection[Upload], small: Mapping[str, Path]) -> bool:
        """Whether what was looked at last has these files."""
        return all(
            self._files.get(one.shard) == one.size and self._digests.get(one.shard) == one.sha256 for one in uploads
        ) and all(self._files.get(name) == path.stat().st_size for name, path in small.items())

    def _writing(self, name: str, action: Callable[[], T], delays: Sequence[float] = RETRY_DELAYS) -> T:
        try:
            return retrying(action, Subject(self._repo_id, self._branch, name, writing=True), delays)
        except ValueError as exc:  # what the library says of an answer that it can't use
            raise HubFailed(f"{self.label}: {name}: the Hub does not take it: {brief(exc)}") from None
