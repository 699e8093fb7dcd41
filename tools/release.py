"""Make the files of a release in dist/: of a committed tree that passes `make audit` and `make check`, and as a wheel.

Nothing is published. Arguments go to tools/audit.py.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
"""By the locked setuptools of the checkout, not by one that is fetched for it."""


class Refused(Exception):
    """Why there is no release."""


def version_of(repository: Path) -> str:
    """Refused where the version is not told in the changelog, or is taken."""
    version: str = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    if f"## {version}" not in (repository / "CHANGELOG.md").read_text().splitlines():
        raise Refused(f"CHANGELOG.md has no section {version}")
    if _run(repository, "git", "tag", "--list", f"v{version}"):
        raise Refused(f"v{version} is tagged already: raise the version in pyproject.toml")
    return version


def release(repository: Path, audit: list[str]) -> list[Path]:
    """The files in dist/, SHA256SUMS last. The steps run in a clone, with packages that are installed by hash."""
    clone, dist = repository / "build" / "release", repository / "dist"
    for stale in (clone, dist):
        shutil.rmtree(stale, ignore_errors=True)
    if changed := _run(repository, "git", "status", "--porcelain"):
        raise Refused(f"not committed:\n{changed}")
    version = version_of(repository)
    _run(repository, "git", "clone", "--quiet", "--no-local", repository, clone)
    for target in (["audit", f"AUDIT={shlex.join(audit)}"], ["check"]):
        if subprocess.run(["make", "CI=1", *target], cwd=clone).returncode:
            raise Refused(f"make {target[0]} failed")
    _run(clone, clone / ".venv" / "bin" / "python", "-c", BUILD)
    convert_with(next((clone / "dist").glob(f"*-{version}-*.whl")), clone)
    files = sorted((clone / "dist").iterdir())
    sums = clone / "dist" / "SHA256SUMS"
    sums.write_text("".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files))
    (clone / "dist").rename(dist)
    return [dist / file.name for file in (*files, sums)]


def convert_with(wheel: Path, clone: Path) -> None:
    """The bundled model, by what is in the wheel and not by what lies in the checkout."""
    place = clone / "build" / "wheel"
    python = clone / ".venv" / "bin" / "python"
    _run(clone, python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", place, wheel)
    fixtures = clone / "fixtures"
    _run(
        *(place, python, "-m", "converter", "--base", fixtures / "tiny-base", "--adapter", fixtures / "tiny-adapter"),
        *("--out", clone / "build" / "of-the-wheel"),
    )


def _run(folder: Path, *command: object) -> str:
    """What a command prints; the folder is where Python looks for packages first."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    ran = subprocess.run([*map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise Refused(f"{shlex.join(map(str, command))} ended with {ran.returncode}")
    return ran.stdout.rstrip()


if __name__ == "__main__":
    try:
        made = release(Path(__file__).parent.parent, sys.argv[1:])
    except Refused as refused:
        sys.exit(f"release: {refused}")
    print("\n".join(str(file) for file in made))
