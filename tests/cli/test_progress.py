"""Progress while a command runs: a bar, lines, JSON; and errors that it must not garble."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from converter import Progress
from converter.cli.show.progress import Rate, display, line_of
from tests.cli.terminal import shown


class Tty(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def converting(done: int, total: int = 10_000_000_000) -> Progress:
    return Progress("converting", done, total, "model.norm.weight")


# Lines


def test_without_a_terminal_a_line_comes_every_ten_seconds(clock: Clock) -> None:
    file = io.StringIO()
    with display(file=file, clock=clock) as shown:
        for second in range(25):
            shown.progress(converting(second * 400_000_000))
            clock.now += 1

    assert file.getvalue() == (
        "converting: 40 %, 4.0/10.0 GB, 400.0 MB/s, 15 s left\nconverting: 80 %, 8.0/10.0 GB, 400.0 MB/s, 5 s left\n"
    )


def test_a_conversion_of_less_than_ten_seconds_needs_no_line(clock: Clock) -> None:
    file = io.StringIO()
    with display(file=file, clock=clock) as shown:
        clock.now += 30  # planning
        for second in range(9):
            shown.progress(converting(second))
            clock.now += 1

    assert file.getvalue() == ""


def test_a_batch_says_which_output_of_how_many(clock: Clock) -> None:
    file = io.StringIO()
    with display("plain", outputs=200, file=file, clock=clock) as shown:
        shown.progress(converting(0))
        shown.ended("out/a", None)
        shown.ended("out/b", None)
        clock.now += 10
        shown.progress(converting(500))

    assert file.getvalue().startswith("converting 3 of 200: 0 %")


def test_errors_of_a_batch_are_lines_of_stderr(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in ("plain", "none"):
        with display(kind, outputs=2, file=io.StringIO(), clock=clock) as shown:
            shown.ended("out/a", "no such folder")
            shown.ended("out/b", None)

        assert capfd.readouterr() == ("", "error: out/a: no such folder\n")


# JSON


def test_events_are_one_object_a_line(clock: Clock) -> None:
    file = io.StringIO()
    with display("json", outputs=2, file=file, clock=clock) as shown:
        shown.progress(Progress("checking", 0, 10, "a.safetensors"))
        shown.progress(converting(1, 10))
        shown.progress(converting(2, 10))  # in the same second
        clock.now += 1.5
        shown.progress(converting(3, 10))
        shown.ended("out/a", None)
        shown.ended("out/b", "no such folder")

    events = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [event.get("done") for event in events] == [0, 1, 3, None, None]
    assert events[2] == {
        "event": "progress",
        "stage": "converting",
        "done": 3,
        "total": 10,
        "name": "model.norm.weight",
        "made": 0,
        "outputs": 2,
        "seconds": 1.5,
    }
    assert events[4] == {
        "event": "output",
        "out": "out/b",
        "error": "no such folder",
        "made": 2,
        "outputs": 2,
        "seconds": 1.5,
    }


# The time that is left


def test_the_time_left_is_the_stages_own_and_is_not_guessed_in_its_first_seconds() -> None:
    rate = Rate()
    rate.note(Progress("checking", 0, 1000, ""), 0)
    rate.note(Progress("checking", 900, 1000, ""), 9)
    rate.note(converting(0, 1000), 10)  # another stage is slower
    rate.note(converting(100, 1000), 11)
    assert rate.left(converting(100, 1000)) == ""

    rate.note(converting(100, 1000), 20)

    assert rate.left(converting(100, 1000)) == "2 min left"
    assert rate.left(converting(1000, 1000)) == ""


def test_what_an_earlier_run_had_done_is_not_counted_as_speed() -> None:
    rate = Rate()
    rate.note(converting(500, 1000), 0)  # resumed
    rate.note(converting(600, 1000), 10)

    assert rate.left(converting(600, 1000)) == "40 s left"
    assert line_of(converting(600, 1000), rate, "") == "converting: 60 %, 0.6/1.0 kB, 10 B/s, 40 s left"


def test_a_second_pass_over_the_base_begins_anew() -> None:
    rate = Rate()
    for now, done in ((0, 0), (10, 1000), (11, 0), (21, 100)):
        rate.note(converting(done, 1000), now)

    assert rate.left(converting(100, 1000)) == "2 min left"


# A terminal


@pytest.mark.parametrize("columns", [40, 80])
def test_errors_of_a_batch_are_printed_above_the_bar_and_the_bar_goes(
    columns: int, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").symlink_to(base)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(adapter)
    (tmp_path / "empty").mkdir()
    several = [word for name in ("a", "empty", "b") for word in ("--adapter", name)]

    screen = shown(["--base", "base", *several, "--out", "out"], columns, tmp_path, raw=True)

    lines = screen.splitlines()
    assert lines[0].startswith("error: out/empty: empty: ")
    assert "".join(lines).count("error: ") == 1
    assert not [line for line in lines if "━" in line or "planning" in line or "converting" in line]


@pytest.mark.parametrize("columns", [40, 80])
def test_the_bar_never_writes_the_last_column(columns: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some terminals go to the next line then."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", file := Tty())
    long = "empty: no adapter_config.json, and more than fits a line of forty columns"
    with display("bar", outputs=200, file=file, clock=clock) as shown_here:
        for done in range(0, 5000, 50):
            clock.now += 1
            shown_here.progress(converting(done, 5000))
            if done % 500 == 0:
                shown_here.ended("out/empty", long)

    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue()))
    bars = [line for line in lines if "━" in line or "╸" in line]
    assert len(bars) >= 10
    assert max(map(len, bars)) == columns - 1
    assert file.getvalue().count(f"error: out/empty: {long}") == 10
