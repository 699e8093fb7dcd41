"""The options that several commands share, and the values that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from converter.cli.values import FORMATS, Format, Place, Size

if TYPE_CHECKING:
    from converter.calibration import Calibration
    from converter.cli.show.progress import Kind
    from converter.combination import Combination
    from converter.gates import Gates
    from converter.job import RunOptions
    from converter.recipe import Recipe
    from converter.resources import Resources

Decorator = Callable[[Any], Any]


def flag(*names: str, text: str) -> Decorator:
    """An option without a value."""
    return cloup.option(*names, is_flag=True, help=text)


REFERENCE: dict[str, Any] = {"type": Place(), "metavar": "PATH|ID"}

with_device = cloup.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, …"
)
with_offline = flag("--offline", text="Read Hub ids from the local cache only.")
with_overwrite = flag("--overwrite", text="Replace an earlier conversion, once the new one is complete.")
with_resume = cloup.option("--resume/--no-resume", default=True, show_default="on", help="Resume an interrupted run.")
with_strict = flag("--strict", text="With several adapters: convert none if one is refused.")
with_foreign_files = flag("--trust-remote-code", text="Copy the Python files that the base names; never run them.")
with_pickle = flag("--allow-pickle", text="Read pickled weights, as weights only; never run them.")
with_help = click.help_option("-h", "--help", help="Print this help.")

REVISIONS: dict[str, Decorator] = {
    name: cloup.option(f"--{name}-revision", metavar="REV", help=f"Branch, tag or commit of {name} on the Hub.")
    for name in ("base", "adapter")
}


def base_and_adapter(base: str, adapter: str) -> tuple[Decorator, Decorator]:
    """Options that name what an output was made of, with their help texts."""
    return (
        cloup.option("--base", "--model", "base", **REFERENCE, help=base),
        cloup.option("--adapter", "adapters", **REFERENCE, multiple=True, help=adapter),
    )


with_out_again = cloup.option(
    "--out", "-o", "--output", "also_out", type=Place(), metavar="PATH", help="The same as OUT."
)
PRINTING: tuple[Decorator, ...] = (
    flag("--json", "as_json", text="Print one JSON object on stdout."),
    cloup.option(
        "--progress",
        type=click.Choice(["auto", "bar", "plain", "json", "none"]),
        metavar="KIND",
        default="auto",
        show_default=True,
        help="bar, plain (a line every ten seconds), json or none, on stderr. auto: a bar in a terminal, else plain; "
        "none with --json.",
    ),
    cloup.option(
        "--metrics",
        type=Place("file"),
        metavar="FILE",
        help="Write metrics for Prometheus' textfile collector, while it runs and when it ends.",
    ),
    flag("--quiet", "-q", text="Print nothing but errors."),
    flag("--verbose", "-v", text="List every tensor; show tracebacks."),
)
RESOURCES: tuple[Decorator, ...] = (
    cloup.option(
        "--memory", type=Size(), metavar="SIZE", help="Memory to use beyond the libraries' own.  [default: 512MB]"
    ),
    cloup.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads that convert tiles, at least 1.  [default: one per processor]",
    ),
    cloup.option(
        "--journal-seconds",
        type=click.FloatRange(min=0),
        hidden=True,  # for tests
        help="Seconds until what is done is made durable and noted; 0: after each tensor.",
    ),
    with_device,
    cloup.option(
        "--check-tiles",
        type=click.IntRange(min=0),
        metavar="N",
        default=50,
        show_default=True,
        help="On a GPU: make one tile in N again on the CPU and compare; 0: none.",
    ),
)
STORES: tuple[Decorator, ...] = (
    cloup.option(
        "--work",
        type=Place(),
        metavar="DIR",
        help="With an address as OUT: where its files gather.  [default: the user's cache]",
    ),
    cloup.option(
        "--disk",
        type=Size(),
        metavar="SIZE",
        help="Disk to use for OUT, or for its shards on the way to a store, and for a base on the Hub, which is then "
        "not kept.  [default: OUT or two shards of it; the base is kept in the Hub's cache]",
    ),
    flag("--create-pr", text="With hf:// as OUT: open a pull request instead of committing."),
)
REPORT = cloup.option(
    *("--report", "report"), type=Place("file"), metavar="FILE", help="Write a report of what is made: one HTML file."
)

LINKS: tuple[Decorator, ...] = (
    cloup.option(
        "--link",
        type=click.Choice(["auto", "hard", "reflink", "copy"]),
        metavar="HOW",
        default="auto",
        show_default=True,
        help="How several outputs share the shards that no adapter changes: auto, hard, reflink or copy.",
    ),
    cloup.option(
        "--against",
        type=Place(),
        metavar="OUT",
        help="A finished output of the same base and recipe: link to its shards instead of making them.",
    ),
)
MAX_SHARD_SIZE = cloup.option(
    "--max-shard-size",
    type=Size(),
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Largest size of one output file.",
)
QUALITY: tuple[Decorator, ...] = (
    cloup.option(
        "--format",
        "--quant-type",
        "quant_type",
        type=Format(),
        metavar="FORMAT",
        default="auto",
        show_default="nf4, or what a base of bitsandbytes is in",
        help=f"{', '.join(FORMATS)}. bf16 and fp16: the merged model, not quantized.",
    ),
    cloup.option("--double-quant/--no-double-quant", default=True, show_default="on", help="Quantize the absmax too."),
    cloup.option(
        "--block-size", type=int, metavar="N", default=64, show_default=True, help="Values that share one absmax."
    ),
    cloup.option(
        "--group-size",
        type=int,
        metavar="N",
        help="Values that share one scale in w4a16 and w8a16.  [default: 128, or what all weights allow]",
    ),
    flag(
        "--scale-search",
        text="Give each group the scale with the smallest squared error (w4a16, w8a16), not the library's.",
    ),
    cloup.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16"]),
        metavar="DTYPE",
        default="auto",
        show_default=True,
        help="Dtype of kept tensors and of compute: bfloat16, float16. auto: the base's; bfloat16 for a float32 base.",
    ),
    cloup.option(
        "--merge-precision",
        type=click.Choice(["float32", "reference"]),
        metavar="WHICH",
        default="float32",
        show_default=True,
        help="float32: quantize the exact sum. reference: the same bytes as PEFT's merge, then transformers.",
    ),
    cloup.option(
        "--rounding",
        type=click.Choice(["auto", "nearest", "adapter"]),
        default="auto",
        show_default=True,
        help="nearest: round to the nearest code. adapter: round so that the adapter survives (nf4, fp4, int8, w4a16, "
        "w8a16). auto: adapter where the base lies on the output's code points, else nearest.",
    ),
    cloup.option(
        "--merge-onto",
        type=click.Choice(["base", "dequantized"]),
        default="base",
        show_default=True,
        help="dequantized: what the base's NF4 codes stand for, as QLoRA trains on them; with --format bf16 or fp16.",
    ),
    cloup.option(
        "--target",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="Who loads the output. transformers: experts stay in 16 bits. vllm: experts in nf4, too, each by itself.",
    ),
    cloup.option(
        "--scale",
        type=float,
        metavar="X",
        default=1.0,
        show_default=True,
        help="Multiply the adapter's change: 0.8 merges 80 % of it.",
    ),
    cloup.option("--keep", metavar="PATTERN", multiple=True, help="Modules to leave in 16 bits: glob, or last parts."),
)

COMBINATION: tuple[Decorator, ...] = (
    cloup.option(
        "--combine",
        metavar="KIND",
        help="Make one output of several adapters, as PEFT's add_weighted_adapter: cat (the weighted sum), linear, "
        "svd, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four with _svd.",
    ),
    cloup.option(
        "--weight", "weights", type=float, metavar="X", multiple=True, help="Of each --adapter, in their order."
    ),
    cloup.option(
        "--density", type=float, metavar="SHARE", help="Share of values that ties, dare and magnitude_prune leave."
    ),
    cloup.option(
        "--majority-sign",
        metavar="HOW",
        help="Which sign wins in ties: total (of the sum, the default) or frequency.",
    ),
    cloup.option("--svd-rank", type=int, metavar="N", help="Rank of the result.  [default: the adapters' largest]"),
    cloup.option("--seed", type=int, metavar="N", help="Of what dare drops by chance.  [default: 0]"),
)

CALIBRATION: tuple[Decorator, ...] = (
    cloup.option(
        "--calibrate",
        type=Place("file"),
        metavar="FILE|ADDRESS",
        help="Choose codes by a text, JSON lines, a table, or hf://datasets/ORG/NAME/FILE, so that what the weights "
        "make of it is kept (nf4, fp4, int8, w4a16, w8a16). self: by text that the merged model writes. Takes longer.",
    ),
    cloup.option(
        "--calibrate-field", metavar="NAME", help="With JSON lines: the text's name.  [default: text, in .jsonl]"
    ),
    cloup.option("--calibrate-tokens", type=int, metavar="N", help="Tokens to read of the text.  [default: 32768]"),
    cloup.option(
        "--calibrate-window",
        type=int,
        metavar="N",
        help="Tokens that the model sees at a time.  [default: 2048, or what it takes; with self: 64]",
    ),
    cloup.option(
        "--calibrate-seed", type=int, metavar="N", help="With self: the seed by which tokens are drawn.  [default: 0]"
    ),
)

GATES: tuple[Decorator, ...] = (
    cloup.option(
        "--min-survival",
        type=float,
        metavar="SHARE",
        help="End with exit code 4, without OUT, if a tensor keeps less of the adapter's change, such as 0.9.",
    ),
    cloup.option(
        "--max-error",
        type=float,
        metavar="SHARE",
        help="End with exit code 4, without OUT, if a tensor has a larger relative error, such as 0.12.",
    ),
)


@dataclass(frozen=True)
class Printing:
    """What is printed of a result; the files of its report and of its metrics, if they are asked for."""

    quiet: bool
    verbose: bool
    as_json: bool
    progress: Kind
    report: Path | None = None
    metrics: Path | None = None


def one_output(out: str | None, also_out: str | None, usage: str) -> str:
    """The output that a command is about, given as OUT or as --out. `usage`: how the command is called."""
    given = [place for place in (out, also_out) if place is not None]
    if len(given) != 1:
        raise click.UsageError(f"Give one OUT: {usage}")
    return given[0]


def adapters_from(options: dict[str, Any]) -> list[str] | str | None:
    """What `base_and_adapter` adds of adapters, taken out of the options: several, one, or none."""
    adapters = options.pop("adapters")
    return adapters if len(adapters) > 1 else adapters[0] if adapters else None


def take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some options, taken out of the others."""
    return {name: options.pop(name) for name in names}


