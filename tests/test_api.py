"""From Python: a bar, short representations, the head of the report in a notebook, the summary, the version."""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path

import pytest

import converter
from converter import ConversionRefused, Job, Outcome, convert, convert_batch, plan_conversion, summary, verify
from tests.models import save_adapter, save_base


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, "llama")


def test_progress_may_be_a_bar_a_function_or_nothing(
    inputs: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []

    convert(*inputs, tmp_path / "one", progress=True)
    convert(*inputs, tmp_path / "two", progress=lambda progress: stages.append(progress.stage))
    convert(*inputs, tmp_path / "three")

    assert {"converting", "sealing"} <= set(stages)
    assert capfd.readouterr() == ("", ""), "no terminal, and shorter than ten seconds"


def test_a_bar_in_a_terminal_is_shown_and_taken_away(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Tty())

    convert(*inputs, tmp_path / "out", progress=True)

    assert "planning" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K"), "the bar's line is erased"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_log_says_which_tensors_are_begun_once_for_each_output(
    inputs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = inputs
    caplog.set_level("DEBUG", "converter.tile")

    report = convert(base, adapter, tmp_path / "one")
    of_one = caplog.messages.copy()
    caplog.clear()
    convert_batch([Job(tmp_path / "two", adapter, base), Job(tmp_path / "three", adapter, base)])

    touched = [f"begun: {tensor.name}" for tensor in report.plan.tensors() if tensor.is_touched]
    shared = [f"begun: {tensor.name}" for tensor in report.plan.tensors() if not tensor.is_touched]
    assert of_one == [f"begun: {tensor.name}" for tensor in report.plan.tensors()]
    assert touched
    assert shared
    assert sorted(caplog.messages) == sorted(touched + touched + shared)


def test_representations_are_one_short_line(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report, again = convert(*inputs, out), convert(*inputs, out)
    outcome = convert_batch([Job(tmp_path / "gone", tmp_path / "no")])[0]
    (out / "config.json").write_text("{}")
    found = verify(out)

    survival = report.summary["survival"]["mean"]
    assert repr(report).startswith(f"Report({str(out)!r}: 14 merged, 14 quantized, 7 kept, error 0.")
    assert repr(report).endswith(f", survival {survival:.4f})")
    assert repr(again) == f"Report({str(out)!r}: nothing to do)"
    assert repr(report.plan).startswith("Plan(LlamaForCausalLM, nf4: ")
    assert isinstance(outcome, Outcome)
    assert repr(outcome).startswith(f"Outcome({str(tmp_path / 'gone')!r}: refused: ")
    assert "problems, the first: config.json: " in repr(found)
    assert repr(found).startswith("Verification(")
    for value in (report, again, report.plan, plan_conversion(*inputs).plan, found):
        assert len(repr(value)) < 400
        assert "\n" not in repr(value)


def test_a_notebook_shows_the_head_of_the_report(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    report = convert(*inputs, tmp_path / "out")

    shown = report._repr_html_()  # what notebooks call

    assert shown is not None
    assert "14 merged, 14 quantized, 7 kept" in shown
    assert "complete" in shown


def test_the_summary_of_an_output_is_that_of_its_receipt(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    report = convert(*inputs, tmp_path / "out")

    found = summary(tmp_path / "out")

    assert found == json.loads((tmp_path / "out" / "conversion.json").read_text())["summary"]
    assert {key: found[key] for key in report.summary} == report.summary
    with pytest.raises(ConversionRefused, match=r"no conversion.json with a summary"):
        summary(inputs[0])


def test_the_version_is_that_of_the_package() -> None:
    assert converter.__version__ == importlib.metadata.version("nf4-converter")
    assert "__version__" in dir(converter)
