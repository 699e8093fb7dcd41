"""Ask a service of advisories, through pip-audit, about every package of locked.txt; end with 1 unless all are clean.

pip-audit alone also ends well where nothing was asked: at a mirror that serves packages without advisories. So the
service must first know an old, fixed vulnerability, and then answer for every package by name.
Arguments go to pip-audit: `--vulnerability-service osv`, `--osv-url URL`, `--timeout SECONDS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

LOCKED = Path(__file__).parent.parent / "locked.txt"
KNOWN = ("jinja2", "2.10", "CVE-2019-10906")
"""A package, a version, and an advisory on it that every service has had since 2019."""


class Refused(Exception):
    """Why nothing is known to be clean, or what isn't."""


def listed(requirements: Path) -> dict[str, str]:
    """Name, in the index's spelling → version."""
    entries = [line.split()[0] for line in requirements.read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, _, version in (entry.partition("==") for entry in entries)}


def report(requirements: Path, arguments: list[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Name and version → the vulnerabilities known of it. Refused where the service doesn't answer for all of them."""
    ran = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pip_audit",
                "--strict",
                "--disable-pip",
                "--no-deps",
                "--requirement",
                requirements,
            ),
            *("--format", "json", "--desc", "off", "--aliases", "on", "--progress-spinner", "off", *arguments),
        ],
        capture_output=True,
        text=True,
    )
    try:  # its exit code is 1 for a vulnerability and for a failure alike
        dependencies = json.loads(ran.stdout)["dependencies"]
    except ValueError:
        said = ran.stderr.strip().splitlines() or [f"pip-audit ended with {ran.returncode}"]
        raise Refused(f"the service did not answer: {said[-1]}") from None
    answered = {(d["name"], d["version"]): d["vulns"] for d in dependencies if "version" in d}
    if missing := listed(requirements).items() - answered.keys():
        raise Refused(f"not answered for: {', '.join(sorted(f'{name} {version}' for name, version in missing))}")
    return answered


def check_that_it_knows(arguments: list[str]) -> None:
    name, version, advisory = KNOWN
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "known.txt")
        requirement.write_text(f"{name}=={version}\n")
        (vulnerabilities,) = report(requirement, arguments).values()
    if not any(advisory in (v["id"], *v["aliases"]) for v in vulnerabilities):
        raise Refused(f"the service does not know {advisory} of {name} {version}: it has no advisories")


def main(arguments: list[str]) -> None:
    check_that_it_knows(arguments)
    answered = report(LOCKED, arguments)
    found = [
        f"{name} {version}: {' '.join([v['id'], *v['aliases']])}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for (name, version), vulnerabilities in answered.items()
        for v in vulnerabilities
    ]
    if found:
        raise Refused("\n  ".join(["known vulnerabilities:", *found]))
    print(f"audit: {len(answered)} packages, no known vulnerability")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refused:
        sys.exit(f"audit: {refused}")