def printing_from(options: dict[str, Any]) -> Printing:
    """What `PRINTING` adds, taken out of the options."""
    report, metrics = (_place(options.pop(name, None)) for name in ("report", "metrics"))
    given = take(options, "quiet", "verbose", "as_json", "progress")
    printing = Printing(**given, report=report, metrics=metrics)
    silent = printing.quiet or (printing.as_json and printing.progress == "auto")
    return replace(printing, progress="none") if silent else printing


def _place(file: str | None) -> Path | None:
    return None if file is None else Path(file).expanduser()


def refuse_report(printing: Printing) -> None:
    """Refuse --report with a dry run."""
    if printing.report is not None:
        raise click.UsageError("--report needs an output, and --dry-run makes none.")


def recipe_from(options: dict[str, Any]) -> Recipe:
    """What `QUALITY` and `MAX_SHARD_SIZE` add, taken out of the options."""
    from converter.recipe import Recipe, choices_of_format

    stated = take(options, *({field.name for field in fields(Recipe)} - {"combine", "calibration"}))
    stated["combine"], stated["calibration"] = combination_from(options), calibration_from(options)
    return Recipe(**stated | choices_of_format(stated["quant_type"], stated["dtype"]))


def combination_from(options: dict[str, Any]) -> Combination | None:
    """What `COMBINATION` adds, taken out of the options."""
    from converter.combination import Combination

    kind, weights = take(options, "combine", "weights").values()
    others = take(options, "density", "majority_sign", "svd_rank", "seed")
    given = {name: value for name, value in others.items() if value is not None}
    if kind is None:
        if odd := sorted(["weight"] if weights else given):
            raise click.UsageError(f"--{odd[0].replace('_', '-')} has no meaning without --combine.")
        return None
    rank = {"rank": given.pop("svd_rank")} if "svd_rank" in given else {}
    return Combination(kind, weights, **given, **rank)


