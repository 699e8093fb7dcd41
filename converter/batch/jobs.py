"""The jobs of a batch: named by their adapters, divided into slices and into groups of one base and recipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from converter.batch.adapters import adapters_of, names_several
from converter.errors import BadRecipe, ConverterError
from converter.job import Job, Reference, RunOptions
from converter.plan.adapters import open_adapters, wanted
from converter.plan.inputs import base_of_adapter
from converter.read.folder import is_folder
from converter.recipe import Recipe

FOLDER_NAME = re.compile(r"[^/\0.][^/\0]*")
"""What an output may be called."""


def named_jobs(
    adapters: Iterable[str],
    out: Path,
    base: Reference | None,
    recipe: Recipe,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
) -> list[Job]:
    """A job for each adapter, whose output is a folder of `out`, called as the adapter is.

    An adapter is a path, an id on the Hub, or `NAME=` and one of these. A folder of adapters and a glob such as
    `ads/*` stand for all adapters there. `BadRecipe` if two get the same name, or a glob matches none.
    """
    jobs: dict[str, Job] = {}
    for text in adapters:
        for name, adapter in _named(text):
            if FOLDER_NAME.fullmatch(name) is None:
                raise BadRecipe(f"`adapter` {text}: {name!r} can't be a folder's name; give NAME=PATH")
            if name in jobs:
                raise BadRecipe(f"`adapter` {text}: another adapter is called {name}, too; give NAME=PATH")
            jobs[name] = Job(out / name, adapter, base, recipe, base_revision, adapter_revision)
    return list(jobs.values())


def are_named(adapters: Sequence[str]) -> bool:
    """Whether these adapters have outputs by their names (`named_jobs`), and not one output that is OUT itself."""
    return len(adapters) > 1 or any(split_name(text)[0] is not None or names_several(text) for text in adapters)


def _named(text: str) -> Iterator[tuple[str, str]]:
    """Name and reference of each adapter that a word of the command line stands for."""
    name, reference = split_name(text)
    if not names_several(reference):
        yield name or last_part(reference), reference
    elif name is not None:
        raise BadRecipe(f"`adapter` {text}: {name} can't name several adapters; leave {name}= out")
    else:
        yield from ((name, str(folder)) for name, folder in adapters_of(reference).items())


def last_part(reference: str) -> str:
    """The last part of a path or of an id on the Hub."""
    return os.path.basename(os.path.normpath(reference))  # noqa: PTH119


def split_name(text: str) -> tuple[str | None, str]:
    """NAME and PATH of `NAME=PATH`; a path that contains = and exists is a path."""
    name, sign, adapter = text.partition("=")
    return (name, adapter) if sign and name and "/" not in name and not os.path.lexists(text) else (None, text)


def slice_of(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """The `number`-th of `count` parts, from 1. Jobs of one base stay together as far as the parts' sizes allow."""
    if not 1 <= number <= count:
        raise BadRecipe(f"`part` {number}/{count}: slices are counted from 1: 1/{count} to {count}/{count}")
    ordered = sorted(range(len(jobs)), key=lambda index: (group_key(jobs[index]), index))
    chosen = ordered[len(jobs) * (number - 1) // count : len(jobs) * number // count]
    return [jobs[index] for index in sorted(chosen)]


def group_key(job: Job) -> tuple[str, str, str]:
    """Equal for jobs that one pass over one base can make, as far as their words tell: same base, same recipe."""
    base = "" if job.base is None else os.fspath(job.base)
    there = os.path.realpath(Path(base).expanduser()) if base and is_folder(Path(base).expanduser()) else base
    return there, job.base_revision or "", json.dumps(job.recipe.as_json(), sort_keys=True)


def grouped(
    jobs: Sequence[Job], refuse: Callable[[int, ConverterError], None], options: RunOptions = RunOptions()
) -> list[dict[int, Job]]:
    """Groups of jobs of one base and recipe, by their indices, each job with its base named.

    `refuse` is told of the jobs that are in no group.
    """
    clashes = clashing(jobs)
    for index, error in clashes.items():
        refuse(index, error)
    groups: dict[tuple[str, str, str], dict[int, Job]] = {}
    for index, job in enumerate(jobs):
        if index not in clashes:
            try:
                named = with_base(job, options)
                groups.setdefault(group_key(named), {})[index] = named
            except ConverterError as exc:
                refuse(index, exc)
    return list(groups.values())


def with_base(job: Job, options: RunOptions = RunOptions()) -> Job:
    """The job with the base that its adapter names, if it names none itself."""
    meant = wanted(job.adapter, job.recipe.combine)
    if job.base is not None or meant is None:
        return job
    opened = open_adapters(meant, job.adapter_revision, **options.of_inputs())
    adapter = opened.adapter
    opened.close()
    base, revision = base_of_adapter(adapter, job.base_revision)
    return replace(job, base=base, base_revision=revision)


def clashing(jobs: Sequence[Job]) -> dict[int, ConverterError]:
    """Jobs whose OUT is, contains or lies in the OUT of an earlier job that doesn't clash itself: index → why."""
    clashes: dict[int, ConverterError] = {}
    outs: dict[Path, int] = {}
    parents: dict[Path, int] = {}
    """Every folder above one of `outs`, and the first job whose OUT lies in it."""
    for index, job in enumerate(jobs):
        out = Path(os.path.realpath(job.out.expanduser()))
        above = list(out.parents)
        other = next((outs[folder] for folder in (out, *above) if folder in outs), parents.get(out))
        if other is not None:
            clashes[index] = BadRecipe(f"{job.out}: clashes with {jobs[other].out}; give each its own name, NAME=PATH")
            continue
        outs[out] = index
        for folder in above:
            parents.setdefault(folder, index)
    return clashes
