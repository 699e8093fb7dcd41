"""Base and adapter as the user named them, opened: local folders, and what is on the Hub, in buckets or registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from converter.errors import (
    BadAdapter,
    ConversionRefused,
    ConverterError,
    InputChanged,
)
from converter.job import Job, Reference, RunOptions
from converter.merge.adapter import Adapter
from converter.merge.files import CONFIG as ADAPTER_CONFIG
from converter.merge.files import WEIGHTS as ADAPTER_WEIGHTS
from converter.plan.adapters import OpenedAdapter, Several, open_adapters, open_folder, wanted
from converter.read.addresses import is_address, name_in
from converter.read.arrivals import Remote
from converter.read.bucket.folder import ObjectsFolder
from converter.read.checkpoint import CONFIG, INDEX, Checkpoint
from converter.read.checksums import SUMS, Hashing, stated
from converter.read.folder import Folder, LocalFolder
from converter.read.hub.folder import HubFolder
from converter.read.side_files import wanted_from_base

Show = Callable[[str, int, int, str], None]
"""Called with a stage, the bytes done, the bytes in all, and a file's name."""


class Base:
    """An opened base. On the Hub and in a bucket, config, index and headers are read by range; `fetch` downloads the
    shards."""

    def __init__(
        self,
        reference: Reference,
        revision: str | None = None,
        *,
        offline: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self._opened = open_folder(reference, revision, offline=offline)
        self.checkpoint = Checkpoint(self._opened, allow_pickle=allow_pickle)
        self.commit = self._opened.commit
        self.id = self._opened.repo_id
        self.checked: dict[str, str] = {}
        """Shard → who stated the sha256 that it was found to have; of those that are here."""
        self.small: Folder = self._opened
        """Where the files beside the shards are read."""

    def fetch(
        self,
        progress: Callable[[str, int], None] | None = None,
        arrived: Callable[[LocalFolder, str], None] = lambda *_: None,
    ) -> LocalFolder:
        """Download what a conversion reads of a base on the Hub or in a bucket, and give the folder that has it.
        `arrived` is called for each shard."""
        if (remote := self.remote) is not None:
            remote.refuse_if_too_full(self.checkpoint.shards)
        folder = self.fetch_small(progress)
        for shard in self.checkpoint.shards:
            arrived(self._opened.fetch([shard], progress), shard)
        if folder is not self._opened:
            self.checkpoint = Checkpoint(folder)
        return folder

    def fetch_small(self, progress: Callable[[str, int], None] | None = None) -> LocalFolder:
        """Download what a conversion reads of a base on the Hub, but for the shards."""
        names = self._opened.names()
        code = [name for name in names if name.endswith(".py")]
        rest = [name for name in (CONFIG, INDEX) if name in names]
        if self.id is None and SUMS in names:  # the Hub itself states them
            rest.append(SUMS)
        folder = self._opened.fetch([*rest, *wanted_from_base(self._opened), *code], progress)
        self.small = folder
        return folder

    @property
    def remote(self) -> Remote | None:
        """The repository or bucket that its files still are to come from; None for a folder, and offline."""
        opened = self._opened
        return opened if isinstance(opened, HubFolder | ObjectsFolder) and not opened.is_offline else None

    @property
    def comes_by_file(self) -> bool:
        """Whether its files may come one by one: those of a bucket, and of a repository that states what each is."""
        remote = self.remote
        if remote is None:
            return False
        return remote.is_pinned or self.hub_digests().keys() == set(self.checkpoint.shards)

    @property
    def is_kept(self) -> bool:
        """Whether what was fetched is there for later runs."""
        return self.remote is None or self.remote.is_kept

    def close(self) -> None:
        """Let go of open files; remove what was fetched and is not kept."""
        self.checkpoint.close()
        self._opened.close()

    def bring(self, show: Show, stop: Callable[[], int | None] = lambda: None) -> None:
        """Download what is missing, and check the shards whose sha256 is known.

        `BadCheckpoint` names one that is another; `Interrupted` once `stop` gives the number of a signal.
        """
        total, hub = self.checkpoint.nbytes, self.hub_digests()
        with Hashing() as hashing:
            # A shard is hashed while the next one arrives: it is still in memory.
            folder = self.fetch(
                lambda name, done: show("fetching", done, total, name),
                lambda folder, shard: hashing.begin(folder, shard) if shard in hub else None,
            )
            known = stated(folder, self.checkpoint.shards, hub)
            hashing.check(folder, known, lambda *how_far: show("checking", *how_far), stop)
        self.checked = {shard: of.by for shard, of in known.items()}

    def hub_digests(self) -> dict[str, str]:
        """Of a base on the Hub: shard → its digest there. Empty for a folder, or where the Hub tells none."""
        digests = {shard: self._opened.digest(shard) for shard in self.checkpoint.shards}
        return {shard: digest for shard, digest in digests.items() if digest is not None}


class Inputs:
    """An opened base and, if there is one, an adapter.

    `opened` is a base that several adapters share; it stays open when these inputs are closed.
    """

    def __init__(
        self,
        base: Reference | None,
        adapter: Reference | Several | None,
        base_revision: str | None = None,
        adapter_revision: str | None = None,
        *,
        offline: bool = False,
        allow_pickle: bool = False,
        opened: Base | None = None,
    ) -> None:
        if base is None and adapter is None and opened is None:
            raise ConversionRefused("no base: give `base`, or an `adapter` that names its base")
        self._adapter: OpenedAdapter | None = None
        if adapter is not None:
            try:
                self._adapter = open_adapters(adapter, adapter_revision, offline=offline, allow_pickle=allow_pickle)
            except BadAdapter:
                if (
                    base is not None
                    and not isinstance(adapter, Several)
                    and _are_swapped(base, adapter, offline=offline)
                ):
                    raise BadAdapter(f"{adapter} is a model and {base} an adapter: swap `base` and `adapter`") from None
                raise
        self._owns_base, self._base_is_named = opened is None, opened is None and base is None
        if opened is None and base is not None:
            opened = Base(base, base_revision, offline=offline, allow_pickle=allow_pickle)
        elif opened is None:
            assert self.adapter is not None  # noqa: S101  (checked above)
            opened = open_base_of_adapter(self.adapter, base_revision, offline=offline, allow_pickle=allow_pickle)
        self.opened = opened

    @classmethod
    def of(cls, job: Job, options: RunOptions, opened: Base | None = None) -> Self:
        """Those of a job; `opened` is its base, if that is open."""
        base, adapter = job.base if opened is None else None, wanted(job.adapter, job.recipe.combine)
        return cls(base, adapter, job.base_revision, job.adapter_revision, **options.of_inputs(), opened=opened)

    @property
    def base(self) -> Checkpoint:
        return self.opened.checkpoint

    @property
    def adapter(self) -> Adapter | None:
        return self._adapter.adapter if self._adapter else None

    @property
    def adapter_commit(self) -> str | None:
        return self._adapter.commit if self._adapter else None

    @property
    def adapter_id(self) -> str | None:
        return self._adapter.id if self._adapter else None

    @property
    def checked(self) -> dict[str, dict[str, str]]:
        """base, adapter → weights file → who stated the sha256 that it was found to have."""
        return {"base": self.opened.checked, "adapter": self._adapter.checked if self._adapter else {}}

    @property
    def base_commit(self) -> str | None:
        return self.opened.commit

    @property
    def base_id(self) -> str | None:
        return self.opened.id

    @property
    def base_name(self) -> str | None:
        """Its id on the Hub. Of a folder, the name that the adapter has for its base, if that is what was opened, or
        what the folder or its config is called, too; None where nothing tells."""
        name = self.adapter.base_name if self.adapter is not None else None
        is_this = name is not None and (self._base_is_named or is_called(self.base, name))
        return self.base_id or (name if is_this else None)

    def fetch(self) -> None:
        """Fetch what a conversion reads of a base on the Hub; nothing to do for a folder."""
        self.opened.fetch()

    def bring(self, show: Show, stop: Callable[[], int | None] = lambda: None) -> None:
        """`Base.bring`."""
        self.opened.bring(show, stop)

    def hub_digests(self) -> dict[str, str]:
        """Of a base on the Hub: shard → its digest there. Empty for a folder, or where the Hub tells none."""
        return self.opened.hub_digests()

    def folder_of(self, origin: str) -> Folder:
        """Where the small files of the base, or of the adapter, are read."""
        if origin == "adapter" and self.adapter is not None:
            return self.adapter.folder
        return self.opened.small

    @contextmanager
    def unchanged(self, before: Mapping[Path, list[int]] | None = None) -> Iterator[None]:
        """`InputChanged` at the end if a weights file was changed or replaced since `identities` gave `before`;
        None: since now."""
        before = self.identities() if before is None else before
        yield
        self.refuse_if_changed(before)

    def refuse_if_changed(self, before: Mapping[Path, list[int]]) -> None:
        """`InputChanged` if a weights file was changed or replaced since `identities` gave `before`."""
        after = self.identities()
        for path, identity in before.items():
            if after[path] != identity:
                raise InputChanged(f"{path}: changed while it was being read")

    def identities(self) -> dict[Path, list[int]]:
        """Path → what tells a weights file from another one in its place; empty if it is gone."""
        files = [(self.base.folder, shard) for shard in self.base.shards]
        if self.adapter is not None:
            files.append((self.adapter.folder, ADAPTER_WEIGHTS))
        return {folder.path / name: folder.identity(name) for folder, name in files if folder.path is not None}

    @property
    def folders(self) -> list[Path]:
        """The local folders that are read."""
        adapters = [] if self.adapter is None else [self.adapter, *self.adapter.members]
        folders = [self.base.folder, *(adapter.folder for adapter in adapters)]
        return [folder.path for folder in folders if folder.path is not None]

    def close(self) -> None:
        if self._owns_base:
            self.opened.close()
        if self._adapter is not None:
            self._adapter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_called(base: Checkpoint, name: str) -> bool:
    """Whether a base's folder, or its config, has a name, whoever its owner is. Only that can tell: an adapter fits any
    base of its shapes."""
    names = [name_in(base.folder.label), str(base.config.get("_name_or_path", ""))]
    if base.folder.path is not None:  # a snapshot in the Hub's cache
        names += [part.removeprefix("models--").replace("--", "/") for part in base.folder.path.resolve().parts]
    return any(_last(one) == _last(name) for one in (*names[:2], *(n for n in names[2:] if "/" in n)))


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _are_swapped(base: Reference, adapter: Reference, *, offline: bool) -> bool:
    try:
        has_model = CONFIG in open_folder(adapter, None, offline=offline).names()
        return has_model and ADAPTER_CONFIG in open_folder(base, None, offline=offline).names()
    except ConverterError:
        return False


def base_of_adapter(adapter: Adapter, revision: str | None = None) -> tuple[Reference, str | None]:
    """The base that an adapter names, and its revision; `ConversionRefused` if it names none."""
    name = adapter.base_name
    if name is None:
        raise ConversionRefused(f"{adapter.folder.label}: does not name its base; give `base`")
    return name, revision or adapter.base_revision


def open_base_of_adapter(
    adapter: Adapter, revision: str | None = None, *, offline: bool = False, allow_pickle: bool = False
) -> Base:
    """Open the base that an adapter names. `ConversionRefused` says that it was the adapter who named it."""
    name, revision = base_of_adapter(adapter, revision)
    try:
        return Base(name, revision, offline=offline, allow_pickle=allow_pickle)
    except ConversionRefused as exc:
        named = "an address" if is_address(str(name)) else repr(name)  # which may hold a key
        raise type(exc)(
            f"{adapter.folder.label}: {ADAPTER_CONFIG} names {named} as the base, but {exc}; give `base`"
        ) from exc
