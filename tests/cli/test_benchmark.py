"""`convert benchmark`: what it prints and writes, its exit codes. A stand-in serves; tests/latency has real models."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from converter import convert
from tests.cli.conftest import Run, is_one_line
from tests.conftest import REPOSITORY

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
NUMBER = re.compile(r"\d+\.\d+")
NOISE = re.compile(r"^ *note: .*\n", re.MULTILINE)
"""Notes on the machine, and on figures within the noise: there may be any."""
SHORT = ["--prompt-tokens", 4, "--new-tokens", 5, "--rounds", 2, "--requests", 1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(BASE, ADAPTER, tmp_path_factory.mktemp("made") / "out").out


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{(REPOSITORY / 'tests' / 'latency' / 'stand_in.py').read_text()}")
    program.chmod(0o755)
    return program


def test_every_model_has_its_figures_and_ratios(run: Run, out: Path, vllm: Path) -> None:
    ran = run("benchmark", out, "--base", BASE, "--adapter", ADAPTER, *SHORT, "--through", "vllm", "--vllm", vllm)

    assert (ran.code, ran.err) == (0, "")
    lines = [re.sub(r" {2,}", "  ", NUMBER.sub("#", line)) for line in NOISE.sub("", ran.out).splitlines()]
    assert lines[:3] == [
        f"{out}: 4 tokens in, 5 out, 2 × 1 requests, medians (least to most)",
        "through vllm #.0, on a device of its choice; merged, 16 bits = #",
        "  first token, ms  time per token, ms  tokens a second  × first  × token",
    ]
    figures = "  # (# to #)  # (# to #)  # (# to #)  #  #"
    assert lines[3:] == [f"  {name}{figures}" for name in ("base + adapter", "merged, 16 bits", "output, nf4")]


def test_json_the_report_and_metrics_have_the_same_figures(run: Run, out: Path, vllm: Path, tmp_path: Path) -> None:
    report, metrics = tmp_path / "report.html", tmp_path / "convert.prom"
    common = ["benchmark", out, "--base", BASE, "--adapter", ADAPTER, *SHORT, "--through", "vllm", "--vllm", vllm]

    ran = run(*common, "--json", "--report", report, "--metrics", metrics)

    told = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert told.keys() == {"output", "workload", "machine", "servers", "notes"}
    assert told["workload"] == {"prompt_tokens": 4, "new_tokens": 5, "rounds": 2, "requests": 1}
    (server,) = told["servers"]
    page = report.read_text()
    assert "Latency report: out" in page
    for of in server["latencies"].values():
        assert f"{1000 * of['token']['median']:.1f} (" in page
    assert f'<td class="n">{server["ratios"]["output"]["token"]:.2f}</td>' in page
    assert "http" not in page.replace("http-equiv", "")
    for name in ("base_adapter", "merged_16_bits", "output"):
        assert f"nf4_converter_result_vllm_{name}_token_median{{" in metrics.read_text()


def test_what_is_not_measured_says_why(run: Run, out: Path, vllm: Path, tmp_path: Path) -> None:
    report, base = tmp_path / "report.html", convert(BASE, None, tmp_path / "base").out

    ran = run("benchmark", base, "--base", BASE, *SHORT, "--through", "vllm", "--vllm", vllm, "--report", report)

    assert ran.code == 0
    assert "  not measured: base + adapter: there is no adapter\n" in ran.out
    assert "there is no adapter" in report.read_text()
    assert run("benchmark", base, "--base", BASE, *SHORT, "--through", "vllm", "--vllm", vllm, "-q") == (0, "", "")
    assert out.is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Give one OUT: convert benchmark OUT"),
        (["OUT", "--out", "x"], 2, "Give one OUT"),
        (["OUT", "--new-tokens", 1], 2, "'--new-tokens': 1 is not in the range x>=2"),
        (["OUT", "--through", "tgi"], 2, "'tgi' is not one of 'transformers', 'vllm'"),
        (["OUT", "--through", "vllm"], 2, "vllm: no such command here; give its path with --vllm"),
        (["OUT", "--vllm", "nowhere/vllm"], 2, "nowhere/vllm: no program"),
        (["OUT", "--vllm-arguments", "'"], 2, '--vllm-arguments "\'": No closing quotation'),
        (
            ["OUT", "--prompt-tokens", 500, "--new-tokens", 13],
            2,
            "--prompt-tokens and --new-tokens 513: the model takes",
        ),
        (["OUT", "--through", "transformers"], 3, "has no name in the receipt, as it was a folder: give --adapter"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, said: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    ran = run("benchmark", *(out if word == "OUT" else word for word in arguments))

    assert (ran.code, ran.out) == (code, "")
    assert is_one_line(ran.err)
    assert said in ran.err


def test_if_nothing_can_be_measured_it_ends_with_1(run: Run, out: Path, vllm: Path) -> None:
    common = ["benchmark", out, "--base", BASE, "--adapter", ADAPTER, *SHORT, "--through", "vllm", "--vllm", vllm]

    ran = run(*common, "--vllm-arguments", "--fail")

    assert (ran.code, ran.out) == (1, "")
    assert is_one_line(ran.err)
    assert ran.err.startswith("error: nothing could be measured: vllm, base + adapter: it ended: ValueError: Unknown")
