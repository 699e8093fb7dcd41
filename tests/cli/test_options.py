"""Options: what is understood, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from converter.cli.values import FORMATS
from converter.recipe import QuantType
from tests.cli.conftest import Run, is_one_line


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--dry-run"], "Give --base, or an --adapter that names its base"),
        (["verify"], "Give one OUT: convert verify OUT"),
        (["verify", "one", "--out", "other"], "Give one OUT: convert verify OUT"),
        (["evaluate", "--text", "t"], "Give one OUT: convert evaluate OUT --text FILE"),
        (["evaluate", "one"], "Missing option '--text'"),
        (
            ["--base", "x", "--out", "y", "--format", "bf16", "--dtype", "float16"],
            "--format bf16 and --dtype float16 exclude",
        ),
        (["--base", "x"], "Give --out, or --dry-run"),
        (["--bose", "x"], "No such option"),
        (["--base"], "requires an argument"),
        (["--quant-type", "nf5"], "'nf5' is not one of nf4, fp4, int8, bf16, fp16, w4a16"),
        (["--block-size", "many"], "not a valid integer"),
        (["--threads", "0"], "not in the range"),
        (["--max-shard-size", "5 cows"], "'5 cows' is not a size such as 5GB or 512MiB"),
        (["--memory", "-1"], "is not a size"),
        (["swap"], "No such command"),
    ],
    ids=str,
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(run: Run, arguments: list[str], found: str) -> None:
    ran = run(*arguments)

    assert (ran.code, ran.out) == (2, "")
    assert found in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--block-size", "100"], "--block-size 100: expected one of 32, 64"),
        (["--max-shard-size", "1KB"], "--max-shard-size 1000: expected at least 1MB"),
        (["--memory", "1MB"], "--memory 1,000,000: "),
        (["--device", "abacus"], "--device abacus: "),
        (["--device", "cuda:99"], "use cpu"),
        (["--quant-type", "none", "--keep", "q_proj"], "--keep has no meaning with --format none"),
        (["--keep", "nothing_like_it"], "nothing_like_it"),
        (["--keep", "*"], "quantize none of its layers"),
    ],
    ids=str,
)
def test_choices_that_make_no_sense_end_with_2_and_name_the_option(
    run: Run, base: Path, out: Path, arguments: list[str], found: str
) -> None:
    ran = run("--base", base, "--out", out, *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert found in ran.err
    assert not out.parent.exists()


def test_both_spellings_of_an_option_mean_the_same(run: Run, base: Path, tmp_path: Path) -> None:
    arguments = ["--base", base, "--json", "--out", tmp_path / "out"]
    hyphens = run(*arguments, "--dry-run", "--quant-type", "fp4", "--no-double-quant", "--max-shard-size", "2MB")
    underscores = run(*arguments, "--dry_run", "--quant_type", "fp4", "--no_double_quant", "--max_shard_size", "2MB")

    assert hyphens.code == underscores.code == 0
    for key in ("recipe", "shards", "config"):
        assert json.loads(hyphens.out)[key] == json.loads(underscores.out)[key]


@pytest.mark.parametrize(
    ("text", "size"), [("2000000", 2_000_000), ("2MB", 2_000_000), ("2.5 gb", 2_500_000_000), ("2MiB", 2_097_152)]
)
def test_sizes_are_given_with_or_without_units(run: Run, base: Path, text: str, size: int) -> None:
    ran = run("--base", base, "--dry-run", "--json", "--max-shard-size", text)

    assert json.loads(ran.out)["recipe"]["max_shard_size"] == size


def test_every_choice_reaches_the_recipe(run: Run, base: Path, adapter: Path, out: Path) -> None:
    arguments = ["--quant-type", "fp4", "--no-double-quant", "--block-size", "128", "--dtype", "float16"]
    arguments += ["--merge-precision", "reference", "--keep", "o_proj", "--keep", "*.0.mlp.*"]

    ran = run("--base", base, "--adapter", adapter, "--out", out, *arguments, "--max-shard-size", "3MB", "--quiet")

    assert ran.code == 0
    assert json.loads((out / "conversion.json").read_text())["recipe"] == {
        "quant_type": "fp4",
        "double_quant": False,
        "block_size": 128,
        "dtype": "float16",
        "merge_precision": "reference",
        "keep": ["*.0.mlp.*", "o_proj"],
        "max_shard_size": 3_000_000,
    }


@pytest.mark.parametrize(
    ("given", "format_"),
    [
        (["--format", "NF4"], "nf4"),
        (["--format=4bit"], "nf4"),
        (["--quant-type", "8bit"], "int8"),
        (["--quant_type", "fp4"], "fp4"),
        (["--format", "w8a16", "--group-size", "32"], "w8a16"),
    ],
    ids=str,
)
def test_the_format_is_understood_as_people_write_it(given: list[str], format_: str, run: Run, base: Path) -> None:
    ran = run("--base", base, "--dry-run", "--json", *given)

    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["recipe"]["quant_type"] == format_


@pytest.mark.parametrize(
    ("given", "dtype"), [("bf16", "bfloat16"), ("FP16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_a_dtype_for_a_format_is_the_merged_model_in_it(given: str, dtype: str, run: Run, base: Path) -> None:
    ran = run("--base", base, "--dry-run", "--json", "--format", given)

    recipe = json.loads(ran.out)["recipe"]
    assert (ran.code, recipe["quant_type"], recipe["dtype"]) == (0, "none", dtype)


@pytest.mark.parametrize("name", ["-o", "--output"])
def test_names_that_people_try_are_taken(name: str, run: Run, base: Path, out: Path) -> None:
    assert run("--model", base, name, out, "--quiet") == (0, "", "")
    assert run("verify", name, out, "--model", base, "--quiet") == (0, "", "")


def test_every_format_of_a_recipe_can_be_asked_for() -> None:
    assert {*FORMATS, "none", "auto"} == {*get_args(QuantType), "bf16", "fp16"}
