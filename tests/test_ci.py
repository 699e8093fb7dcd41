"""What other repositories take for their CI: linted by schemas and by hadolint, and run by a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from converter import Recipe, convert
from converter.export.export import export
from tests.conftest import REPOSITORY
from tests.delivery.scenes import job_file
from tests.limits import HANG

PROGRAMS = Path(sys.executable).parent
SCHEMAS = {
    "action.yml": ["vendor.github-actions"],
    ".github/workflows/convert.yml": ["vendor.github-workflows"],
    "ci/gitlab.yml": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}


def lint(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / program), *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG, check=False)


@pytest.mark.parametrize("file", SCHEMAS)
def test_a_template_is_what_its_schema_takes(file: str) -> None:
    ran = lint("check-jsonschema", "--builtin-schema", *SCHEMAS[file], file)

    assert ran.returncode == 0, ran.stdout


def test_a_template_with_a_misspelled_name_is_found(tmp_path: Path) -> None:
    text = (REPOSITORY / "action.yml").read_text()
    (tmp_path / "action.yml").write_text(text.replace("  using: composite", "  usign: composite"))

    assert (
        lint("check-jsonschema", "--builtin-schema", "vendor.github-actions", tmp_path / "action.yml").returncode == 1
    )


def test_the_container_file_has_nothing_that_hadolint_warns_of() -> None:
    ran = lint("hadolint", "Containerfile")

    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_the_container_file_of_an_export_is_as_clean(
    quant_type: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    convert(base, adapter, tmp_path / "out", Recipe(quant_type=quant_type))
    export(tmp_path / "out", "vllm", tmp_path / "x")

    ran = lint("hadolint", tmp_path / "x" / "Containerfile")

    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_container_runs_as_nobody_and_has_only_what_it_needs() -> None:
    text = (REPOSITORY / "Containerfile").read_text()
    last = text[text.rindex("\nFROM ") :]

    assert "USER 1000:1000" in last
    assert "pip" not in last
    for copied in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "converter"):
        assert f"!{copied}\n" in (REPOSITORY / "Containerfile.dockerignore").read_text()
        assert (REPOSITORY / copied).exists()


def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "action.yml").read_text())
    return found


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step as a runner does: bash -e, with pipefail."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.fixture
def runner(tmp_path: Path) -> dict[str, str]:
    """The environment of a runner on which the converter is installed."""
    programs = tmp_path / "temp" / "convert" / "bin"
    programs.mkdir(parents=True)
    (programs / "nf4-convert").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m converter "$@"\n')
    (programs / "nf4-convert").chmod(0o755)
    return {
        "RUNNER_TEMP": str(tmp_path / "temp"),
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "SOURCE": str(REPOSITORY),
        "SLICE": "1/1",
        "ARGUMENTS": "--threads 1 --quiet",
        "PATH": f"{programs}:{PROGRAMS}:{os.environ['PATH']}",
    }


def test_the_action_publishes_and_leaves_a_page_and_the_state(runner: dict[str, str], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", min_survival=0.9)
    (step,) = (one for one in action()["runs"]["steps"] if one.get("id") == "convert")

    ran = shell(step["run"], tmp_path, FILE=file.name, **runner)

    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "config.json").exists()
    state = (tmp_path / "outputs").read_text().removeprefix("state=").strip()
    assert list(json.loads(Path(state).read_text())["outputs"]) == ["out"]
    row = (tmp_path / "summary.md").read_text().splitlines()[4]
    assert row.startswith("| out | announce | 0.09")
    assert {*step["env"]} <= {*runner, "FILE"}


def test_a_missed_gate_fails_the_action_and_the_page_says_why(runner: dict[str, str], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", min_survival=0.9999)
    (step,) = (one for one in action()["runs"]["steps"] if one.get("id") == "convert")

    ran = shell(step["run"], tmp_path, FILE=file.name, **runner)

    assert ran.returncode == 4
    summary = (tmp_path / "summary.md").read_text()
    assert "**gates failed**" in summary
    assert "has survival" in summary
    assert not (tmp_path / "out").exists()


def test_an_input_of_the_action_is_never_a_part_of_a_script() -> None:
    steps = action()["runs"]["steps"]
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "convert.yml").read_text())
    steps += [step for job in workflow["jobs"].values() for step in job["steps"]]

    assert [step for step in steps if "${{" in step.get("run", "")] == []


def test_the_template_of_gitlab_publishes(runner: dict[str, str], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out")
    job = yaml.safe_load((REPOSITORY / "ci" / "gitlab.yml").read_text())[".convert"]

    environment = runner | {"ARGUMENTS": "--threads 1 --quiet", "CI_NODE_INDEX": "1", "CI_NODE_TOTAL": "1"}
    ran = shell("\n".join(job["script"]), tmp_path, FILE=file.name, **environment)

    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "config.json").exists()
    assert all((tmp_path / path).exists() for path in job["artifacts"]["paths"])


def test_the_login_of_stores_sets_only_what_there_is(tmp_path: Path) -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "convert.yml").read_text())
    (step,) = (one for one in workflow["jobs"]["convert"]["steps"] if one.get("name") == "Login of stores")
    given = {**dict.fromkeys(step["env"], ""), "STORE_HF_TOKEN": "hf_x", "GITHUB_ENV": str(tmp_path / "env")}

    assert shell(step["run"], tmp_path, **given).returncode == 0

    assert (tmp_path / "env").read_text() == "HF_TOKEN=hf_x\n"


def test_a_page_without_a_state_file_says_so(tmp_path: Path) -> None:
    ran = shell(f'python "{REPOSITORY}/ci/summary.py" nothing.json', tmp_path, PATH=f"{PROGRAMS}:{os.environ['PATH']}")

    assert (ran.returncode, ran.stdout) == (0, "## convert\n\nNothing was begun; see the log.\n")
