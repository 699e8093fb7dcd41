"""`convert report OUT`, and `--report` while converting."""

from __future__ import annotations

from pathlib import Path

from converter import convert, verify
from tests.cli.conftest import Run, is_one_line


def test_the_report_of_an_output_lies_beside_it_and_leaves_it_as_it_was(
    run: Run, base: Path, adapter: Path, out: Path
) -> None:
    convert(base, adapter, out)

    ran = run("report", out, "--max-error", "0.05")

    file = out.with_name("out-report.html")
    assert (ran.code, ran.out, ran.err) == (0, f"{file}: open it in a browser\n", "")
    assert "<title>Conversion report: out</title>" in file.read_text()
    assert "a gate is missed" in file.read_text()
    assert verify(out).is_good


def test_a_conversion_writes_the_same_report(run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path) -> None:
    arguments = ["--base", base, "--adapter", adapter, "--out", out, "--min-survival", "0.1", "-q"]

    made = run(*arguments, "--report", tmp_path / "one.html")
    again = run(*arguments, "--report", tmp_path / "again.html")
    run("report", out, "--out", tmp_path / "two.html", "--min-survival", "0.1")

    assert made.code == again.code == 0
    one, two, three = ((tmp_path / name).read_text() for name in ("one.html", "two.html", "again.html"))
    assert one == two == three


def test_what_has_no_receipt_has_no_report(run: Run, base: Path, tmp_path: Path) -> None:
    ran = run("report", base)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert "no conversion.json of this tool" in ran.err
    assert not base.with_name("base-report.html").exists()


def test_a_place_that_can_not_be_written_is_named(run: Run, base: Path, out: Path, tmp_path: Path) -> None:
    convert(base, None, out)

    ran = run("report", out, "--out", tmp_path / "gone" / "report.html")

    assert ran.code == 1
    assert ran.err == f"error: {tmp_path}/gone/report.html: No such file or directory\n"


def test_a_report_goes_with_one_output(run: Run, base: Path, adapter: Path, out: Path) -> None:
    several = ["--base", base, "--adapter", f"a={adapter}", "--out", out, "--report", "r.html"]

    assert "--report goes with one output" in run(*several).err
    assert "--report needs an output" in run("--base", base, "--dry-run", "--report", "r.html").err
