"""`convert evaluate`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from converter import convert
from tests.cli.conftest import Run
from tests.conftest import REPOSITORY

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
COMPARED = ["--base", BASE, "--adapter", ADAPTER]
SHORT = ["--text", REPOSITORY / "converter" / "gates.py", "--max-tokens", 300, "--window", 64]
NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(BASE, ADAPTER, tmp_path_factory.mktemp("made") / "out").out


def test_every_figure_is_printed_with_its_standard_error(run: Run, out: Path) -> None:
    ran = run("evaluate", out, *SHORT, *COMPARED)

    assert (ran.code, ran.err) == (0, "")
    assert NUMBER.sub("#", ran.out).splitlines() == [
        f"{out}: 315 tokens predicted, in 5 windows of at most 64",
        "  perplexity                   # ± #",
        "  of the 16-bit model          # ± #",
        "  perplexity ratio             # ± #",
        "  KL divergence, nats a token  # ± #",
        "  top-1 agreement              # ± #",
    ]


def test_json_has_the_same_figures(run: Run, out: Path) -> None:
    printed = run("evaluate", out, *SHORT, *COMPARED).out
    ran = run("evaluate", out, *SHORT, *COMPARED, "--json")

    told = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert (told["good"], told["tokens"], told["windows"], told["window"], told["dtype"]) == (
        True,
        315,
        5,
        64,
        "float32",
    )
    assert f"{told['perplexity']['value']:.4f} ± {told['perplexity']['error']:.4f}" in printed
    assert told["comparison"].keys() == {"perplexity", "ratio", "divergence", "agreement"}
    assert f"{told['comparison']['divergence']['value']:.6f}" in printed
    assert told["missed"] == []


def test_the_report_has_every_figure_and_gate(run: Run, out: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    gates = ["--max-kl", 0.001, "--max-perplexity-ratio", 9]

    ran = run("evaluate", out, *SHORT, *COMPARED, *gates, "--json", "--report", report)
    alone = run("evaluate", out, *SHORT, "--report", tmp_path / "alone.html")

    told, page = json.loads(ran.out), report.read_text()
    assert (ran.code, alone.code) == (4, 0)
    for of in (told["perplexity"], *told["comparison"].values()):
        assert f'<td class="n">{of["value"]:.4f}</td><td class="n">{of["error"]:.4f}</td>' in page
    for said in ("Quality report: out", "✗ gates that are missed: 1", "✗ at most 0.001", "✓ at most 9", "315"):
        assert said in page
    assert "http" not in page.replace("http-equiv", "")
    assert "measured; no gate was asked for" in (tmp_path / "alone.html").read_text()
    assert "It was not compared with the merged model" in (tmp_path / "alone.html").read_text()


def test_a_gate_that_is_missed_ends_with_4(run: Run, out: Path) -> None:
    gates = ["--max-kl", 0.001, "--max-perplexity-ratio", 9, "--min-top1", 0.999]

    ran = run("evaluate", out, *SHORT, *COMPARED, *gates, "--quiet")
    told = run("evaluate", out, *SHORT, *COMPARED, *gates, "--json")

    missed = [line for line in ran.out.splitlines() if line.startswith("missed: ")]
    assert (ran.code, ran.err, told.code) == (4, "", 4)
    assert [NUMBER.sub("#", line) for line in missed] == [
        "missed: KL divergence #, above #",
        "missed: top-1 agreement #, below #",
    ]
    assert [f"missed: {line}" for line in json.loads(told.out)["missed"]] == missed


def test_quiet_prints_nothing_of_what_is_good(run: Run, out: Path) -> None:
    assert run("evaluate", out, *SHORT, "--quiet") == (0, "", "")


def test_one_window_has_no_standard_error_and_it_says_so(run: Run, out: Path) -> None:
    ran = run("evaluate", out, *SHORT[:2], "--max-tokens", 5)

    assert NUMBER.sub("#", ran.out).splitlines() == [
        f"{out}: 511 tokens predicted, in 1 window of at most 512",
        "  perplexity  #",
        "note: one window, so there is no standard error: give more text, or a smaller --window",
    ]


def test_of_a_format_that_rounds_activations_it_says_what_is_left_out(run: Run, tmp_path: Path) -> None:
    run("--base", BASE, "--out", tmp_path / "fp8", "--format", "fp8", "--quiet")

    ran = run("evaluate", tmp_path / "fp8", *SHORT)

    note = "note: loaders of this format round activations, too: these figures are of its weights alone"
    assert ran.out.splitlines()[-1] == note


def test_a_gate_without_a_base_ends_with_2_and_names_the_options(run: Run, out: Path) -> None:
    ran = run("evaluate", out, *SHORT, "--min-top1", 0.9)

    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: a gate on KL divergence, top-1 agreement or perplexity ratio needs --base or --adapter\n"


def test_a_receipt_that_names_no_base_ends_with_3(run: Run, out: Path) -> None:
    ran = run("evaluate", out, *SHORT, "--compare")

    assert (ran.code, ran.out) == (3, "")
    assert "has no name in the receipt, as it was a folder: give --adapter" in ran.err


def test_what_is_no_folder_ends_with_2(run: Run, tmp_path: Path) -> None:
    ran = run("evaluate", tmp_path / "nowhere", *SHORT)

    assert (ran.code, ran.out) == (2, "")
    assert "nowhere" in ran.err
