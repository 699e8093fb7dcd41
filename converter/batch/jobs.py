"""What a batch is asked for: its jobs, from a file or from the command line, and how they are divided."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from converter.errors import BadCheckpoint, BadRecipe, ConverterError
from converter.job import Job, Reference
from converter.plan.inputs import base_of_adapter, open_adapter
from converter.read.folder import is_folder
from converter.read.strict_json import parse_json_object
from converter.recipe import Recipe

MOST_BYTES = 10_000_000
"""Of a file of jobs; one of 100,000 jobs has about as many."""
MOST_DOTS = 100
"""In a line of TOML, outside of strings and comments; the keys of a job have two."""
_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?|"(?:[^"\\\n]|\\.)*+"?|#[^\n]*'''
    r"""|'''(?:[^']|'(?!''))*+(?:'{3,5})?|'[^'\n]*+'?""",
    re.DOTALL,
)
_RECIPE = {field.name for field in fields(Recipe)}
_OF_A_JOB = {"name", "base", "base_revision", "adapter", "adapter_revision", "out"}
_NAME = re.compile(r"[^/\0.][^/\0]*")


def named_jobs(
    adapters: Iterable[str],
    out: Path,
    base: Reference | None,
    recipe: Recipe,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
) -> list[Job]:
    """A job for each adapter, `NAME=PATH` or a path or an id, under `out` by its name.

    `BadRecipe` where two have the same name.
    """
    jobs: dict[str, Job] = {}
    for text in adapters:
        name, adapter = split_name(text)
        name = name or _last_part(adapter)
        if _NAME.fullmatch(name) is None:
            raise BadRecipe(f"--adapter {text}: {name!r} can't be a folder's name; give NAME=PATH")
        if name in jobs:
            raise BadRecipe(f"--adapter {text}: another one is called {name}, too; give NAME=PATH")
        jobs[name] = Job(out / name, adapter, base, recipe, base_revision, adapter_revision)
    return list(jobs.values())


def _last_part(reference: str) -> str:
    """Of a path, or of an id, which is none."""
    return os.path.basename(os.path.normpath(reference))  # noqa: PTH119


def split_name(text: str) -> tuple[str | None, str]:
    """NAME=PATH; a path that has such a sign in it and exists is a path."""
    name, sign, adapter = text.partition("=")
    return (name, adapter) if sign and name and "/" not in name and not os.path.lexists(text) else (None, text)


def read_jobs(path: Path) -> list[Job]:
    """The jobs in a file: TOML with `[[jobs]]`, whose other values are everybody's defaults; or a JSON object a line.

    Each has base, adapter, out, base_revision, adapter_revision, and the recipe's names (quant_type, keep, …), with -
    or _. Without `out`, a job lies under the defaults' `out` by its `name`, or that of its adapter. Relative paths are
    relative to the file. Raises `BadRecipe`, naming the job.
    """
    try:
        # Whatever else it is might make us wait, or have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadRecipe(f"{path}: not a plain file")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise BadRecipe(f"{path}: more than {MOST_BYTES:,} bytes")
        rows, defaults = _of_toml(path, raw) if path.suffix == ".toml" else (_of_lines(path, raw), {})
    except BadCheckpoint as exc:
        raise BadRecipe(str(exc)) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise BadRecipe(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    jobs = [_job(path, number, row, defaults) for number, row in enumerate(rows, 1)]
    if not jobs:
        raise BadRecipe(f"{path}: has no jobs")
    return jobs


def _of_toml(path: Path, raw: bytes) -> tuple[list[Any], dict[str, Any]]:
    text = raw.decode()
    # tomllib takes time and memory by the square of a key's parts, and a key is in one line.
    for line in _QUOTED.sub("_", text).split("\n"):
        if line.count(".") > MOST_DOTS:
            raise BadRecipe(f"{path}: a line has more than {MOST_DOTS} dots outside of strings")
    whole = _spelled(tomllib.loads(text))
    rows = whole.pop("jobs", None)
    if not isinstance(rows, list):
        raise BadRecipe(f"{path}: has no [[jobs]]")
    return rows, whole | _spelled(whole.pop("recipe", {}))


def _of_lines(path: Path, raw: bytes) -> list[Any]:
    lines = [line for line in raw.split(b"\n") if line.strip()]
    return [parse_json_object(line, f"{path}: job {number}") for number, line in enumerate(lines, 1)]


def _job(path: Path, number: int, row: object, defaults: Mapping[str, Any]) -> Job:
    where = f"{path}: job {number}"
    if not isinstance(row, dict):
        raise BadRecipe(f"{where}: not an object")
    row = _spelled(row)
    own = row | _spelled(row.pop("recipe", {}))
    own.pop("recipe", None)
    stated = {**defaults, **own}
    if unknown := sorted(stated.keys() - _OF_A_JOB - _RECIPE):
        raise BadRecipe(f"{where}: {unknown[0]!r} is not known; known: {', '.join(sorted(_OF_A_JOB | _RECIPE))}")
    for key in _OF_A_JOB & stated.keys():
        if not _is_text(stated[key]):
            raise BadRecipe(f"{where}: {key} is not a text")
    try:
        recipe = Recipe.from_json({key: stated[key] for key in _RECIPE & stated.keys()})
    except BadRecipe as exc:
        raise BadRecipe(f"{where}: {exc}") from exc
    adapter, base = stated.get("adapter"), stated.get("base")
    if adapter is None and base is None:
        raise BadRecipe(f"{where}: has neither adapter nor base")
    try:
        base, adapter = _beside(path, base), _beside(path, adapter)
        if "out" in own:
            out = path.parent / Path(own["out"]).expanduser()
        elif "out" in defaults:
            name = stated.get("name") or _last_part(stated.get("adapter") or stated["base"])
            if _NAME.fullmatch(name) is None:
                raise BadRecipe(f"{where}: {name!r} can't be a folder's name; give name or out")
            out = path.parent / Path(defaults["out"]).expanduser() / name
        else:
            raise BadRecipe(f"{where}: has no out")
    except RuntimeError as exc:  # a home folder of nobody
        raise BadRecipe(f"{where}: {exc}") from exc
    return Job(out, adapter, base, recipe, stated.get("base_revision"), stated.get("adapter_revision"))


def _is_text(value: object) -> bool:
    """Whether it is one that a path could be."""
    try:
        return isinstance(value, str) and len(os.fsencode(value)) > 0 and "\0" not in value
    except UnicodeEncodeError:
        return False


def _beside(path: Path, reference: str | None) -> str | None:
    """A folder that lies beside the file of jobs; else an id, or an absolute path."""
    if reference is None:
        return None
    there = path.parent / Path(reference).expanduser()
    return str(there) if reference.startswith((".", "/", "~")) or is_folder(there) else reference


def _spelled(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecipe(f"{type(value).__name__}: expected a table of names and values")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def slice_of(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """The `number`-th of `count` parts, from 1; jobs of one base stay together as far as the parts' sizes allow."""
    if not 1 <= number <= count:
        raise BadRecipe(f"--slice {number}/{count}: slices are counted from 1: 1/{count} to {count}/{count}")
    ordered = sorted(range(len(jobs)), key=lambda index: (group_key(jobs[index]), index))
    chosen = ordered[len(jobs) * (number - 1) // count : len(jobs) * number // count]
    return [jobs[index] for index in sorted(chosen)]


def group_key(job: Job) -> tuple[str, str, str]:
    """Equal for jobs that can be made in one pass over one base by one recipe, as far as their words tell."""
    base = "" if job.base is None else os.fspath(job.base)
    there = os.path.realpath(Path(base).expanduser()) if base and is_folder(Path(base).expanduser()) else base
    return there, job.base_revision or "", json.dumps(job.recipe.as_json(), sort_keys=True)


def grouped(
    jobs: Sequence[Job], refuse: Callable[[int, ConverterError], None], *, offline: bool = False
) -> list[dict[int, Job]]:
    """Jobs that can be made in one pass over one base, by their indices and with their base named; `refuse` hears of
    the others."""
    clashes = refuse_clashes(jobs)
    for index, error in clashes.items():
        refuse(index, error)
    groups: dict[tuple[str, str, str], dict[int, Job]] = {}
    for index, job in enumerate(jobs):
        if index not in clashes:
            try:
                named = with_base(job, offline=offline)
                groups.setdefault(group_key(named), {})[index] = named
            except ConverterError as exc:
                refuse(index, exc)
    return list(groups.values())


def with_base(job: Job, *, offline: bool = False) -> Job:
    """The job with its base named, by its adapter if it doesn't say so itself."""
    if job.base is not None or job.adapter is None:
        return job
    adapter = open_adapter(job.adapter, job.adapter_revision, offline=offline).adapter
    adapter.folder.close()
    base, revision = base_of_adapter(adapter, job.base_revision)
    return replace(job, base=base, base_revision=revision)


def refuse_clashes(jobs: Sequence[Job]) -> dict[int, ConverterError]:
    """Jobs whose OUT is, holds or lies in that of an earlier one: index → why."""
    clashes: dict[int, ConverterError] = {}
    tree = _Branch(-1)
    for index, job in enumerate(jobs):
        other = tree.take(Path(os.path.realpath(job.out.expanduser())).parts, index)
        if other is not None:
            clashes[index] = BadRecipe(f"{job.out}: clashes with {jobs[other].out}; give each its own name, NAME=PATH")
    return clashes


class _Branch:
    """Folders by the parts of their names, so that a hundred thousand needn't be compared with each other."""

    __slots__ = ("branches", "first")

    def __init__(self, first: int) -> None:
        self.first = first
        """Whose this was first; it is an OUT where nothing branches off it."""
        self.branches: dict[str, _Branch] = {}

    def take(self, parts: Sequence[str], index: int) -> int | None:
        """Make a folder somebody's; None, or whose another is that is it, or holds it, or lies in it."""
        here = self
        for number, part in enumerate(parts):
            branch = here.branches.get(part)
            if branch is None and not here.branches and here is not self:
                return here.first
            if branch is None:
                for new in parts[number:]:
                    here.branches[new] = here = _Branch(index)
                return None
            here = branch
        return here.first
