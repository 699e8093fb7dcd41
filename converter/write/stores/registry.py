"""A registered model of an MLflow server as a store: each conversion is a version of its own.

Files are artifacts of a run. A run is no model: readers of models see it once the version is made, in one request,
after all files are there. Then the alias is moved. A run that a killed process left is found by a tag, and the same job
completes it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from converter.errors import ConverterError, StoreFailed, StoreRefused
from converter.read.folder import Folder, read_bytes
from converter.read.registry.folder import named, open_version
from converter.read.registry.server import Absent, Server, Version
from converter.write.journal import Upload
from converter.write.store import MAX_READ_BYTES, Told

FOLDER = "model"
"""Of a run's artifacts, the folder that becomes the version."""
EXPERIMENT = "nf4-converter"
"""In which the runs are, unless MLFLOW_EXPERIMENT_NAME names another one."""
JOB = "nf4_converter.job"
"""The tag of runs and versions that says what they are of: sha256 of plan and adapter."""
OF = "nf4_converter.model"
"""The tag of runs that says of which model they are."""
LIKE = "nf4_converter.content"
"""The tag of versions that says what they are made of. It does not depend on how the shards are cut."""
FINGERPRINT = "fingerprint"
SHA256 = "nf4_converter.sha256."
"""With a shard's name, the tag of a run that says what was uploaded whole."""


