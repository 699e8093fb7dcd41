"""What the command line is started with: standard streams, descriptors, signals that are ignored."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converter import plan_conversion, verify
from converter.cli.signals import Signals
from tests.cli.conftest import Ran, Run
from tests.cli.terminal import run_here
from tests.conftest import REPOSITORY
from tests.limits import HANG


@pytest.fixture
def run() -> Run:
    """Runs the command line in a process of its own, as a shell would with such redirections; unless it is told
    otherwise, Python may keep what it prints until the end."""

    def run(*arguments: object, before: str = "", redirected: str = "", **environment: str) -> Ran:
        command = [
            "sh",
            "-c",
            f'{before} exec "$@" {redirected}',
            "sh",
            sys.executable,
            REPOSITORY / "cli.py",
            *arguments,
        ]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        settings: Any = {"env": kept | environment, "timeout": HANG}
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **settings)
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    return run


@pytest.fixture(autouse=True, scope="module")
def _its_answers_are_remembered(answers: Path) -> None:
    """To ask transformers in a process of its own takes longer than what is tested."""
    folder = REPOSITORY / "fixtures"
    plan_conversion(folder / "tiny-base", folder / "tiny-adapter")


# Standard streams


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_reason_to_convert_nothing_nor_to_complain(
    closed: str, run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    ran = run("--base", tiny_base, "--out", out, redirected=closed)

    assert (ran.code, ran.err) == (0, "")
    assert (ran.out == "") == (">&-" in closed.split())
    assert verify(out).is_good


def test_a_refusal_that_nobody_can_be_told_of_has_its_exit_code(run: Run, tmp_path: Path) -> None:
    for redirected in ("2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full"):
        for more in ((), ("--json",), ("-v",)) if redirected == "2>/dev/full" else ((), ("--json",)):
            ran = run("--base", tmp_path / "none", "--dry-run", *more, redirected=redirected)

            assert (ran.code, ran.err) == (2, "")
            if more == ("--json",) and not redirected.startswith(">"):
                assert json.loads(ran.out)["exit_code"] == 2


def test_what_standard_output_has_no_room_for_fails_in_one_line(
    run: Run, tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    said = "error: standard output: No space left on device\n"

    ran = run("--base", tiny_base, "--out", out, redirected=">/dev/full")

    assert (ran.code, ran.err) == (1, said)
    assert verify(out).is_good
    plan = ("--base", tiny_base, "--dry-run")
    for command in (plan, (*plan, "--json"), ("verify", out)):
        with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w+") as err:
            code = run_here(command, tmp_path, {}, (full.fileno(), err.fileno()))
            err.seek(0)
            assert (code, err.read()) == (1, said)


def test_a_reader_that_has_seen_enough_ends_it_quietly(tiny_base: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)

    command = [sys.executable, str(REPOSITORY / "cli.py"), "--base", str(tiny_base), "--dry-run"]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=HANG, check=False)

    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_a_refused_job_that_nobody_can_be_told_of_does_not_stop_the_others(
    run: Run, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    several = ("--adapter", f"none={tmp_path / 'none'}", "--adapter", f"one={tiny_adapter}")

    ran = run("--base", tiny_base, *several, "--out", tmp_path / "out", redirected="2>/dev/full")

    assert ran.code == 1
    assert "1 refused, 1 made" in ran.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]


def test_a_name_that_the_terminals_alphabet_lacks_is_spelled_out(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    ran = run("--base", tiny_base, "--out", tmp_path / "лён", PYTHONIOENCODING="latin-1")

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{tmp_path}/\\u043b\\u0451\\u043d: ")


# The current folder


@pytest.mark.parametrize("out", ["out", "/absolute"])
def test_where_the_current_folder_is_gone_it_is_refused_in_one_line(out: str, run: Run, tiny_base: Path) -> None:
    ran = run("--base", tiny_base, "--out", out, before='gone=$(mktemp -d); cd "$gone"; rmdir "$gone";')

    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: the current folder: No such file or directory; change to one that is there\n"


# Descriptors


def test_more_files_are_opened_than_the_limit_that_programs_are_started_with(
    run: Run, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 256:
        pytest.skip("this machine gives no more")
    several = [text for number in range(20) for text in ("--adapter", f"{number}={tiny_adapter}")]

    ran = run("--base", tiny_base, *several, "--out", tmp_path / "out", before="ulimit -S -n 64;")

    assert (ran.code, ran.err) == (0, "")


def test_with_less_memory_than_the_libraries_take_it_is_refused_before_they_are_loaded(
    run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    for command in (("--base", tiny_base, "--out", tmp_path / "out"), ("verify", tiny_base)):
        ran = run(*command, before="ulimit -d 100000;")

        said = "the limit of memory (ulimit -d) is 102,400,000 bytes; Python and the libraries alone take 270,000,000"
        assert (ran.code, ran.err) == (2, f"error: {said}\n")
    assert run("--help", before="ulimit -d 100000;").code == 0
    assert list(tmp_path.iterdir()) == []


# Signals


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    signal_handlers: None,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    stop = Signals()

    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() is None
