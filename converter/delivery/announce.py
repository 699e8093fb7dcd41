"""Tell others of a published output: a program gets the result, as JSON, on its standard input."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from converter.batch.afterwards import Afterwards
from converter.errors import AnnouncementFailed

PATIENCE = 600
"""Seconds that the program may take."""


def announce(afterwards: Afterwards, result: Mapping[str, Any], patience: float = PATIENCE) -> None:
    """Run the program that the file of jobs names, in the folder of that file. `AnnouncementFailed` says why it failed;
    the output is published nevertheless."""
    name = afterwards.command[0]
    try:
        ran = subprocess.run(
            afterwards.command,
            input=json.dumps(result) + "\n",
            cwd=afterwards.folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
            check=False,
        )
    except OSError as exc:
        raise AnnouncementFailed(f"announce: {name}: {exc.strerror or exc}") from exc
    except subprocess.TimeoutExpired:
        raise AnnouncementFailed(f"announce: {name}: not done after {patience:g} s") from None
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip()).rpartition("\n")[2]
        raise AnnouncementFailed(f"announce: {name}: exit code {ran.returncode}{said and ': '}{said}")