class RegisteredModel:
    """models:/NAME or models:/NAME@ALIAS. What doesn't exist is made: the model, and the experiment of the runs."""

    is_versioned = True

    def __init__(self, address: str) -> None:
        self._name, number, self._alias = named(address)
        self.label = f"models:/{self._name}" + (f"@{self._alias}" if self._alias else "")
        if number is not None:
            raise StoreRefused(
                f"{self.label}/{number}: a version can't be replaced: give models:/{self._name}, which gets a new one, "
                f"or models:/{self._name}@ALIAS"
            )
        self._server = Server(self.label)
        self._client = self._server.client
        self._exists = self._is_there()
        self._job = self._like = ""
        self._run: Any = None
        self._folder: Folder | None = None

    @property
    def note(self) -> str:
        new = "" if self._exists else f"{self.label}: there is no such model; it will be made"
        left = [run for run in self._runs() if run.info.status == "RUNNING" and run.data.tags.get(JOB) != self._job]
        if left:
            ids = ", ".join(run.info.run_id for run in left[:3])
            new += f"{'; ' if new else f'{self.label}: '}{len(left)} unfinished uploads of other jobs are left: {ids}"
        return new

    def look_for(self, content: str, adapter: str | None, layout: str) -> None:
        self._job = hashlib.sha256(f"{layout} {adapter}".encode()).hexdigest()
        self._like = hashlib.sha256(f"{content} {adapter}".encode()).hexdigest()
        found = [version for version in self._versions() if version.tags.get(LIKE) == self._like]
        if found and self._alias is not None:
            number = self._number_of_alias()
            found = [version for version in found if version.number == number]
        self._folder = self._open(found[-1]) if found else None

    def files(self) -> Mapping[str, int]:
        folder = self._folder
        return {} if folder is None else {name: folder.size(name) for name in folder.names() | folder.inner_names()}

    def read(self, name: str) -> bytes:
        assert self._folder is not None  # noqa: S101  (`files` has the name)
        return read_bytes(self._folder, name, limit=MAX_READ_BYTES)

    def begin(self) -> None:
        """Find the run that a killed process left, or make one."""
        if self._run is not None:
            return
        published = {version.run_id for version in self._versions()}
        left = [run for run in self._runs() if run.data.tags.get(JOB) == self._job]
        left = [run for run in left if run.info.run_id not in published]
        self._run = left[0] if left else self._new_run()

    def has(self, upload: Upload) -> bool:
        tags = self._trying(lambda: self._client.get_run(self._run.info.run_id)).data.tags
        return tags.get(SHA256 + upload.shard) == upload.sha256 and self._sizes().get(upload.shard) == upload.size

    def take(self, upload: Upload, path: Path) -> None:
        if self.has(upload):
            return
        self._send(upload.shard, path, FOLDER)
        if self._sizes().get(upload.shard) != upload.size:
            raise StoreFailed(
                f"{self.label}: {upload.shard}: was uploaded, but the server does not list it; run the same command "
                "again"
            )
        # Only now: what a dropped connection left is not whole, and gets no tag.
        tag, run_id = SHA256 + upload.shard, self._run.info.run_id
        self._trying(lambda: self._client.set_tag(run_id, tag, upload.sha256), upload.shard)

    def publish(self, uploads: Collection[Upload], small: Mapping[str, Path], gone: Collection[str], told: Told) -> str:
        version = self._registered(told.tags[FINGERPRINT])
        if version is None:
            self._fill(uploads, small, told)
            version = self._register(told)
        else:
            self.forget(uploads)
        number = str(version.number)
        if self._alias is not None and self._number_of_alias() != version.number:
            self._trying(lambda: self._client.set_registered_model_alias(self._name, self._alias, number))
        return f"{self._server.at}/#/models/{self._name}/versions/{number}"

    def forget(self, uploads: Collection[Upload]) -> None:
        if self._run is None:
            return
        try:
            if self._run.info.run_id not in {version.run_id for version in self._versions()}:
                self._trying(lambda: self._client.delete_run(self._run.info.run_id))
        except ConverterError:  # no reader of models sees a run, and the next process finds it
            return

    # Requests

    def _is_there(self) -> bool:
        try:
            self._trying(lambda: self._client.get_registered_model(self._name))
        except Absent:
            return False
        return True

    def _versions(self) -> list[Version]:
        """Those that are ready, the oldest first."""
        return self._server.versions(self._name) if self._exists else []

    def _registered(self, fingerprint: str) -> Version | None:
        """The first version of a fingerprint."""
        self._exists = self._is_there()
        return next((one for one in self._versions() if one.tags.get(FINGERPRINT) == fingerprint), None)

    def _number_of_alias(self) -> int | None:
        try:
            return self._server.version_of_alias(self._name, str(self._alias)).number
        except Absent:
            return None

    def _open(self, version: Version) -> Folder | None:
        try:
            return open_version(f"models:/{version.name}/{version.number}")
        except StoreRefused:  # somebody has deleted its files
            return None

    def _experiment(self, *, make: bool = False) -> str | None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._trying(lambda: self._client.get_experiment_by_name(name))
        if found is not None:
            return str(found.experiment_id)
        return str(self._trying(lambda: self._client.create_experiment(name))) if make else None

    def _runs(self) -> list[Any]:
        """Those of this tool that are of this model, the newest first."""
        experiment = self._experiment()
        if experiment is None:
            return []
        which = f"tags.`{OF}` = '{self._name}'"
        return list(self._trying(lambda: self._client.search_runs([experiment], which)))

    def _new_run(self) -> Any:
        experiment, tags = self._experiment(make=True), {JOB: self._job, OF: self._name}
        return self._trying(lambda: self._client.create_run(experiment, tags=tags, run_name=self._name))

    def _sizes(self) -> dict[str, int]:
        """Name → bytes of what the run has."""
        found, folders = {}, [FOLDER]
        while folders:
            inside = folders.pop()
            for one in self._trying(lambda inside=inside: self._client.list_artifacts(self._run.info.run_id, inside)):
                if one.is_dir:
                    folders.append(one.path)
                else:
                    found[one.path.removeprefix(f"{FOLDER}/")] = int(one.file_size or 0)
        return found

    def _send(self, name: str, path: Path, folder: str | None) -> None:
        self._trying(lambda: self._client.log_artifact(self._run.info.run_id, str(path), folder), name)

    def _fill(self, uploads: Collection[Upload], small: Mapping[str, Path], told: Told) -> None:
        """Complete the run: small files, report, figures and tags. `StoreFailed` if it isn't whole then."""
        for name, path in small.items():
            inside = PurePosixPath(name).parent
            self._send(name, path, FOLDER if inside == PurePosixPath() else f"{FOLDER}/{inside}")
        with tempfile.TemporaryDirectory() as beside:
            for name, html in told.pages.items():
                page = Path(beside) / name
                page.write_text(html(), "utf-8")
                self._send(name, page, None)
        self._server.log(self._run.info.run_id, told.figures, told.tags)
        wanted = {upload.shard: upload.size for upload in uploads}
        wanted |= {name: path.stat().st_size for name, path in small.items()}
        if (there := self._sizes()) != wanted:
            name = min(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
            self._trying(lambda: self._client.delete_run(self._run.info.run_id))
            raise StoreFailed(
                f"{self.label}: {name}: run {self._run.info.run_id} has other files than were uploaded, so it was "
                "deleted; run the same command again"
            )

    def _register(self, told: Told) -> Version:
        """Make the version; what it is made of is complete."""
        run, name = self._run, self._name
        if not self._exists:
            self._trying(lambda: self._client.create_registered_model(name))
            self._exists = True
        self._trying(lambda: self._client.update_run(run.info.run_id, "FINISHED"))
        source, tags = f"{run.info.artifact_uri}/{FOLDER}", {**told.tags, JOB: self._job, LIKE: self._like}
        made = self._trying(lambda: self._client.create_model_version(name, source, run.info.run_id, tags=tags))
        # The client repeats a request whose answer was lost, and another machine may have made the same version.
        first = self._registered(told.tags[FINGERPRINT])
        if first is None:
            raise StoreFailed(
                f"{self.label}: version {made.version} was made, but the server does not list it; run the same command "
                "again"
            )
        if first.number != int(made.version):
            self._trying(lambda: self._client.delete_model_version(name, made.version))
        return first

    def _trying(self, action: Any, what: str = "") -> Any:
        return self._server.trying(what, action)
