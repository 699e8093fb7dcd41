"""Write locked.txt: constraints.txt with the SHA-256 of every wheel that pip may pick on Linux, for a few Pythons.

uv asks the index for names and hashes; pip says which build of torch it finds here. Nothing is downloaded but metadata.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

REPOSITORY = Path(__file__).parent.parent
PYTHONS = ((3, 11), (3, 12), (3, 13))
MACHINES = ("x86_64", "aarch64")
OF_CUDA = ("nvidia-", "cuda-", "triton")
"""How the names of packages begin that torch's CUDA build needs, and its CPU build does not."""

HEAD = """\
# Written by `make lock` from constraints.txt; do not edit. What CI installs on Linux with glibc, x86-64 or ARM, with
# Python {first} to {last}. torch has two builds: the CPU build is listed for {cpu},
# the CUDA build for all others, without what it needs of NVIDIA's.
--only-binary :all:

"""


class Refused(Exception):
    """Why no list is written."""


class Target(NamedTuple):
    python: tuple[int, int]
    machine: str

    def __str__(self) -> str:
        return f"Python {self.python[0]}.{self.python[1]} on {self.machine}"

    def needs(self, marker: str | None) -> bool:
        version = f"{self.python[0]}.{self.python[1]}"
        environment = {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{version}.0",
            "python_version": version,
            "sys_platform": "linux",
        }
        return marker is None or Marker(marker).evaluate(environment)

    def takes(self, tag: Tag) -> bool:
        """Whether pip may pick a wheel with this tag, on one Linux or another with glibc."""
        python = f"cp{self.python[0]}{self.python[1]}"
        if tag.platform != "any" and not (
            tag.platform.startswith(("manylinux", "linux_")) and tag.platform.endswith(self.machine)
        ):
            return False
        if tag.abi == "abi3":
            return tag.interpreter in {f"cp3{minor}" for minor in range(2, self.python[1] + 1)}
        return (tag.interpreter == python and tag.abi in (python, "none")) or (
            tag.interpreter in {"py3", *(f"py3{minor}" for minor in range(self.python[1] + 1))} and tag.abi == "none"
        )


TARGETS = [Target(python, machine) for python in PYTHONS for machine in MACHINES]


def pinned(constraints: str) -> dict[str, str]:
    """Name, in the index's spelling → version, in the order of the list."""
    versions: dict[str, str] = {}
    for line in constraints.splitlines():
        requirement = Requirement(line)
        (only,) = requirement.specifier
        if only.operator != "==" or requirement.marker is not None:
            raise Refused(f"constraints.txt: {line} is not NAME==VERSION")
        versions[canonicalize_name(requirement.name)] = only.version
    return versions


def resolved() -> list[dict[str, Any]]:
    """Every package that the checkout with its dev extra and its build need, with all wheels of its version."""
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        needs, out = Path(folder, "build.in"), Path(folder, "pylock.toml")
        needs.write_text("\n".join(build))
        _run(
            *("uv", "pip", "compile", "--quiet", "--universal", "--no-build", "--no-config", "--python-version"),
            *(f"{PYTHONS[0][0]}.{PYTHONS[0][1]}", "--constraint", "constraints.txt", "--extra", "dev"),
            *("--format", "pylock.toml", "--output-file", out, "pyproject.toml", needs),
        )
        packages: list[dict[str, Any]] = tomllib.loads(out.read_text())["packages"]
    return packages


def locked(versions: dict[str, str], packages: Iterable[dict[str, Any]], cpu: dict[Target, str]) -> dict[str, set[str]]:
    """Name → SHA-256 of every wheel that some target may take; the names of both lists must be the same.

    Where a CPU build of torch is known, its CUDA build is not listed. pip would prefer that one: its index tells the
    hash, a folder of wheels does not.
    """
    hashes: dict[str, set[str]] = {}
    for package in packages:
        name, targets = package["name"], [target for target in TARGETS if target.needs(package.get("marker"))]
        if not targets or name.startswith(OF_CUDA):
            continue
        if versions.get(name) != package["version"]:
            raise Refused(f"constraints.txt lacks {name}=={package['version']}")
        hashes[name] = set()
        for target in targets:
            if name == "torch" and target in cpu:
                hashes[name].add(cpu[target])
                continue
            fitting = {
                wheel["hashes"]["sha256"]
                for wheel in package.get("wheels", ())
                if any(map(target.takes, parse_wheel_filename(wheel["url"].rpartition("/")[2])[3]))
            }
            if not fitting:
                print(f"{name} has no wheel for {target}")
            hashes[name] |= fitting
    if superfluous := versions.keys() - hashes.keys():
        raise Refused(f"constraints.txt names what nothing needs: {', '.join(sorted(superfluous))}")
    return hashes


def cpu_builds(version: str) -> Iterator[tuple[Target, str]]:
    """The SHA-256 of torch's CPU build, where pip finds one: in an index or a folder that the user has added."""
    for target in TARGETS:
        report = _run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"),
            *("--python-version", "{}.{}".format(*target.python), "--platform", f"manylinux_2_28_{target.machine}"),
            *("--only-binary", ":all:", "--target", "build/lock/none", "--report", "-", f"torch=={version}"),
        )
        (torch,) = json.loads(report)["install"]
        if torch["metadata"]["version"].endswith("+cpu"):
            yield target, torch["download_info"]["archive_info"]["hashes"]["sha256"]


def _run(*command: object) -> str:
    program = Path(sys.executable).parent / str(command[0])
    ran = subprocess.run([str(program), *map(str, command[1:])], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise Refused(f"{command[0]} failed")
    return ran.stdout


def main() -> None:
    versions = pinned((REPOSITORY / "constraints.txt").read_text())
    cpu = dict(cpu_builds(versions["torch"]))
    if not cpu:
        raise Refused(
            "pip finds no CPU build of torch: name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL, or a folder"
            " with the wheel in PIP_FIND_LINKS"
        )
    hashes = locked(versions, resolved(), cpu)
    text = HEAD.format(
        first="{}.{}".format(*PYTHONS[0]), last="{}.{}".format(*PYTHONS[-1]), cpu=", ".join(map(str, cpu))
    )
    for name, version in versions.items():
        text += " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{h}" for h in sorted(hashes[name]))]) + "\n"
    (REPOSITORY / "locked.txt").write_text(text)
    print(f"locked.txt: {len(versions)} packages, {sum(map(len, hashes.values()))} wheels")


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        sys.exit(f"lock: {refused}")
