"""Gates: an output that does not reach them is not made; what is done of it stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from converter import BatchOptions, Fidelity, GateFailed, Gates, Job, convert, convert_batch, verify
from converter.batch.job_file import read_jobs
from converter.errors import BadRecipe, Undecided
from tests.batch.scenes import adapters, jobs_for
from tests.cli.conftest import Run
from tests.folders import contents

STRICT = Gates(min_survival=0.99, max_error=0.05)
LOOSE = Gates(min_survival=0.1, max_error=0.5)


# The value


@pytest.mark.parametrize("value", [0, -0.5, 1.5, True, "0.9", math.nan, math.inf])
@pytest.mark.parametrize("name", ["min_survival", "max_error"])
def test_a_gate_is_a_share(name: str, value: Any) -> None:
    with pytest.raises(BadRecipe, match=f"`{name}` .*: expected a number above 0, at most 1"):
        Gates(**{name: value})


def test_gates_name_what_misses_them_the_worst_first() -> None:
    figures = {"a": Fidelity(0.2, 0.95), "b": Fidelity(0.05, 0.7), "c": Fidelity(0.1, None)}

    misses = Gates(min_survival=0.9, max_error=0.15).misses(figures)

    assert [str(miss) for miss in misses] == ["b has survival 0.7, below 0.9", "a has error 0.2, above 0.15"]
    assert Gates(min_survival=0.7, max_error=0.2).misses(figures) == []
    assert Gates().misses(figures) == []
    assert not Gates()
    assert Gates(max_error=0.2)


def test_a_figure_that_is_no_number_misses_every_gate() -> None:
    assert len(Gates(0.5, 0.5).misses({"a": Fidelity(math.nan, math.nan)})) == 2
    assert len(Gates(max_error=1.0).misses({"a": Fidelity(math.inf, None)})) == 1


def test_an_adapter_that_changes_nothing_survives_nowhere() -> None:
    assert "the output has survival nan" in str(Gates(min_survival=0.5).misses({"a": Fidelity(0.1, None)})[0])


def test_gates_are_completed_by_those_of_others() -> None:
    assert Gates(min_survival=0.5).completed(Gates(0.9, 0.1)) == Gates(0.5, 0.1)


# A conversion


def test_a_missed_gate_leaves_no_out_but_its_staging_folder_and_says_which_tensors(
    base: Path,
    adapter: Path,
    out: Path,
) -> None:
    with pytest.raises(GateFailed, match=r"has error 0\.\d+, above 0\.05, the worst of \d+ that miss a gate") as failed:
        convert(base, adapter, out, gates=STRICT)

    assert failed.value.exit_code == 4
    assert not out.exists()
    staging = out.with_name("out.partial")
    told = json.loads((staging / "gates.json").read_text())
    assert (told["min_survival"], told["max_error"]) == (0.99, 0.05)
    assert {miss["figure"] for miss in told["missed"]} <= {"survival", "error"}
    worst = told["missed"][0]
    assert f"{worst['tensor']} has {worst['figure']} {worst['value']:.4g}" in str(failed.value)
    assert f"{staging / 'gates.json'} lists them" in str(failed.value)
    assert f"what is done is kept in {staging}: the same command with a weaker gate takes it" in str(failed.value)


def test_with_weaker_gates_the_same_command_takes_what_is_made_and_gives_the_same_bytes(
    base: Path,
    adapter: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(GateFailed):
        convert(base, adapter, out, gates=STRICT)
    stages: list[tuple[str, int]] = []

    convert(base, adapter, out, gates=LOOSE, progress=lambda p: stages.append((p.stage, p.done)))
    ungated = convert(base, adapter, tmp_path / "ungated").out

    assert "converting" not in {stage for stage, _ in stages}
    assert contents(out) == contents(ungated)
    assert not out.with_name("out.partial").exists()


def test_an_output_that_is_there_already_must_reach_the_gates_too_and_stays(
    base: Path,
    adapter: Path,
    out: Path,
) -> None:
    convert(base, adapter, out)
    before = contents(out)

    with pytest.raises(GateFailed, match=r"above 0\.05"):
        convert(base, adapter, out, gates=STRICT)
    assert convert(base, adapter, out, gates=LOOSE).nothing_to_do

    assert contents(out) == before


def test_survival_without_an_adapter_is_refused_before_anything_is_written(base: Path, out: Path) -> None:
    with pytest.raises(BadRecipe, match="`min_survival` needs an adapter"):
        convert(base, None, out, gates=Gates(min_survival=0.5))

    assert not out.parent.exists()
    assert convert(base, None, out, gates=Gates(max_error=0.5)).out.exists()


def test_the_command_line_ends_with_4_and_names_the_tensor(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "--max-error", "0.05", "--json")

    told = json.loads(ran.out)
    assert (ran.code, told["exit_code"], out.exists()) == (4, 4, False)
    assert "above 0.05" in told["error"]
    assert "--min-survival 2.0: expected" in run("--base", base, "--out", out, "--min-survival", "2").err


# Batches


def test_in_a_batch_only_the_outputs_that_miss_a_gate_are_not_made(base: Path, tmp_path: Path) -> None:
    some = adapters(tmp_path, base)
    jobs = jobs_for(some, base, tmp_path / "out")
    jobs[1] = Job(jobs[1].out, jobs[1].adapter, base, gates=STRICT)

    outcomes = convert_batch(jobs)
    again = convert_batch([*jobs[:1], Job(jobs[1].out, jobs[1].adapter, base, gates=LOOSE), *jobs[2:]])

    assert [outcome.status for outcome in outcomes] == ["made", "failed", "made"]
    assert [outcome.is_below_gate for outcome in outcomes] == [False, True, False]
    assert "above 0.05" in outcomes[1].message
    assert [outcome.status for outcome in again] == ["nothing to do", "made", "nothing to do"]


def test_a_made_output_of_a_batch_must_reach_the_gates_too(base: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", adapters(tmp_path, base)[0], base)
    convert_batch([job])

    outcome = convert_batch([Job(job.out, job.adapter, base, gates=STRICT)], BatchOptions())[0]

    assert (outcome.status, outcome.is_below_gate) == ("failed", True)
    assert job.out.exists()


def test_a_batch_of_which_only_gates_are_missed_ends_with_4(run: Run, base: Path, tmp_path: Path) -> None:
    adapters(tmp_path / "ads", base)
    file = tmp_path / "jobs.toml"
    file.write_text(f'base = "{base}"\nadapters = "ads"\nout = "out"\nmin_survival = 0.1\n')

    ran = run("batch", file, "--max-error", "0.05")

    assert ran.code == 4
    assert ran.err.count("above 0.05") == 3
    assert run("batch", file).code == 0
    assert run("batch", file, "--min-survival", "0.9999999").code == 0, "the file's gate goes first"


def test_a_job_file_may_have_gates_and_formats_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(
        'base = "a/b"\nout = "z"\nmax-error = 0.2\nformat = "NF4"\n[[jobs]]\nadapter = "a/one"\n'
        '[[jobs]]\nadapter = "a/two"\nmax_error = 0.1\nmin_survival = 0.9\nformat = "bf16"\n'
    )

    one, two = read_jobs(file)

    assert (one.gates, one.recipe.quant_type) == (Gates(max_error=0.2), "nf4")
    assert (two.gates, two.recipe.quant_type, two.recipe.dtype) == (Gates(0.9, 0.1), "none", "bfloat16")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('min_survival = "0.9"', "min_survival 0.9: expected a number"),
        ("max_error = [1]", "max_error"),
        ('format = "nf4"\nquant_type = "fp4"', "has both format and quant_type, which mean the same"),
        ('format = "bf16"\ndtype = "float16"', "exclude each other"),
        ('format = "nf5"', "quant_type nf5: expected one of"),
    ],
)
def test_a_job_file_with_other_gates_and_formats_is_refused(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(f'base = "a/b"\nout = "z"\n{line}\n')

    with pytest.raises(BadRecipe, match=message.replace("[", r"\[")):
        read_jobs(file)


# Verification


def test_verify_holds_the_receipts_figures_against_the_gates(run: Run, base: Path, adapter: Path, out: Path) -> None:
    convert(base, adapter, out)

    assert verify(out, gates=LOOSE).is_good
    missed = verify(out, gates=STRICT)
    ran = run("verify", out, "--max-error", "0.05")

    assert (missed.is_good, missed.problems) == (False, [])
    assert all(" has error " in line or " has survival " in line for line in missed.missed)
    assert ran.code == 4
    assert "good" not in ran.out.splitlines()[0]
    assert ran.out.splitlines()[0].endswith(": a gate is missed")
    assert "… and 4 more like these" in ran.out
    (out / "config.json").write_text("{}")
    assert run("verify", out, "--max-error", "0.05").code == 1


def test_without_a_receipt_verify_computes_the_figures_or_says_that_it_can_not(
    base: Path,
    adapter: Path,
    out: Path,
) -> None:
    convert(base, adapter, out)
    for name in ("conversion.json", "SHA256SUMS"):
        (out / name).unlink()

    with pytest.raises(Undecided, match="error and survival are not known: give `base` and `adapter`"):
        verify(out, gates=LOOSE)
    assert any("has error" in line for line in verify(out, base, adapter, gates=STRICT).missed)
