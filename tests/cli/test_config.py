"""`--config` and `--print-config`: one conversion's options as a file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.cli.conftest import Run, is_one_line
from tests.folders import change_json, contents, copy


@pytest.fixture
def project(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """A folder with a base, an adapter and the file of a run, and another folder that is the current one."""
    copy(base, tmp_path / "project" / "base")
    copy(adapter, tmp_path / "project" / "ads" / "one")
    return tmp_path / "project"


def test_a_file_has_the_options_and_its_relative_paths_are_relative_to_it(run: Run, project: Path) -> None:
    file = project / "run.toml"
    file.write_text(
        'base = "base"\nadapter = "ads/one"\nout = "out"\nformat = "FP4"\ndouble-quant = false\n'
        'block_size = 128\nkeep = ["o_proj", "*.0.mlp.*"]\nmemory = "300MB"\nmax_error = 0.3\nquiet = false\n'.replace(
            "quiet = false\n", ""
        )
    )

    ran = run("--config", file, "--quiet")

    assert (ran.code, ran.out, ran.err) == (0, "", "")
    recipe = json.loads((project / "out" / "conversion.json").read_text())["recipe"]
    assert (recipe["quant_type"], recipe["double_quant"], recipe["block_size"]) == ("fp4", False, 128)
    assert recipe["keep"] == ["*.0.mlp.*", "o_proj"]


def test_a_file_names_a_text_and_metrics_beside_it_or_a_text_on_the_hub(run: Run, project: Path) -> None:
    config = project / "calibrated.toml"
    config.write_text('base = "base"\nout = "out"\nmetrics = "convert.prom"\ncalibrate = "gone.txt"\n')
    beside = run("--config", config, "--print-config")
    config.write_text('base = "base"\nout = "out"\ncalibrate = "hf://datasets/org/name/a.jsonl"\n')
    on_the_hub = run("--config", config, "--print-config")

    assert f'metrics = "{project}/convert.prom"' in beside.out
    assert f'calibrate = "{project}/gone.txt"' in beside.out
    assert 'calibrate = "hf://datasets/org/name/a.jsonl"' in on_the_hub.out


def test_the_command_line_goes_first(run: Run, project: Path) -> None:
    (project / "run.toml").write_text('base = "base"\nout = "out"\nformat = "fp4"\n')

    ran = run("--config", project / "run.toml", "--format", "int8", "--dry-run", "--json")

    assert json.loads(ran.out)["recipe"]["quant_type"] == "int8"


def test_a_glob_of_a_file_makes_an_output_for_each_adapter(run: Run, project: Path) -> None:
    copy(project / "ads" / "one", project / "ads" / "two")
    (project / "run.toml").write_text('base = "base"\nadapter = "ads/*"\nout = "outs"\n')

    ran = run("--config", project / "run.toml", "--quiet")

    assert ran.code == 0
    assert sorted(path.name for path in (project / "outs").iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    "how",
    [
        'combine = "ties"\nweight = [1.0, -0.5]\ndensity = 0.5\n',
        '[recipe]\ncombine = "ties"\nweight = [1.0, -0.5]\ndensity = 0.5\n',
        '[combine]\nkind = "ties"\nweights = [1.0, -0.5]\ndensity = 0.5\n',
        '[recipe.combine]\nkind = "ties"\nweights = [1.0, -0.5]\ndensity = 0.5\n',
    ],
    ids=["options", "options of a recipe", "table", "table of a recipe"],
)
def test_a_file_says_how_adapters_become_one(how: str, run: Run, project: Path) -> None:
    copy(project / "ads" / "one", project / "ads" / "two")
    (project / "run.toml").write_text(f'base = "base"\nadapter = ["ads/one", "ads/two"]\nout = "out"\n{how}')

    ran = run("--config", project / "run.toml", "--dry-run", "--json")

    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["recipe"]["combine"] == {"kind": "ties", "weights": [1.0, -0.5], "density": 0.5}


def test_a_table_of_a_combination_with_an_unknown_name_is_refused(run: Run, project: Path) -> None:
    (project / "run.toml").write_text('base = "base"\nout = "out"\n[combine]\nkind = "cat"\nhow = 1\n')

    ran = run("--config", project / "run.toml", "--dry-run")

    assert ran.code == 2
    assert "'how' is no option; convert --help lists them" in ran.err


def test_what_is_printed_gives_the_same_bytes_again(run: Run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    options = ["--base", "base", "--adapter", "ads/one", "--format", "bf16", "--max-error", "0.9", "--threads", "1"]

    printed = run(*options, "--out", "first", "--print-config")
    (project / "run.toml").write_text(printed.out)
    made = [run(*options, "--out", "first", "-q").code, run("--config", "run.toml", "--out", "second", "-q").code]

    stated = tomllib.loads(printed.out)
    assert (printed.code, made) == (0, [0, 0])
    assert {key: stated[key] for key in ("base", "adapter", "out", "format", "max_error", "threads")} == {
        "base": "base",
        "adapter": "ads/one",
        "out": "first",
        "format": "bf16",
        "max_error": 0.9,
        "threads": 1,
    }
    assert stated["merge_precision"] == "float32", "what shapes bytes is said although it is the default"
    assert "device" not in stated
    assert contents(project / "first") == contents(project / "second")


def test_printing_the_options_writes_nothing_and_prints_what_it_read(run: Run, project: Path) -> None:
    (project / "run.toml").write_text('base = "base"\nout = "out"\nkeep = "o_proj"\n')

    printed = tomllib.loads(run("--config", project / "run.toml", "--print-config").out)

    assert printed["keep"] == "o_proj"
    assert printed["base"] == str(project / "base")
    assert not (project / "out").exists()


@pytest.mark.parametrize("what", ["OUT", "OUT/conversion.json"])
def test_a_receipt_gives_the_recipe_that_makes_the_same_bytes(what: str, run: Run, project: Path) -> None:
    where = ["--base", project / "base", "--adapter", project / "ads" / "one"]
    run(
        *where,
        "--out",
        project / "out",
        "--format",
        "w8a16",
        "--group-size",
        "32",
        "--keep",
        "o_proj",
        "--scale-search",
        "-q",
    )

    printed = run("--config", project / what.replace("OUT", "out"), "--print-config").out
    (project / "again.toml").write_text(printed)
    ran = run("--config", project / "again.toml", *where, "--out", project / "again", "-q")

    assert ran == (0, "", "")
    assert contents(project / "again") == contents(project / "out")
    assert "base" not in tomllib.loads(printed), "no place is in a receipt"


def test_of_a_receipt_base_and_adapter_of_the_hub_are_taken_by_name_and_commit(run: Run, project: Path) -> None:
    run("--base", project / "base", "--out", project / "out", "-q")
    receipt = project / "out" / "conversion.json"
    names = {"base_name": "org/base", "base_commit": "c" * 40, "adapter_name": "org/ad", "adapter_commit": "d" * 40}
    change_json(receipt, origin=json.loads(receipt.read_text())["origin"] | names)

    printed = tomllib.loads(run("--config", receipt, "--print-config").out)

    assert (printed["base"], printed["base_revision"]) == ("org/base", "c" * 40)
    assert (printed["adapter"], printed["adapter_revision"]) == ("org/ad", "d" * 40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bose = 1", "'bose' is no option; convert --help lists them"),
        ("dry_run = true", "'dry_run' is no option"),
        ("overwrite = 1", "overwrite is true or false"),
        ('base = ["a", "b"]', "base is a single value"),
        ("base = true", "base is no such value"),
        ('format = "nf4"\nquant_type = "fp4"', "'quant_type' stands there twice, by two names"),
        ('format = "nf5"', "'nf5' is not one of nf4"),
        ("threads = 0", "not in the range"),
        ("[recipe]\nkeep = {}", "keep is no such value"),
        ("recipe = 4", "recipe is no table"),
        ("not toml", "run.toml: "),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(text: str, message: str, run: Run, project: Path) -> None:
    (project / "run.toml").write_text(text)

    ran = run("--config", project / "run.toml", "--base", project / "base", "--dry-run")

    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert is_one_line(ran.err)


@pytest.mark.parametrize("name", ["gone.toml", "ads", "base/config.json"])
def test_what_is_no_file_of_options_is_refused(name: str, run: Run, project: Path) -> None:
    ran = run("--config", project / name, "--dry-run")

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert f"--config {project / name}" in ran.err
