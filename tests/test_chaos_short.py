"""A sample of `make chaos`: whatever fails, OUT is absent or whole, and the same command goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_of_a_sample_of_all_faults_none_loses_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "chaos", "--short", "--json", os.fspath(report)]

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)

    assert report.exists(), done.stderr
    rows = json.loads(report.read_text())
    assert [failure for row in rows for failure in row["failures"]] == []
    assert done.returncode == 0
    assert "python -m chaos batch" in {row["command"] for row in rows}
    for row in rows:
        if row["skipped"]:
            with capsys.disabled():
                sys.stdout.write(f"\nskipped: {row['fault']}: {row['skipped']}\n")
        else:
            assert row["tried"] > 0, row["fault"]
            assert row["absent"] + row["whole"] == row["resumed"] == row["tried"]