def calibration_from(options: dict[str, Any]) -> Calibration | None:
    """What `CALIBRATION` adds, if that is an option of the command; `calibrate` itself stays among the options."""
    from converter.calibration import SELF, Calibration

    stated = {name: options.pop(f"calibrate_{name}", None) for name in ("field", "tokens", "window", "seed")}
    given = {name: value for name, value in stated.items() if value is not None}
    if options.get("calibrate") == SELF:
        return Calibration.of(None, **given)
    if (text := options.get("calibrate")) is not None:
        from converter.layers.texts import text_file

        options["calibrate"] = text_file(text, offline=options.get("offline", False))
        return Calibration.of(options["calibrate"], **given)
    if given:
        raise click.UsageError(f"--calibrate-{min(given)} has no meaning without --calibrate.")
    return None


def gates_from(options: dict[str, Any]) -> Gates:
    """What `GATES` adds, taken out of the options."""
    from converter.gates import Gates

    return Gates(**take(options, "min_survival", "max_error"))


def run_options_from(options: dict[str, Any]) -> RunOptions:
    """How a conversion is run, taken out of the options."""
    from converter.job import RunOptions

    resources = _resources(**take(options, "memory", "threads", "journal_seconds"))
    of_device = take(options, "device", "check_tiles")
    of_run = take(options, "overwrite", "offline", "trust_remote_code", "resume", "allow_pickle")
    return RunOptions(resources, **of_device, **of_run)


def _resources(**given: Any) -> Resources:
    from converter.cli.surroundings import refuse_without_memory
    from converter.resources import Resources

    refuse_without_memory()
    return Resources(**{name: value for name, value in given.items() if value is not None})
