"""What CI installs by hash is what constraints.txt pins."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY
from tools.environments import ENVIRONMENTS

CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text().splitlines()
LOCKED = (REPOSITORY / "locked.txt").read_text().replace("\\\n", "").splitlines()
ROOTS = ("converter", "tests", "benchmarks", "chaos", "fuzz", "fixtures", "tools", "ci")
OPTIONAL = {"atheris", "auto_round", "axolotl", "llmcompressor", "mlflow", "openai", "unsloth_zoo"}
"""`make fuzz` says how to get the first; tools/environments.py installs the others where they are needed."""
ENTRIES = [line for line in LOCKED if line and not line.startswith(("#", "--"))]


def name_and_version(line: str) -> tuple[str, str]:
    name, _, version = line.partition("==")
    return canonicalize_name(name), version


def test_both_lists_name_the_same_packages_and_versions() -> None:
    assert [name_and_version(entry.split()[0]) for entry in ENTRIES] == [name_and_version(c) for c in CONSTRAINTS]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.split()[0] for entry in ENTRIES])
def test_every_entry_has_hashes_and_nothing_else(entry: str) -> None:
    hashes = entry.split()[1:]

    assert hashes
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes)
    assert len(set(hashes)) == len(hashes)


def test_no_package_is_named_twice() -> None:
    names = [name_and_version(line)[0] for line in CONSTRAINTS]

    assert len(set(names)) == len(names)


def test_the_list_takes_wheels_only() -> None:
    assert [line for line in LOCKED if line.startswith("--")] == ["--only-binary :all:"]


def test_what_the_checkout_asks_for_is_pinned_in_the_range_that_it_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    (server,) = ENVIRONMENTS["mlflow"].packages  # which has the client of its own version
    versions = dict(map(name_and_version, CONSTRAINTS)) | {"mlflow-skinny": name_and_version(server)[1]}
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(r for e in extras for r in e)]

    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def imported() -> set[str]:
    """The outermost names of what the repository's own files import, but Python's own and its own packages."""
    files = sorted(path for root in ROOTS for path in (REPOSITORY / root).rglob("*.py"))
    trees = [ast.parse(path.read_text()) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return (
        {name.partition(".")[0] for name in names}
        - sys.stdlib_module_names
        - {path.stem for path in files}
        - {*ROOTS, *OPTIONAL}
    )


def test_whatever_is_imported_is_pinned() -> None:
    """What somebody installed by hand isn't there in a fresh clone."""
    distributions, pinned = packages_distributions(), {name_and_version(line)[0] for line in CONSTRAINTS}
    packages = imported()

    assert {"torch", "yaml"} <= packages
    assert [
        package
        for package in sorted(packages)
        if not {canonicalize_name(name) for name in distributions.get(package, [package])} & pinned
    ] == []
