"""`convert report OUT`, and `--report` while converting."""

from __future__ import annotations

import json
from pathlib import Path

from converter import convert, verify
from tests.batch.scenes import adapters
from tests.cli.conftest import Run, is_one_line
from tests.folders import contents
from tests.test_page import Page


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


def without_the_run(page: str) -> str:
    """A report without what only the run that made the output knows."""
    head, _, tail = page.partition("<h2>Memory and rate over time</h2>")
    return head + tail.partition("<h2>")[2]


def test_a_conversion_writes_the_same_report_and_memory_and_rate_besides(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    arguments = ["--base", base, "--adapter", adapter, "--out", out, "--min-survival", "0.1", "-q"]

    made = run(*arguments, "--report", tmp_path / "one.html")
    again = run(*arguments, "--report", tmp_path / "again.html")
    run("report", out, "--out", tmp_path / "two.html", "--min-survival", "0.1")

    assert made.code == again.code == 0
    one, two, three = ((tmp_path / name).read_text() for name in ("one.html", "two.html", "again.html"))
    assert without_the_run(one) == without_the_run(two)
    assert [row[0] for row in Page(one).table("stage")[1:]] == ["planning", "converting", "sealing"]
    assert "Not known: only --report while converting draws them." in Page(two).text
    assert two == three, "of what was there already nothing is known, either"


def test_a_report_changes_no_byte_of_the_output(run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path) -> None:
    arguments = ["--base", base, "--adapter", adapter, "-q"]

    run(*arguments, "--out", out, "--report", tmp_path / "one.html")
    run(*arguments, "--out", tmp_path / "plain")

    assert contents(out) == contents(tmp_path / "plain")


def test_a_missed_gate_leaves_the_report_where_it_was_asked_for_and_beside_what_was_made(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    arguments = ["--base", base, "--adapter", adapter, "--out", out, "-q"]

    missed = run(*arguments, "--max-error", "0.05", "--report", tmp_path / "r.html")

    page = (tmp_path / "r.html").read_text()
    assert (missed.code, out.exists()) == (4, False)
    assert (out.with_name("out.partial") / "report.html").read_text() == page
    assert "✗ a gate is missed: " in Page(page).text
    assert Page(page).table("gate")[1][-1] == "✗ missed"
    assert [row[0] for row in Page(page).table("stage")[1:]] == ["planning", "converting", "sealing"]

    taken = run(*arguments, "--max-error", "0.5")
    assert taken.code == 0
    assert "report.html" not in contents(out)
    assert verify(out, base, adapter).is_good


def test_an_output_that_is_there_and_misses_a_gate_has_its_report(
    run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path
) -> None:
    convert(base, adapter, out)

    missed = run("--base", base, "--adapter", adapter, "--out", out, "--max-error", "0.05", "--report", tmp_path / "r")

    assert missed.code == 4
    assert "✗ a gate is missed: " in Page((tmp_path / "r").read_text()).text
    assert not out.with_name("out.partial").exists()


def test_a_folder_of_outputs_has_a_report_of_all_by_adapter(run: Run, base: Path, tmp_path: Path) -> None:
    adapters(tmp_path / "ads", base)
    run("--base", base, "--adapter", tmp_path / "ads" / "*", "--out", tmp_path / "outs", "-q")

    ran = run("report", tmp_path / "outs", "--min-survival", "0.9999")

    found = Page((tmp_path / "outs-report.html").read_text())
    rows = found.table("output")
    assert ran.code == 0
    assert [row[0] for row in rows[1:]] == ["a0", "a1", "a2"]
    for row in rows[1:]:
        out = tmp_path / "outs" / row[0]
        receipt = json.loads((out / "conversion.json").read_text())
        survival = receipt["summary"]["survival"]
        assert row[1] == f"sha256 {receipt['origin']['adapter'][:12]}…"
        assert row[2:4] == [f"{survival['mean']:.4f}", f"{survival['worst']:.4f}"]
        shared = sum((out / file).stat().st_size for file, of in receipt["of_the_base_alone"].items() if "link" in of)
        whole = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert shared > 0
        assert [int(cell.replace(",", "")) for cell in row[6:8]] == [whole - shared, shared]
    assert "3 outputs are complete; 3 of them miss a gate" in found.text


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


def test_a_batch_writes_a_report_of_all_that_it_made_and_of_what_it_did_not(
    run: Run, base: Path, out: Path, tmp_path: Path
) -> None:
    adapters(tmp_path / "ads", base)
    (tmp_path / "ads" / "a1" / "adapter_model.safetensors").write_bytes(b"nothing")
    arguments = ["--base", base, "--adapter", tmp_path / "ads" / "*", "--out", out, "-q"]

    made = run(*arguments, "--report", tmp_path / "one.html")
    again = run(*arguments, "--report", tmp_path / "two.html")

    assert made.code == again.code == 1
    one, two = (Page((tmp_path / name).read_text()) for name in ("one.html", "two.html"))
    assert "✗ 2 outputs are complete; 1 are not made" in one.text
    assert [row[0] for row in one.table("output")[1:]] == [f"{out}/a0", f"{out}/a2"]
    (missing,) = one.table("not made")[1:]
    assert missing[0] == f"{out}/a1"
    assert "adapter_model.safetensors" in missing[1]
    assert {"planning", "converting", "sealing"} <= {row[0] for row in one.table("stage")[1:]}
    assert len(one.attributes("polyline")) == 2
    assert two.table("output") == one.table("output")
    assert "Not known: only --report while converting draws them." in two.text


def test_a_job_below_its_own_gate_is_shown_as_not_made(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    job = {"base": str(base), "adapter": str(adapter)}
    jobs = [job | {"out": "plain"}, job | {"out": "gated", "max_error": 0.001}]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in jobs))

    ran = run("batch", tmp_path / "jobs.jsonl", "--report", tmp_path / "r.html", "-q")
    assert ran.err.startswith(f"error: {tmp_path}/gated: model.layers.1.mlp.gate_proj.weight has error 0.0"), ran.err

    shown = Page((tmp_path / "r.html").read_text())
    assert ran.code == 4
    assert [row[0] for row in shown.table("output")[1:]] == [str(tmp_path / "plain")]
    assert [row[0] for row in shown.table("not made")[1:]] == [str(tmp_path / "gated")]
    assert "✗ 1 output is complete; 1 are not made" in shown.text


def test_a_dry_run_has_no_report(run: Run, base: Path, adapter: Path, out: Path, tmp_path: Path) -> None:
    several = ["--base", base, "--adapter", f"a={adapter}", "--out", out]
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"base": str(base), "adapter": str(adapter), "out": "o"}))

    for arguments in (["--base", base], several, ["batch", tmp_path / "jobs.jsonl"]):
        assert "--report needs an output" in run(*arguments, "--dry-run", "--report", "r.html").err
