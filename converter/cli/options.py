"""The options that several commands share: their types, their words, and the values that they become."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from converter.cli.show.progress import Kind
    from converter.job import RunOptions
    from converter.recipe import Recipe
    from converter.resources import Resources

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Size(click.ParamType[int]):
    """5GB, 500MB, 512MiB: bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if found is None or found[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5GB or 512MiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


class Share(click.ParamType[float]):
    """5%, 0.05: a share of the whole."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a share such as 5% or 0.05", param, ctx)
        return share


class Part(click.ParamType[tuple[int, int]]):
    """2/4: the second of four parts."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if found is None:
            self.fail(f"{value!r} is not a part such as 1/4", param, ctx)
        return int(found[1]), int(found[2])


FORMATS = ("nf4", "fp4", "int8", "none", "w4a16", "w8a16", "fp8", "fp8-block", "mxfp4a16")
_MEANT = {"4bit": "nf4", "4-bit": "nf4", "8bit": "int8", "8-bit": "int8", "llm.int8": "int8", "16bit": "none"}


class Format(click.ParamType[str]):
    """nf4, NF4, 4bit: an output format."""

    name = "FORMAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).lower()
        text = _MEANT.get(text, text)
        if text in ("bf16", "bfloat16", "fp16", "float16"):
            dtype = "bfloat16" if text.startswith("b") else "float16"
            self.fail(f"{value!r} is a dtype: for a merged model in it, give --format none --dtype {dtype}", param, ctx)
        if text not in FORMATS:
            self.fail(f"{value!r} is not one of {', '.join(FORMATS)}", param, ctx)
        return text


Decorator = Callable[[Any], Any]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order of the help text."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def flag(*names: str, text: str) -> Decorator:
    """An option without a value."""
    return click.option(*names, is_flag=True, help=text)


with_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, …")
with_offline = flag("--offline", text="Read Hub ids from the local cache only.")
with_printing = together(
    flag("--json", "as_json", text="Print one JSON object on stdout."),
    click.option(
        "--progress",
        type=click.Choice(["auto", "bar", "plain", "json", "none"]),
        default="auto",
        show_default=True,
        help="On stderr. auto: a bar in a terminal; elsewhere plain, a line every ten seconds; none with --json.",
    ),
    flag("--quiet", "-q", text="Print nothing but errors."),
    flag("--verbose", "-v", text="List every tensor; show tracebacks."),
)
with_run_options = together(
    click.option(
        "--memory", type=Size(), metavar="SIZE", help="Memory to use beyond the libraries' own.  [default: 512MB]"
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), help="Threads that convert tiles.  [default: one per processor]"
    ),
    click.option(
        "--journal-seconds",
        type=click.FloatRange(min=0),
        hidden=True,  # for tests
        help="Seconds until what is done is made durable and noted; 0: after each tensor.",
    ),
    with_device,
    flag("--overwrite", text="Replace an earlier conversion, once the new one is complete."),
    click.option("--resume/--no-resume", default=True, show_default=True, help="Resume an interrupted run."),
    with_offline,
    flag("--trust-remote-code", text="Copy the Python files that the base names; never run them."),
)
with_batch_options = together(
    flag("--strict", text="With several adapters: convert none if one is refused."),
    click.option(
        "--link",
        type=click.Choice(["auto", "hard", "reflink", "copy"]),
        default="auto",
        show_default=True,
        help="How several outputs share the shards that no adapter changes.",
    ),
    click.option(
        "--against",
        metavar="OUT",
        help="A finished output of the same base and recipe: link to its shards instead of making them.",
    ),
)
with_recipe = together(
    click.option(
        "--format",
        "--quant-type",
        "quant_type",
        type=Format(),
        metavar="FORMAT",
        default="nf4",
        show_default=True,
        help=f"Format of the linear layers: {', '.join(FORMATS)}. none: the merged model in 16 bits.",
    ),
    click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the absmax too."),
    click.option("--block-size", type=int, default=64, show_default=True, help="Values that share one absmax."),
    click.option(
        "--group-size",
        type=int,
        help="Values that share one scale in w4a16 and w8a16.  [default: 128, or what all weights allow]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Dtype of kept tensors and of compute. auto: the base's; bfloat16 for a float32 base.",
    ),
    click.option(
        "--merge-precision",
        type=click.Choice(["float32", "reference"]),
        default="float32",
        show_default=True,
        help="float32: quantize the exact sum. reference: the same bytes as PEFT's merge, then transformers.",
    ),
    click.option("--keep", metavar="PATTERN", multiple=True, help="Modules to leave in 16 bits: glob, or last parts."),
    click.option(
        "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest size of one output file."
    ),
)


@dataclass(frozen=True)
class Printing:
    """What is printed of a result."""

    quiet: bool
    verbose: bool
    as_json: bool
    progress: Kind


def take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some options, taken out of the others."""
    return {name: options.pop(name) for name in names}


def printing_from(options: dict[str, Any]) -> Printing:
    """What `with_printing` adds, taken out of the options."""
    printing = Printing(**take(options, "quiet", "verbose", "as_json", "progress"))
    silent = printing.quiet or (printing.as_json and printing.progress == "auto")
    return replace(printing, progress="none") if silent else printing


def recipe_from(options: dict[str, Any]) -> Recipe:
    """What `with_recipe` adds, taken out of the options."""
    from converter.recipe import Recipe

    return Recipe(**take(options, *(field.name for field in fields(Recipe))))


def run_options_from(options: dict[str, Any]) -> RunOptions:
    """What `with_run_options` adds, taken out of the options."""
    from converter.job import RunOptions

    resources = _resources(**take(options, "memory", "threads", "journal_seconds"))
    return RunOptions(resources, **take(options, "device", "overwrite", "offline", "trust_remote_code", "resume"))


def _resources(**given: Any) -> Resources:
    from converter.cli.surroundings import refuse_without_memory
    from converter.resources import Resources

    refuse_without_memory()
    return Resources(**{name: value for name, value in given.items() if value is not None})
