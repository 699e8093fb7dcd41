"""`make release` makes files only of what is committed, audited and checked. The repository here is a small one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MAKEFILE = """\
audit:
\techo "$(AUDIT)" > audited
\ttest ! -e vulnerable
check:
\ttest ! -e broken
\tmkdir -p .venv/bin
\techo '#!/bin/sh' > .venv/bin/python
\techo 'exec {python} "$$@"' >> .venv/bin/python
\tchmod +x .venv/bin/python
"""
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "small"
version = "1.2"
[tool.setuptools]
packages = ["converter"]
"""
CONVERTS = """\
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(__file__)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "converter").mkdir(parents=True)
    (folder / "tools").mkdir()
    (folder / "tools" / "release.py").write_text((REPOSITORY / "tools" / "release.py").read_text())
    (folder / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2\n\n- It is.\n")
    (folder / ".gitignore").write_text("/build/\n/dist/\n")
    (folder / "converter" / "__init__.py").write_text("")
    (folder / "converter" / "__main__.py").write_text(CONVERTS)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=folder, env=os.environ | identity, check=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "so")


def make_release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/release.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_release_is_a_source_archive_and_a_wheel_that_converts_and_their_digests(repository: Path) -> None:
    ran = make_release(repository, "-s", "osv")

    assert ran.returncode == 0, ran.stderr
    dist = repository / "dist"
    assert {file.name for file in dist.iterdir()} == {"small-1.2.tar.gz", "small-1.2-py3-none-any.whl", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)
    assert (repository / "build" / "release" / "audited").read_text() == "-s osv\n"
    ran_from = (repository / "build" / "release" / "build" / "of-the-wheel").read_text()
    assert ran_from == str(repository / "build" / "release" / "build" / "wheel" / "converter" / "__main__.py")


@pytest.mark.parametrize(("fault", "said"), [("vulnerable", "make audit failed"), ("broken", "make check failed")])
def test_nothing_is_made_of_what_is_not_audited_or_fails_its_tests(repository: Path, fault: str, said: str) -> None:
    (repository / fault).touch()
    commit(repository)

    ran = make_release(repository)

    assert ran.returncode == 1
    assert ran.stderr.endswith(f"release: {said}\n")
    assert not (repository / "dist").exists()


def test_a_release_that_is_refused_leaves_no_earlier_one_that_could_be_taken_for_it(repository: Path) -> None:
    assert make_release(repository).returncode == 0
    (repository / "vulnerable").touch()

    assert make_release(repository).returncode == 1
    assert not (repository / "dist").exists()


def test_what_is_not_committed_is_not_released(repository: Path) -> None:
    (repository / "converter" / "new.py").touch()

    ran = make_release(repository)

    assert ran.returncode == 1
    assert "release: not committed:\n?? converter/new.py\n" in ran.stderr


def test_a_version_without_a_section_in_the_changelog_is_not_released(repository: Path) -> None:
    (repository / "CHANGELOG.md").write_text("# Changelog\n\n## 1.20\n")
    commit(repository)

    assert "release: CHANGELOG.md has no section 1.2\n" in make_release(repository).stderr


def test_a_version_that_is_tagged_is_not_released_again(repository: Path) -> None:
    git(repository, "tag", "v1.2")

    assert "release: v1.2 is tagged already" in make_release(repository).stderr
