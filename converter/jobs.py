"""What a batch is asked for: its jobs, from a file or from the command line, and how they are divided."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from converter.errors import BadRecipe, ConverterError
from converter.inputs import Reference, base_of_adapter, open_adapter
from converter.recipe import Recipe

MOST_BYTES = 64_000_000
"""Of a file of jobs."""
_RECIPE = {field.name for field in fields(Recipe)}
_OF_A_JOB = {"name", "base", "base_revision", "adapter", "adapter_revision", "out"}
_NAME = re.compile(r"[^/\0]+")


@dataclass(frozen=True)
class Job:
    """One checkpoint to be made."""

    out: Path
    adapter: Reference | None
    base: Reference | None = None
    """None: the one that the adapter names."""
    recipe: Recipe = Recipe()
    base_revision: str | None = None
    adapter_revision: str | None = None

    @property
    def label(self) -> str:
        return str(self.out)


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
        if _NAME.fullmatch(name) is None or name in (".", "..") or name.startswith("."):
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
    return (name, adapter) if sign and name and "/" not in name and not Path(text).exists() else (None, text)


def read_jobs(path: Path) -> list[Job]:
    """The jobs in a file: TOML with `[[jobs]]`, whose other values are everybody's defaults; or a JSON object a line.

    Each has base, adapter, out, base_revision, adapter_revision, and the recipe's names (quant_type, keep, …), with -
    or _. Without `out`, a job lies under the defaults' `out` by its `name`, or that of its adapter. Relative paths are
    relative to the file. Raises `BadRecipe`, naming the job.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadRecipe(f"{path}: more than {MOST_BYTES:,} bytes")
        text = path.read_text()
        if path.suffix == ".toml":
            whole = _spelled(tomllib.loads(text))
            rows = whole.pop("jobs", None)
            if not isinstance(rows, list):
                raise BadRecipe(f"{path}: has no [[jobs]]")
            defaults = whole | _spelled(whole.pop("recipe", {}))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            defaults = {}
    except (OSError, ValueError, RecursionError) as exc:
        raise BadRecipe(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    jobs = [_job(path, number, row, defaults) for number, row in enumerate(rows, 1)]
    if not jobs:
        raise BadRecipe(f"{path}: has no jobs")
    return jobs


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
        if not isinstance(stated[key], str) or not stated[key]:
            raise BadRecipe(f"{where}: {key} is not a text")
    try:
        choices = {key: stated[key] for key in _RECIPE & stated.keys()}
        if not isinstance(choices.get("double_quant", True), bool):
            raise BadRecipe("double_quant is neither true nor false")
        if "keep" in choices:
            choices["keep"] = tuple([choices["keep"]] if isinstance(choices["keep"], str) else choices["keep"])
            if not all(isinstance(pattern, str) for pattern in choices["keep"]):
                raise BadRecipe("keep is not a list of texts")
        if type(choices.get("max_shard_size", 0)) is not int:
            raise BadRecipe("max_shard_size is not a number of bytes")
        recipe = Recipe(**choices)
    except (BadRecipe, TypeError) as exc:
        raise BadRecipe(f"{where}: {exc}") from exc
    adapter, base = stated.get("adapter"), stated.get("base")
    if adapter is None and base is None:
        raise BadRecipe(f"{where}: has neither adapter nor base")
    if "out" in own:
        out = path.parent / own["out"]
    elif "out" in defaults:
        name = stated.get("name") or _last_part(adapter or str(base))
        out = path.parent / defaults["out"] / name
    else:
        raise BadRecipe(f"{where}: has no out")
    return Job(
        out,
        _beside(path, adapter),
        _beside(path, base),
        recipe,
        stated.get("base_revision"),
        stated.get("adapter_revision"),
    )


def _beside(path: Path, reference: str | None) -> str | None:
    """A folder that lies beside the file of jobs; else an id, or an absolute path."""
    if reference is None:
        return None
    there = path.parent / Path(reference).expanduser()
    return str(there) if reference.startswith((".", "/", "~")) or there.is_dir() else reference


def _spelled(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecipe(f"{value!r}: expected a table of names and values")
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
    there = os.path.realpath(Path(base).expanduser()) if base and Path(base).expanduser().is_dir() else base
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
    seen: dict[Path, int] = {}
    for index, job in enumerate(jobs):
        out = Path(os.path.realpath(job.out.expanduser()))
        other = next((seen[path] for path in (out, *out.parents) if path in seen), None)
        if other is None:
            other = next((number for path, number in seen.items() if out in path.parents), None)
        if other is not None:
            clashes[index] = BadRecipe(f"{job.out}: clashes with {jobs[other].out}; give each its own name, NAME=PATH")
        else:
            seen[out] = index
    return clashes
