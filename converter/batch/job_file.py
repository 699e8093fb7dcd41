"""A file of jobs: TOML, YAML or JSON. The only module that imports yaml."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from converter.batch.adapters import adapters_of, names_several
from converter.batch.afterwards import TABLES, Afterwards, refuse_unknown
from converter.batch.jobs import FOLDER_NAME, last_part
from converter.combination import OPTIONS as _COMBINATION
from converter.combination import Combination
from converter.errors import BadCheckpoint, BadRecipe, StoreRefused
from converter.gates import Gates
from converter.job import Adapters, Job
from converter.read.addresses import parts_of, path_of
from converter.read.folder import is_folder
from converter.read.strict_json import parse_json_object
from converter.recipe import Recipe, choices_of_format
from converter.write.stores.addresses import NO_STORE

MOST_BYTES = 10_000_000
"""Of a file of jobs; a file of 100,000 jobs has about as many."""
_PARAMETER = re.compile(r"`(\w+)`")
_RECIPE = {field.name for field in fields(Recipe)} - {"combine", "calibration"}
_GATES = {field.name for field in fields(Gates)}
_TEXTS = {"name", "base", "base_revision", "adapter", "adapter_revision", "out"}
_KNOWN = sorted(_TEXTS | _RECIPE | _GATES | {"adapters", "format", *_COMBINATION, *TABLES})

Text = TypeVar("Text", str, str | None)

Rows = tuple[Sequence[Any], dict[str, Any]]
"""The jobs as they stand in the file, and what holds for each that says nothing else."""


class Asked(NamedTuple):
    """A job of a file, and what is to become of its output."""

    job: Job
    afterwards: Afterwards
    tables: frozenset[str] = frozenset()
    """Which tables say so."""


def read_jobs(path: Path) -> list[Job]:
    """The jobs in a file. Each `out` must be a folder. Raises `BadRecipe`, naming the job.

    `.toml`, `.yaml`, `.yml` and `.json` hold `jobs`, a list, and beside it values for all jobs that state no other; or
    a single job. `.json` may also hold a list of jobs; any other file, one JSON object per line.

    A job has base, adapter, out, base_revision, adapter_revision and the recipe's names (quant_type, keep, …), with
    - or _. Without `out` of its own, its output lies in the `out` of all jobs, called by its `name`, or as its adapter.
    `adapters` instead of `adapter`, a folder of adapters, a glob or a list of these, stands for a job for each of them,
    whose outputs lie in `out` by their names; with `combine` (`Combination.from_options`) they are a list of those that
    become one output. Relative paths are relative to the folder of the file.
    """
    return [asked.job for asked in read_file(path, stores=False)]


def read_file(path: Path, *, stores: bool) -> list[Asked]:
    """The jobs in a file, as `read_jobs` reads them, each with its tables verify, evaluate and announce.

    `stores`: whether `out` may be an address. `out = "s3://BUCKET/FOLDER"` above the jobs has an output for each.
    """
    rows, defaults = _rows(path, _contents(path))
    found = []
    for number, content in enumerate(rows, 1):
        row = _Row(path, number, content, defaults, stores=stores)
        found += [Asked(job, row.afterwards, row.tables) for job in row.jobs()]
    if not found:
        raise BadRecipe(f"{path}: has no jobs")
    return found


def referred(text: str, parent: Path) -> str:
    """What a file in `parent` means by a path, relative to it unless it is absolute, or by an id on the Hub.

    `BadRecipe` where only the current folder has such a path.
    """
    there = parent / Path(text).expanduser()
    if text.startswith((".", "/", "~")) or is_folder(there):
        return str(there)
    if is_folder(Path(text)):  # it would be taken for that folder instead of an id
        raise BadRecipe(f"{there}: no such folder; relative paths are relative to the file")
    return text


def _contents(path: Path) -> bytes:
    try:
        # Whatever else it is might make us wait, or have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadRecipe(f"{path}: not a plain file")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as exc:
        raise BadRecipe(f"{path}: {exc.strerror}") from exc
    if len(raw) > MOST_BYTES:
        raise BadRecipe(f"{path}: more than {MOST_BYTES:,} bytes")
    return raw


def _rows(path: Path, raw: bytes) -> Rows:
    try:
        match path.suffix:
            case ".toml":
                return _of_document(tomllib.loads(raw.decode()))
            case ".yaml" | ".yml":
                return _of_document(_parse_yaml(raw))
            case ".json":
                return _of_json(path, raw)
        return _of_lines(path, raw), {}
    except BadRecipe as exc:
        raise BadRecipe(f"{path}: {exc}") from exc
    except BadCheckpoint as exc:
        raise BadRecipe(str(exc)) from exc
    except RecursionError as exc:
        raise BadRecipe(f"{path}: nested too deeply") from exc
    except ValueError as exc:
        raise BadRecipe(f"{path}: {exc}") from exc


def _of_document(whole: object) -> Rows:
    if isinstance(whole, list):
        return whole, {}
    defaults = _spelled({} if whole is None else whole)
    if "jobs" not in defaults:
        return ([defaults] if defaults else []), {}
    rows = defaults.pop("jobs")
    if not isinstance(rows, list):
        raise BadRecipe("jobs is not a list")
    defaults |= _spelled(defaults.pop("recipe", {}))
    if "adapters" in defaults:
        rows = [*rows, {"adapters": defaults.pop("adapters")}]
    return rows, defaults


def _of_json(path: Path, raw: bytes) -> Rows:
    try:
        return _of_document(parse_json_object(b'{"jobs": ' + raw + b"\n}", str(path))["jobs"])
    except BadCheckpoint:
        lines = raw.split(b"\n")
        if not all(line.strip().startswith(b"{") and line.strip().endswith(b"}") for line in lines if line.strip()):
            raise
        return _of_lines(path, raw), {}


def _of_lines(path: Path, raw: bytes) -> list[Any]:
    lines = [line for line in raw.split(b"\n") if line.strip()]
    return [parse_json_object(line, f"{path}: job {number}") for number, line in enumerate(lines, 1)]


def _parse_yaml(raw: bytes) -> object:
    import yaml

    try:
        _refuse_repeated_keys(yaml.compose(raw, Loader=yaml.SafeLoader))
        return yaml.safe_load(raw)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise BadRecipe(f"not valid YAML: {where}{getattr(exc, 'problem', None) or exc}") from exc


def _refuse_repeated_keys(node: Any) -> None:
    """`BadRecipe` where a mapping of YAML has a key twice, of which YAML's own loader would take the last."""
    seen: set[int] = set()
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        pairs = [item for item in node.value if isinstance(item, tuple)]
        keys = Counter(key.value for key, _ in pairs if isinstance(key.value, str))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise BadRecipe(f"line {node.start_mark.line + 1}: key {twice[:60]!r} occurs twice")
        nodes += [part for pair in pairs for part in pair] if pairs else list(node.value)


