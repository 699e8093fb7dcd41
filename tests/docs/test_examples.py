"""Every command, file and Python example of README and docs is run, or excused for a reason."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from converter.cli.commands import cli
from tests.cli.conftest import Ran, Run, start
from tests.conftest import REPOSITORY
from tests.docs.blocks import (
    EXCUSES,
    PAGES,
    PROGRAMS,
    Block,
    blocks,
    blocks_of,
    check_shape,
    commands,
    excuse,
    file_name,
    parse,
)
from tests.folders import change_json, copy
from tests.limits import HANG
from tests.models import save_adapter, save_base

VARIES = re.compile(r"[\d.]+ s,|memory [\d.]+ [kMG]B")
FILES = ("toml", "yaml")
WITH_BLOCKS = [page for page in PAGES if any(blocks(page))]
IDS = [str(page.relative_to(REPOSITORY)) for page in WITH_BLOCKS]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever the pages name: bases X and meta-llama/Llama-3.1-8B, adapters that name X, and the fixtures."""
    folder = tmp_path_factory.mktemp("scene")
    base = save_base(folder / "X", "llama")
    copy(base, folder / "meta-llama" / "Llama-3.1-8B")
    adapter = save_adapter(folder / "Y", base, "llama")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    for name in ("A", "B", "C", "D", "ads/one", "ads/two", "checkpoints/final"):
        change_json(copy(adapter, folder / name) / "adapter_config.json", lora_alpha=8 + len(name))
    for name in ("fixtures", "converter"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one page, with what the pages name in it."""
    for path in scene.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(run: Run, words: list[str], block: Block) -> Ran:
    """One command of ours, with its output sent to a file where `>` says so; or a script of ours."""
    words, to = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    if words[0] == "python" and words[1].endswith(".py"):
        ran = start([REPOSITORY / words[1], *words[2:]])
    else:
        assert words[0] in PROGRAMS, f"{block}: nothing runs `{shlex.join(words)}`, and no reason excuses it"
        ran = run(*words[1:])
    assert ran.code == 0, f"{block}: {shlex.join(words)}: exit code {ran.code}: {ran.err}"
    if to is not None:
        Path(to).write_text(ran.out)
    return ran


def write_file(block: Block) -> None:
    """A file that a page shows is there for the commands that name it, above it or below."""
    file = Path(file_name(block))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


def try_block(block: Block, run: Run, names: dict[str, object]) -> None:
    """Run a block in the current folder."""
    check_shape(block)
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
    for words, shown in commands(block):
        if reason := excuse(words):
            reason.check(words)
            continue
        printed = run_command(run, words, block).out
        if shown is not None:
            assert VARIES.sub("…", shown) == VARIES.sub("…", printed), f"{block}: {shlex.join(words)}"


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=IDS)
def test_whatever_a_page_shows_works_in_the_order_of_the_page(page: Path, here: Path, run: Run) -> None:
    names: dict[str, object] = {"__name__": "__main__"}

    for block in blocks(page):
        if block.language in FILES:
            write_file(block)
    for block in blocks(page):
        try_block(block, run, names)


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=IDS)
def test_every_file_that_a_page_shows_is_used_by_a_command_of_it(page: Path) -> None:
    found = list(blocks(page))
    used = {word for block in found for words, _ in commands(block) for word in words}
    used |= set(re.findall(r'"([\w./-]+)"', "".join(block.text for block in found if block.language == "python")))

    for block in found:
        if block.language in FILES and not file_name(block).startswith(".github/"):
            assert file_name(block) in used, f"{block}: nothing runs with it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_in_a_line_of_prose_can_be_parsed(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)

    for line in re.findall(r"`((?:nf4-)?convert [^`(]+)`", prose):
        words = [word for word in shlex.split(re.sub(r" (?:>|\\?\|) .*", "", line)) if word != "…"]
        if {*words} & {"COMMAND", "[OPTIONS]", "completion"} or (len(words) == 2 and words[1] in cli.commands):
            continue  # not a whole command line
        try:
            parse(words)
        except click.exceptions.Exit:
            continue  # --help
        except click.ClickException as exc:
            pytest.fail(f"{page.name}: `{line}`: {exc.format_message()}")


def test_the_python_of_the_pages_has_the_right_types(tmp_path: Path) -> None:
    for page in WITH_BLOCKS:
        parts = [block.text for block in blocks(page) if block.language == "python"]
        (tmp_path / f"{page.stem}.py").write_text("\n".join(parts))

    if (known := REPOSITORY / ".mypy_cache").is_dir():  # of `make types`, so that only the pages are checked
        shutil.copytree(known, tmp_path / "cache")
    program = [sys.executable, "-m", "mypy", "--config-file", REPOSITORY / "pyproject.toml"]
    ran = subprocess.run(
        [*program, "--cache-dir", tmp_path / "cache", *sorted(tmp_path.glob("*.py"))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout


def test_every_option_that_a_page_names_exists() -> None:
    every = (cli, *cli.commands.values())
    known = {name for command in every for p in command.params for name in (*p.opts, *p.secondary_opts)}

    for page in PAGES:
        spans = re.findall(r"`(--[a-z][a-z0-9-]*)", page.read_text())
        assert {*spans} <= known | {"--help", *OF_OTHERS}, page


def test_every_file_of_the_repository_that_a_page_names_exists() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:converter|tests|docs|tools|benchmarks|chaos)/[\w./-]+)`", page.read_text()):
            assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


OF_OTHERS = {
    "--require-hashes",
    "--no-deps",
    "--no-build-isolation",
    "--enable-lora",
    "--enforce-eager",
}
"""Options of other programs that the pages name."""


def test_no_excuse_is_left_over() -> None:
    said = [words for page in PAGES for block in blocks(page) for words, _ in commands(block)]

    for one in EXCUSES:
        assert any(one.begins.search(" ".join(words)) for words in said), f"no page has what this excuses: {one.begins}"


BAD = {
    "a command that nothing runs": ("```bash\ncurl example.org\n```\n", "nothing runs `curl example.org`"),
    "a command that fails": ("```bash\nconvert --base nowhere --out o\n```\n", "exit code 2"),
    "an option that does not exist": ("```bash\nconvert batch j.toml --ray local --rays\n```\n", "No such option"),
    "another output": ("```console\n$ convert completion fish\nnothing\n```\n", "convert completion fish"),
    "a block of no language": ("```\nconvert --help\n```\n", "say its language"),
    "a command in a text": ("```text\n$ convert --help\n```\n", "nothing runs"),
    "a file without a name": ('```toml\nbase = "X"\n```\n', "say in the first line"),
    "Python that fails": ("```python\nraise LookupError('this')\n```\n", "this"),
    "a target that does not exist": ("```bash\nmake tea\n```\n", "no such target"),
    "an extra that does not exist": ("```bash\npip install .[tea]\n```\n", "no such extra"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_a_page_that_is_wrong_is_found(text: str, said: str, here: Path, run: Run) -> None:
    page = REPOSITORY / "docs" / "wrong.md"
    (block,) = blocks_of(page, text)

    with pytest.raises((AssertionError, click.UsageError, LookupError), match=re.escape(said)):
        try_block(block, run, {})
