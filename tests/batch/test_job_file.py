"""Files of jobs: TOML, YAML, JSON, and JSON a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.batch.job_file import read_jobs
from converter.combination import Combination
from converter.errors import BadRecipe
from converter.job import Job
from converter.recipe import Recipe
from tests.limits import cpu_below, no_hang


def test_a_toml_file_has_defaults_and_jobs(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    file = tmp_path / "jobs.toml"
    file.write_text(
        'base = "x"\nout = "z"\n[recipe]\nquant-type = "fp4"\n'
        '[[jobs]]\nadapter = "org/one"\n'
        '[[jobs]]\nadapter = "./two"\nname = "second"\nquant_type = "w4a16"\nscale-search = true\nkeep = "lm_head"\n'
        '[[jobs]]\nadapter = "org/three"\nout = "elsewhere"\nbase = "org/base"\nbase_revision = "v1"\n'
    )

    one, two, three = read_jobs(file)

    assert one == Job(tmp_path / "z" / "one", "org/one", str(tmp_path / "x"), Recipe(quant_type="fp4"))
    assert two.out == tmp_path / "z" / "second"
    assert two.recipe == Recipe(quant_type="w4a16", scale_search=True, keep=("lm_head",))
    assert two.adapter == str(tmp_path / "two")
    assert (three.out, three.base, three.base_revision) == (tmp_path / "elsewhere", "org/base", "v1")


def test_a_file_of_json_lines_has_a_job_a_line(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    rows = [{"adapter": "a/b", "out": "one"}, {"base": "c/d", "out": "two", "recipe": {"double-quant": False}}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")

    assert read_jobs(file) == [
        Job(tmp_path / "one", "a/b"),
        Job(tmp_path / "two", None, "c/d", Recipe(double_quant=False)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"adapter": "a", "out": "z", "quant": 4}', "job 1: 'quant' is not known"),
        ('{"adapter": "a", "out": "z", "quant_type": "q4"}', "job 1: quant_type q4"),
        ('{"adapter": "a"}', "job 1: has no out"),
        ('{"out": "z"}', "has neither adapter, adapters nor base"),
        ('{"adapter": "a", "out": "z", "double_quant": "false"}', "job 1: double_quant is neither true nor false"),
        ('{"adapter": "a", "out": "z", "keep": [1]}', "job 1: keep is not a list of texts"),
        ('{"adapter": "a", "out": "z", "keep": 1}', "job 1: "),
        ('{"adapter": "a", "out": "z", "max_shard_size": "5GB"}', "job 1: max_shard_size is not a number of bytes"),
        ('{"adapter": "a", "out": "z", "recipe": 4}', "expected a table"),
        ('{"adapter": "a", "out": "z"}\n{"adapter": "b"}', "job 2: has no out"),
        ('{"adapter": 1, "out": "z"}', "adapter is not a text"),
        ("[]", "job 1: holds list, expected an object"),
        ('{"adapter": "a", "adapter": "b", "out": "z"}', "job 1: not valid JSON: key 'adapter' occurs twice"),
        ('{"adapter": "a", "out": "z", "block_size": 64.0}', "job 1: block_size is not a number"),
        ('{"adapter": "a", "out": "z", "keep": {"lm_head": 1}}', "job 1: keep is not a list of texts"),
        ('{"adapter": "a", "out": "z\\u0000"}', "job 1: out is not a text"),
        ('{"adapter": "a", "out": "z\\ud800"}', "job 1: out is not a text"),
        ('{"adapter": "a", "base": "\\ud800", "out": "z"}', "job 1: base is not a text"),
        ('{"adapter": "a", "out": "~nobody-of-this-name/z"}', "job 1: Could not determine home"),
        ('{"adapter": "~nobody-of-this-name/a", "out": "z"}', "job 1: Could not determine home"),
        ("[" * 200_000, "job 1: nested too deeply"),
        ("{", "Expecting"),
        ("", "has no jobs"),
    ],
)
def test_a_job_that_is_not_understood_is_refused_by_number(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(line)
    with pytest.raises(BadRecipe, match=message.replace("[", r"\[")):
        read_jobs(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[jobs]]\nadapter = "a"\nname = "../a"\n', r"'\.\./a' can't be a folder's name"),
        ('[[jobs]]\nadapter = "a"\nname = "/etc/a"\n', "'/etc/a' can't be a folder's name"),
        ('[[jobs]]\nadapter = ".."\n', r"'\.\.' can't be a folder's name"),
        ('[[jobs]]\nadapter = "/"\n', "'' can't be a folder's name"),
        ('[[jobs]]\nadapter = "a"\nblock-size = 0x' + "f" * 5_000, "block_size is not a number"),
        ('[[jobs]]\nadapter = "a"\nmax-shard-size = 0x' + "f" * 5_000, "max_shard_size is not a number of bytes"),
        ('[[jobs]]\nadapter = "a"\nquant-type = {' + "a = {" * 500 + "}" * 500 + "}", "deeply"),
        ('[[jobs]]\nadapter = "a"\nrecipe = ' + "[" * 100 + "]" * 100, "list: expected a table"),
        ("a = " + "[" * 50_000, "deeply"),
        (b"\xff", "can't decode"),
    ],
)
def test_a_toml_file_that_is_not_understood_is_refused_soon(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_bytes(text if isinstance(text, bytes) else f'out = "z"\n{text}'.encode())
    with cpu_below(5), pytest.raises(BadRecipe, match=message):
        read_jobs(file)


@pytest.mark.parametrize("name", ["jobs.toml", "jobs.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_not_a_file_is_not_opened(make: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with no_hang(), pytest.raises(BadRecipe, match="not a plain file"):
        read_jobs(tmp_path / name)


def test_a_file_of_jobs_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('{"adapter": "a", "out": "z"}')
    (tmp_path / "jobs.jsonl").symlink_to("jobs")
    assert len(read_jobs(tmp_path / "jobs.jsonl")) == 1


def test_a_file_of_jobs_without_end_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "jobs.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadRecipe, match="more than 10,000,000 bytes"):
        read_jobs(tmp_path / "jobs.jsonl")


def test_a_line_separator_in_a_name_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"adapter": "a", "out": "z\u2028y"}')
    assert read_jobs(tmp_path / "jobs.jsonl")[0].out == tmp_path / "z\u2028y"


def test_a_home_folder_is_meant_wherever_the_file_of_jobs_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "jobs.toml").write_text('out = "~/z"\n[[jobs]]\nadapter = "a"\n[[jobs]]\nadapter = "b"\nout = "~/y"\n')
    assert [job.out for job in read_jobs(tmp_path / "jobs.toml")] == [tmp_path / "home" / name for name in ("z/a", "y")]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="No such file"):
        read_jobs(tmp_path / "nowhere.toml")


def test_a_folder_beside_the_file_is_meant_before_an_id_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org" / "one").mkdir(parents=True)
    (tmp_path / "jobs.jsonl").write_text('{"adapter": "org/one", "base": "org/two", "out": "z"}')
    (job,) = read_jobs(tmp_path / "jobs.jsonl")
    assert (job.adapter, job.base) == (str(tmp_path / "org" / "one"), "org/two")


SAME_JOBS = [
    (
        "jobs.toml",
        'base = "./b"\nout = "z"\n[recipe]\nkeep = ["lm_head"]\n[[jobs]]\nadapter = "./one"\n'
        '[[jobs]]\nadapter = "./two"\nname = "2"\nquant-type = "fp4"\n',
    ),
    (
        "jobs.yaml",
        "base: ./b\nout: z\nrecipe:\n  keep: [lm_head]\njobs:\n  - adapter: ./one\n"
        "  - {adapter: ./two, name: '2', quant-type: fp4}\n",
    ),
    (
        "jobs.json",
        '{"base": "./b",\n "out": "z", "keep": ["lm_head"],\n "jobs": [{"adapter": "./one"},\n'
        '{"adapter": "./two", "name": "2", "quant_type": "fp4"}]}',
    ),
    (
        "jobs.yml",
        "- {base: ./b, keep: lm_head, out: z/one, adapter: ./one}\n"
        "- {base: ./b, keep: lm_head, out: z/2, adapter: ./two, quant_type: fp4}\n",
    ),
    (
        "list.json",
        '[{"base": "./b", "keep": "lm_head", "out": "z/one", "adapter": "./one"},\n'
        ' {"base": "./b", "keep": "lm_head", "out": "z/2", "adapter": "./two", "quant_type": "fp4"}]',
    ),
    (
        "lines.json",
        '{"base": "./b", "keep": "lm_head", "out": "z/one", "adapter": "./one"}\n'
        '{"base": "./b", "keep": "lm_head", "out": "z/2", "adapter": "./two", "quant_type": "fp4"}\n',
    ),
]


@pytest.mark.parametrize(("name", "text"), SAME_JOBS, ids=[name for name, _ in SAME_JOBS])
def test_the_same_jobs_can_be_written_in_any_format(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    base = str(tmp_path / "b")
    assert read_jobs(tmp_path / name) == [
        Job(tmp_path / "z" / "one", str(tmp_path / "one"), base, Recipe(keep=("lm_head",))),
        Job(tmp_path / "z" / "2", str(tmp_path / "two"), base, Recipe(keep=("lm_head",), quant_type="fp4")),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("job.toml", 'base = "./b"\nadapters = "ads/*"\nout = "z"\nblock-size = 128\n'),
        ("job.yaml", "base: ./b\nadapters: ads\nout: z\nblock_size: 128\n"),
        ("job.json", '{"base": "./b", "adapters": ["ads/one", "ads/t*"], "out": "z",\n"recipe": {"block_size": 128}}'),
        ("job.jsonl", '{"base": "./b", "adapters": "ads/*", "out": "z", "block_size": 128}'),
        ("jobs.yaml", "base: ./b\nout: z\nblock_size: 128\njobs:\n- adapters: ads\n"),
        ("jobs.toml", 'base = "./b"\nout = "z"\nadapters = "ads"\njobs = []\n[recipe]\nblock-size = 128\n'),
    ],
)
def test_adapters_stand_for_a_job_each_relative_to_the_file(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for adapter in ("one", "two"):
        (tmp_path / "ads" / adapter).mkdir(parents=True)
        (tmp_path / "ads" / adapter / "adapter_config.json").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / name).write_text(text)

    assert read_jobs(Path("..") / name) == [
        Job(Path("../z") / adapter, f"../ads/{adapter}", "../b", Recipe(block_size=128)) for adapter in ("one", "two")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: z\nadapters: ads/*\n", "job 1: ads/.: no adapters there"),
        ("out: z\nadapters: 4\n", "job 1: adapters is neither a text nor a list of texts"),
        ("out: z\nadapters: []\n", "job 1: adapters is neither a text nor a list of texts"),
        ("out: z\nadapters: [a, [b]]\n", "job 1: adapters is neither a text nor a list of texts"),
        ("adapters: a\n", "job 1: has no out"),
        ("out: z\nadapters: a\nadapter: b\n", "job 1: has both adapters and adapter"),
        ("out: z\nadapters: a\nname: b\n", "job 1: has both adapters and name"),
        ("out: z\nadapter: a/*\n", "job 1: adapter a/. stands for several adapters; write adapters instead"),
        ("out: z\nadapter: a\nout: y\n", "line 1: key 'out' occurs twice"),
        ("jobs:\n- {out: z, adapter: a}\n- {out: y, adapter: b, adapter: c}\n", "line 3: key 'adapter' occurs twice"),
        ("out: z\nadapter: a\nquant-type: fp4\nquant_type: nf4\n", "once with - and once with _"),
        ("jobs: 4\n", "jobs is not a list"),
        ("4", "int: expected a table"),
        ("", "has no jobs"),
        ("{}", "has no jobs"),
        ("[]", "has no jobs"),
        ("- 4\n", "job 1: not an object"),
        ("out: z\nadapter: [a\n", "not valid YAML: line 3: "),
        ("out: z\nadapter: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 2: could not determine"),
        ("out: z\nadapter: \x00\n", "not valid YAML: "),
        ("out: z\nadapter: a\nblock_size: &a [*a]\n", "block_size is not a single value"),
        ("out: z\nadapter: a\nkeep: &a [*a]\n", "keep is not a list of texts"),
        ("&a [*a]", "job 1: not an object"),
        ("out: z\nadapter: a\nkeep: 2001-99-99\n", "month must be in"),
        ("[" * 50_000, "deeply"),
    ],
)  # fmt: skip
def test_a_yaml_file_that_is_not_understood_is_refused_soon(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with cpu_below(5), pytest.raises(BadRecipe, match=message):
        read_jobs(tmp_path / "jobs.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"adapter": "a", "out": "z", "out": "y"}', "key 'out' occurs twice"),
        ('[{"adapter": "a", "out": "z"}', "not valid JSON"),
        ('{"adapter": "a", "out": "z"}\n{"adapter": "a"', "not valid JSON"),
        ('{"adapter": "a", "out": "z"}\n{"adapter": "a"}', "job 2: has no out"),
        ("", "not valid JSON|no jobs"),
        ("4", "int: expected a table"),
    ],
)
def test_a_json_file_that_is_not_understood_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text(text)
    with pytest.raises(BadRecipe, match=message):
        read_jobs(tmp_path / "jobs.json")


def test_a_path_is_never_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "models" / "x").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there" / "jobs.jsonl").write_text('{"base": "models/x", "out": "z"}')
    with pytest.raises(BadRecipe, match="there/models/x: no such folder; relative paths are relative to the file"):
        read_jobs(tmp_path / "there" / "jobs.jsonl")


# Several adapters into one output

PRUNED = Combination("ties_svd", (1.0, -0.5), density=0.5, majority_sign="frequency", rank=4)
COMBINED = {
    "job.toml": (
        'base = "./b"\nadapters = ["./one", "./two"]\nout = "z/both"\ncombine = "ties_svd"\nweight = [1.0, -0.5]\n'
        'density = 0.5\nmajority-sign = "frequency"\nsvd-rank = 4\n'
    ),
    "jobs.yaml": (
        "base: ./b\nout: z\ncombine: ties_svd\ndensity: 0.5\nmajority_sign: frequency\nsvd_rank: 4\n"
        "jobs:\n- {adapters: [./one, ./two], name: both, weights: [1.0, -0.5]}\n"
    ),
    "table.toml": (
        'base = "./b"\nout = "z"\n[[jobs]]\nname = "both"\nadapters = ["./one", "./two"]\n[jobs.recipe.combine]\n'
        'kind = "ties_svd"\nweights = [1.0, -0.5]\ndensity = 0.5\nmajority_sign = "frequency"\nrank = 4\n'
    ),
    "jobs.jsonl": (
        '{"base": "./b", "adapters": ["./one", "./two"], "out": "z/both", "combine": {"kind": "ties_svd", '
        '"weights": [1.0, -0.5], "density": 0.5, "majority_sign": "frequency", "rank": 4}}'
    ),
}


@pytest.mark.parametrize(("name", "text"), COMBINED.items())
def test_several_adapters_of_a_job_become_one_output(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    adapters = [str(tmp_path / one) for one in ("one", "two")]

    assert read_jobs(tmp_path / name) == [
        Job(tmp_path / "z" / "both", adapters, str(tmp_path / "b"), Recipe(combine=PRUNED))
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: [a, b]\nweights: [1, 1]\n", "weights has no meaning without combine"),
        ("adapters: [a, b]\ncombine: cat\n", "combine has no kind, or no list of weights"),
        ("adapters: [a, b]\ncombine: dog\nweights: [1, 1]\n", "combine dog: expected one of cat, linear"),
        ("adapters: [a, b]\ncombine: cat\nweights: [1, 1, 1]\n", "3 weights for 2 adapters: give one for each"),
        (
            "adapters: [a, b]\ncombine: cat\nweights: [1, 1]\nweight: [1, 1]\n",
            "has both weight and weights, which mean",
        ),
        ("adapters: [a, b]\ncombine: cat\nweights: [1, 0]\n", "weight 0: expected a number that is not 0"),
        ("adapters: [a, b]\ncombine: cat\nweights: [1, x]\n", "weight x: expected a number that is not 0"),
        ("adapters: [a, b]\ncombine: cat\nweights: [1, 1]\nsvd-rank: 4\n", "svd_rank has no meaning with combine cat"),
        (
            "adapters: [a, b]\ncombine: {kind: cat, weights: [1, 1]}\nseed: 4\n",
            "seed stands beside combine, which is a table",
        ),
        (
            "adapters: [a, b]\ncombine: {kind: cat, weights: [1, 1], of: 1}\n",
            "combine is not a table of a combination's",
        ),
        (
            "adapter: a\ncombine: cat\nweights: [1, 1]\n",
            "has combine, but no adapters, a list of those that become one",
        ),
        (
            "adapters: [a, b/*]\ncombine: cat\nweights: [1, 1]\n",
            "adapter b/. stands for several; with combine, name each",
        ),
        (
            "jobs: [{adapters: [a, b]}]\ncombine: cat\nweights: [1, 1]\nout: z\n",
            "has neither out nor name, and its adapters",
        ),
    ],
)
def test_a_combination_that_is_not_understood_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(text if "out: z" in text else f"out: z\n{text}")

    with pytest.raises(BadRecipe, match=f"job 1: {message}"):
        read_jobs(file)
