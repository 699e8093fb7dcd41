"""What CI installs by hash is what constraints.txt pins."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text().splitlines()
LOCKED = (REPOSITORY / "locked.txt").read_text().replace("\\\n", "").splitlines()
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
    versions = dict(map(name_and_version, CONSTRAINTS))
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(r for e in extras for r in e)]

    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