class _Row:
    """One entry of the file: a job, or one job for each of its adapters."""

    def __init__(self, path: Path, number: int, row: object, defaults: Mapping[str, Any], *, stores: bool) -> None:
        self._where, self._parent, self._stores = f"{path}: job {number}", path.parent, stores
        if not isinstance(row, dict):
            raise BadRecipe(f"{self._where}: not an object")
        try:
            row = _spelled(row)
            self._own = row | _spelled(row.pop("recipe", {}))
            self._stated = {**defaults, **self._own}
            refuse_unknown(self._stated, _KNOWN)
        except BadRecipe as exc:
            raise self._wrong(exc) from exc
        for key in _TEXTS & self._stated.keys():
            if not _is_text(self._stated[key]):
                raise self._wrong(f"{key} is not a text")
        for key in _RECIPE & self._stated.keys() - {"keep"}:
            if isinstance(self._stated[key], dict | list):
                raise self._wrong(f"{key} is not a single value")
        try:
            combine = Combination.from_options(self._of(_COMBINATION))
            self._recipe = replace(Recipe.from_json(self._of(_RECIPE)), combine=combine)
            self._gates = Gates(**self._of(_GATES))
            self.tables = frozenset(TABLES) & self._stated.keys()
            tables = {name: _spelled(defaults.get(name, {})) | _spelled(self._stated[name]) for name in self.tables}
            self.afterwards = Afterwards.of(tables, self._parent)
        except BadRecipe as exc:
            raise self._wrong(exc) from exc

    def _of(self, names: Iterable[str]) -> dict[str, Any]:
        return {key: self._stated[key] for key in names if key in self._stated}

    def jobs(self) -> list[Job]:
        try:
            if self._recipe.combine is not None:
                return [self._combined(self._recipe.combine)]
            if "adapters" in self._own:
                return self._several()
            return [self._one()]
        except RuntimeError as exc:  # a home folder of nobody
            raise self._wrong(exc) from exc

    def _one(self) -> Job:
        adapter, base = self._stated.get("adapter"), self._stated.get("base")
        if adapter is None and base is None:
            raise self._wrong("has neither adapter, adapters nor base")
        if adapter is not None and names_several(adapter, self._parent):
            raise self._wrong(f"adapter {adapter} stands for several adapters; write adapters instead")
        return self._job(self._reference(adapter), self._own_output(last_part(str(adapter or base))))

    def _combined(self, combine: Combination) -> Job:
        """One output of several adapters."""
        if "adapters" not in self._own:
            raise self._wrong("has combine, but no adapters, a list of those that become one")
        texts = self._adapters()
        if several := [text for text in texts if names_several(text, self._parent)]:
            raise self._wrong(f"adapter {several[0]} stands for several; with combine, name each, in weights' order")
        if len(texts) != len(combine.weights):
            raise self._wrong(f"{len(combine.weights)} weights for {len(texts)} adapters: give one for each")
        return self._job([self._reference(text) for text in texts], self._own_output(None))

    def _own_output(self, name: str | None) -> str:
        """Where the job says; `name`: what the output is called where it has no other name."""
        if "out" in self._own:
            return str(self._own["out"])
        name = self._stated.get("name") or name
        if name is None:
            raise self._wrong("has neither out nor name, and its adapters have several names")
        return self._output(name)

    def _adapters(self) -> list[str]:
        if "adapter" in self._stated:
            raise self._wrong("has both adapters and adapter")
        texts = self._own["adapters"]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            raise self._wrong("adapters is neither a text nor a list of texts")
        return texts

    def _several(self) -> list[Job]:
        texts = self._adapters()
        if "name" in self._stated:
            raise self._wrong("has both adapters and name")
        jobs = []
        for text in texts:
            if not names_several(text, self._parent):
                jobs.append(self._job(self._reference(text), self._output(last_part(text))))
                continue
            try:
                found = adapters_of(text, self._parent)
            except BadRecipe as exc:
                raise self._wrong(exc) from exc
            jobs += [self._job(str(folder), self._output(name)) for name, folder in found.items()]
        return jobs

    def _output(self, name: str) -> str:
        """In the folder of all outputs."""
        folder = self._stated.get("out")
        if folder is None:
            raise self._wrong("has no out")
        if FOLDER_NAME.fullmatch(name) is None:
            raise self._wrong(f"{name!r} can't be a folder's name; give name or out")
        return f"{folder.rstrip('/')}/{name}"

    def _job(self, adapter: Adapters | None, out: str) -> Job:
        stated, base = self._stated, self._reference(self._stated.get("base"))
        try:
            path = path_of(out)
            if path is None:
                parts_of(out)
        except StoreRefused as exc:
            raise self._wrong(exc) from exc
        if path is None and not self._stores:
            raise self._wrong(f"{out}: {NO_STORE}")
        return Job(
            Path(out) if path is None else self._parent / path.expanduser(),
            adapter,
            base,
            self._recipe,
            stated.get("base_revision"),
            stated.get("adapter_revision"),
            gates=self._gates,
            store=out if path is None else None,
        )

    def _reference(self, text: Text) -> Text:
        """A path, relative to the file's folder unless it is absolute; or an id on the Hub."""
        if text is None:
            return text
        try:
            return referred(text, self._parent)
        except BadRecipe as exc:
            raise self._wrong(exc) from exc

    def _wrong(self, why: object) -> BadRecipe:
        # Errors name parameters in backticks, which the command line shows as its options; here they are keys.
        return BadRecipe(f"{self._where}: " + _PARAMETER.sub(r"\1", str(why)))


def _is_text(value: object) -> bool:
    """Whether it is a text that a path could be."""
    try:
        return isinstance(value, str) and len(os.fsencode(value)) > 0 and "\0" not in value
    except UnicodeEncodeError:
        return False


def _spelled(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecipe(f"{type(value).__name__}: expected a table of names and values")
    spelled = {str(key).replace("-", "_"): item for key, item in value.items()}
    if len(spelled) < len(value):
        raise BadRecipe("a name stands there twice, once with - and once with _")
    if isinstance(spelled.get("format"), str):
        if "quant_type" in spelled:
            raise BadRecipe("has both format and quant_type, which mean the same")
        choices = choices_of_format(spelled.pop("format"), spelled.get("dtype", "auto"))
        spelled |= {key: value for key, value in choices.items() if key != "dtype" or value != "auto"}
    return spelled
