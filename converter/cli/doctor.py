"""`convert doctor`: check whether this machine has what a conversion needs, and say what to do if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from converter.cli.options import flag, with_help, with_offline

EXAMPLES = """\b
Examples:
  convert doctor
  convert doctor /data/outputs
Exit code:
  0 nothing is wrong
  1 something is wrong
"""


@cloup.command(short_help="Check versions, devices, kernels, caches, disk and login.", epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@cloup.option_group(
    "Behaviour",
    with_offline,
    flag("--json", "as_json", text="Print one JSON object on stdout."),
    with_help,
)
def doctor(folder: Path, **options: Any) -> None:
    """Check what a conversion needs: versions, devices (each GPU quantizes a tensor, which is compared), kernels, cache
    folders, the speed of the disk of FOLDER, and the Hub's login. Say what to do about what is wrong.
    """
    from converter.cli.printing import print_text
    from converter.cli.show.words import json_text, text_of
    from converter.health import examine

    findings = []
    for finding in examine(folder, offline=options["offline"]):
        findings.append(finding)
        if not options["as_json"]:
            lines = [f"{finding.state:5} {finding.what}: {finding.found}"]
            print_text(text_of(lines + ([f"      to do: {finding.step}"] if finding.step else [])))
    wrong = sum(finding.state == "wrong" for finding in findings)
    if options["as_json"]:
        print_text(json_text({"good": wrong == 0, "findings": [finding._asdict() for finding in findings]}))
    else:
        print_text(f"{wrong or 'nothing'} {'things are' if wrong > 1 else 'thing is' if wrong else 'is'} wrong\n")
    if wrong:
        raise click.exceptions.Exit(1)
