"""The fenced blocks of README and docs, and how each is tried: run, written to a file, or excused with a reason."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.requirements import Requirement

from converter.cli.commands import cli
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PROGRAMS = ("convert", "nf4-convert")
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"# ([\w./-]+\.(?:toml|ya?ml))\b")
_COMMAND = re.compile(r"^\s*(\$|(nf4-)?convert|pip|make|python|hf|vllm)\s", re.MULTILINE)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


class Command(NamedTuple):
    words: list[str]
    shown: str | None
    """What the page prints below it; None: nothing is said of that."""


class Excuse(NamedTuple):
    begins: re.Pattern[str]
    reason: str
    check: Callable[[list[str]], object]
    """Raises where the command can't be right."""


def blocks(page: Path) -> Iterator[Block]:
    return blocks_of(page, page.read_text())


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    """The blocks of a page that has this text."""
    for found in _FENCE.finditer(text):
        inner = re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[2], inner)


def commands(block: Block) -> list[Command]:
    """The commands of a block, those of a workflow included; none of one that is no shell's."""
    if block.language == "console":
        parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        assert parts[0] == "", f"{block}: begins with what no command printed"
        pairs = [part.partition("\n") for part in parts[1:]]
        return [Command(words, shown) for line, _, shown in pairs for words in _words(line)]
    if block.language == "bash":
        return [Command(words, None) for line in block.text.splitlines() for words in _words(line)]
    if block.language == "yaml" and (name := file_name(block)).startswith(".github/"):
        jobs = yaml.safe_load(block.text)["jobs"].values()
        calls = [job for job in jobs if "uses" in job]
        for job in calls:
            _check_call(job, block)
        jobs = [job for job in jobs if "uses" not in job]
        lines = [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]
        assert lines or calls, f"{block}: {name} runs nothing"
        return [Command(words, None) for line in lines for words in _words(line)]
    return []


def _check_call(job: dict[str, Any], block: Block) -> None:
    """A job that calls a reusable workflow: it is one of ours, and has these inputs and all that it must."""
    path = re.fullmatch(r"[\w/]+/(\.github/workflows/[\w.-]+)@\w+", job["uses"])
    assert path, f"{block}: {job['uses']}: no workflow of this repository"
    called = yaml.safe_load((REPOSITORY / path[1]).read_text())
    inputs = called[True]["workflow_call"]["inputs"]  # in YAML `on` is true
    needed = {name for name, one in inputs.items() if one.get("required")}
    assert needed <= {*job["with"]} <= {*inputs}, f"{block}: {job['uses']} has other inputs: {sorted(inputs)}"


def file_name(block: Block) -> str:
    """What a file is called, from its first line, a comment."""
    named = _NAMED.match(block.text)
    assert named, f"{block}: say in the first line what the file is called: # jobs.toml"
    return named[1]


def check_shape(block: Block) -> None:
    """A block says what it is, and one of plain text hides no command."""
    assert block.language in {"bash", "console", "python", "toml", "yaml", "text"}, f"{block}: say its language"
    if block.language == "text":
        assert not _COMMAND.search(block.text), f"{block}: a command in a block of text, which nothing runs"
    if block.language in ("toml", "yaml"):
        file_name(block)


def excuse(words: list[str]) -> Excuse | None:
    line = " ".join(words)
    return next((one for one in EXCUSES if one.begins.search(line)), None)


def parse(words: list[str]) -> None:
    """`click.UsageError` where a command line has an option that does not exist, or lacks one."""
    name, *arguments = words[1:]
    if command := cli.commands.get(name):
        command.make_context(name, arguments)
    else:
        cli.make_context("convert", words[1:])


def _words(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word == "&&":
            yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def _is_installable(words: list[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {*project["optional-dependencies"]}
    for word in words[2:]:
        ours = re.fullmatch(rf"(?:\.|{project['name']})(?:\[(.*)\])?", word)
        if ours:
            assert {*filter(None, (ours[1] or "").split(","))} <= extras, f"{word}: no such extra"
        elif not word.startswith(("-", "https://")):
            Requirement(word)


def _is_a_target(words: list[str]) -> None:
    targets = re.findall(r"^([\w.-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= {*targets}, f"{words}: no such target"


EXCUSES = (
    Excuse(re.compile(r"^pip install "), "needs a network", _is_installable),
    Excuse(re.compile(r"^make "), "makes an environment of its own, which takes a network", _is_a_target),
    Excuse(re.compile(r"^vllm serve |^python -m sglang"), "a server, which takes a GPU", lambda _: None),
    Excuse(re.compile(r"^openssl "), "makes a key; tests/test_signing.py does, too", lambda _: None),
    Excuse(re.compile(r"^convert .*--(public-)?key "), "needs a key; tests/test_signing.py has one", parse),
    Excuse(re.compile(r"^hf "), "writes to the Hub, or reads from it", lambda _: None),
    Excuse(
        re.compile(r"^convert (.*--out|verify|report|evaluate) (hf|s3)://"),
        "needs a store; tests/write/stores has some",
        parse,
    ),
    Excuse(
        re.compile(r"^convert (pipeline registered\.toml|.*models:/)"),
        "needs an MLflow server; tests/write/stores asks one",
        parse,
    ),
    Excuse(re.compile(r"^(nf4-)?convert .*--ray\b"), "starts a cluster, or needs one; tests/batch has them", parse),
)
