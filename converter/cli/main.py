"""The command line: arguments in, call the library, print, exit code.

Heavy libraries are imported after the arguments are parsed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from converter.batch.forecast import Forecast
    from converter.batch.members import Outcome
    from converter.job import Job
    from converter.recipe import Recipe
    from converter.resources import Resources

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Size(click.ParamType[int]):
    """5GB, 500MB, 512MiB: bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if found is None or found[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5GB or 512MiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


class _Share(click.ParamType[float]):
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


class _Part(click.ParamType[tuple[int, int]]):
    """2/4: the second of four parts."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if found is None:
            self.fail(f"{value!r} is not a part such as 1/4", param, ctx)
        return int(found[1]), int(found[2])


def _all_of(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Options that several commands have."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_how_to_run = _all_of(
    click.option("--memory", type=_Size(), metavar="SIZE", help="Bytes above the libraries' own.  [default: 512MB]"),
    click.option("--threads", type=click.IntRange(min=1), help="That convert tiles.  [default: one a processor]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, …"),
    click.option("--overwrite", is_flag=True, help="Replace an earlier conversion, once the new one is whole."),
    click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with what a run left that died."),
    click.option("--offline", is_flag=True, help="Take Hub ids from the local cache only."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Copy the Python files that the base names; never run them."
    ),
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--verbose", "-v", is_flag=True, help="List every tensor; show tracebacks."),
)
_of_batches = _all_of(
    click.option("--strict", is_flag=True, help="Of several: convert none if one is refused."),
    click.option(
        "--link",
        type=click.Choice(["auto", "hard", "reflink", "copy"]),
        default="auto",
        show_default=True,
        help="How several outputs have the shards that no adapter changes.",
    ),
    click.option(
        "--against",
        type=click.Path(path_type=Path),
        metavar="OUT",
        help="A finished output of the same base and recipe, to link to its shards instead of making them.",
    ),
)


@click.group(
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # both spellings
        "max_content_width": 100,
    },
)
@click.option(
    "--base", metavar="PATH|ID", help="Base model: folder or Hub id. Default: the one that the adapter names."
)
@click.option("--base-revision", metavar="REV", help="Its branch, tag or commit on the Hub.")
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]PATH|ID",
    multiple=True,
    help="PEFT LoRA adapter: folder or Hub id. Default: only quantize. Several: an output each, under OUT by its name.",
)
@click.option("--adapter-revision", metavar="REV", help="Its branch, tag or commit on the Hub.")
@click.option("--out", metavar="PATH", help="Folder to write; it appears only whole.")
@click.option(
    "--quant-type",
    type=click.Choice(["nf4", "fp4", "int8", "none"]),
    default="nf4",
    show_default=True,
    help="Of the linear layers; none: the merged model in 16 bits.",
)
@click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the absmax, too.")
@click.option("--block-size", type=int, default=64, show_default=True, help="Values that share one absmax.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the tensors that stay, and of compute. auto: the base's, bfloat16 for a float32 base.",
)
@click.option(
    "--merge-precision",
    type=click.Choice(["float32", "reference"]),
    default="float32",
    show_default=True,
    help="float32: quantize the exact sum. reference: the bytes of PEFT's merge, then transformers.",
)
@click.option("--keep", metavar="PATTERN", multiple=True, help="Modules to leave in 16 bits: glob, or last parts.")
@click.option("--max-shard-size", type=_Size(), default="5GB", show_default=True, help="Bytes in one output file.")
@_how_to_run
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing, download no shard.")
@_of_batches
@click.version_option(package_name="nf4-converter")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    r"""Merge a LoRA adapter into a base model and write a quantized checkpoint, in one streaming pass.

    \b
    convert --base X --adapter Y --out Z
    """
    if context.invoked_subcommand is not None:
        return
    adapters, of_batches = options.pop("adapters"), _take_of_batches(options)
    if not options["base"] and not adapters:
        raise click.UsageError("Give --base, or an --adapter that names its base.")
    if not options["out"] and not options["dry_run"]:
        raise click.UsageError("Give --out, or --dry-run.")
    if _is_named(adapters) or of_batches["against"] is not None:
        _convert_several(adapters, of_batches, **options)
        return
    options["adapter"] = adapters[0] if adapters else None
    (_dry_run if options.pop("dry_run") else _convert)(**options)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH|ID", help="Make it again from this base, and compare.")
@click.option("--base-revision", metavar="REV", help="Its branch, tag or commit on the Hub.")
@click.option("--adapter", metavar="PATH|ID", help="The adapter that is merged in.")
@click.option("--adapter-revision", metavar="REV", help="Its branch, tag or commit on the Hub.")
@click.option("--sample", type=_Share(), default="100%", show_default=True, help="Of the tensors that are made again.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, …")
@click.option("--offline", is_flag=True, help="Take Hub ids from the local cache only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def verify(out: Path, *, quiet: bool, as_json: bool, **options: Any) -> None:
    """Look at a checkpoint: digests, structure, values; and whether base and adapter give its bytes."""
    from converter.cli.show import json_text, progress_bar, verification_json, verification_text
    from converter.cli.surroundings import refuse_without_memory
    from converter.verify import verify as look

    refuse_without_memory()
    del options["verbose"]  # read from the command line itself
    with progress_bar(shown=not quiet and not as_json) as (progress, _):
        found = look(out, progress=progress, **options)
    if as_json:
        _print(json_text(verification_json(found)))
    elif not quiet or not found.is_good:
        _print(verification_text(out, found))
    if not found.is_good:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("jobs", type=click.Path(path_type=Path))
@click.option("--slice", "part", type=_Part(), metavar="I/N", help="Of the jobs, the I-th of N parts, from 1.")
@click.option("--ray", metavar="HOST:PORT|local", help="On the nodes of this Ray cluster; local: start one here.")
@click.option("--dry-run", is_flag=True, help="Plan every job; write nothing.")
@_how_to_run
@_of_batches
def batch(jobs: Path, *, part: tuple[int, int] | None, **options: Any) -> None:
    r"""Make a checkpoint for each job of a file: TOML with [[jobs]], or a JSON object a line.

    \b
    {"base": "X", "adapter": "Y", "out": "Z", "quant_type": "nf4"}
    """
    from converter.batch.jobs import read_jobs, slice_of

    wanted = read_jobs(jobs)
    if part is not None:
        wanted = slice_of(wanted, *part)
    _run_batch(wanted, _take_of_batches(options), **options)


def _take_of_batches(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `_of_batches` adds out of the options."""
    return {name: options.pop(name) for name in ("strict", "link", "against")}


def _is_named(adapters: Sequence[str]) -> bool:
    """Whether outputs lie under OUT by the adapters' names."""
    if len(adapters) == 1 and "=" in adapters[0]:
        from converter.batch.jobs import split_name

        return split_name(adapters[0])[0] is not None
    return len(adapters) > 1


def _convert_several(adapters: Sequence[str], of_batches: dict[str, Any], **options: Any) -> None:
    from converter.batch.jobs import named_jobs
    from converter.job import Job

    recipe = _recipe(options)
    base, out, base_revision = options.pop("base"), options.pop("out"), options.pop("base_revision")
    adapter_revision = options.pop("adapter_revision")
    if adapter_revision is not None and len(adapters) > 1:
        raise click.UsageError("--adapter-revision goes with one --adapter; `convert batch` takes one for each.")
    folder = Path(out or "OUT")
    if _is_named(adapters):
        jobs = named_jobs(adapters, folder, base, recipe, base_revision, adapter_revision)
    else:
        adapter = adapters[0] if adapters else None
        jobs = [Job(folder, adapter, base, recipe, base_revision, adapter_revision)]
    _run_batch(jobs, of_batches, **options)


def _run_batch(
    jobs: Sequence[Job],
    of_batches: dict[str, Any],
    *,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    ray: str | None = None,
    **options: Any,
) -> None:
    """Exit with 0 if all is made, 1 if some of it is, 2 if nothing could start."""
    from converter.batch.members import BatchOptions
    from converter.cli.heap import keep_small
    from converter.cli.show import batch_json, batch_text, json_text, progress_bar
    from converter.cli.signals import Signals
    from converter.errors import printable

    dry_run = options.pop("dry_run")
    terms = BatchOptions(_resources(options), **of_batches, **options)
    keep_small()
    stop = Signals()
    with progress_bar(shown=not quiet and not as_json) as (progress, clock):

        def tell(outcome: Outcome) -> None:
            if not outcome.is_good:
                _complain(f"{printable(outcome.job.label)}: {outcome.message}")

        how: dict[str, Any] = {"dry_run": dry_run, "progress": progress, "stop": stop, "tell": tell}
        forecasts: list[Forecast] = []
        if dry_run:
            how["foretell"] = forecasts.append
        if ray is None:
            from converter.batch.batch import convert_batch

            outcomes = convert_batch(jobs, terms, **how)
        else:
            from converter.batch.cluster.cluster import convert_on_cluster

            outcomes = convert_on_cluster(jobs, terms, ray, **how)
    if as_json:
        _print(json_text(batch_json(outcomes, clock(), forecasts)))
    elif not quiet:
        _print(batch_text(outcomes, clock(), forecasts, verbose=verbose))
    if not all(outcome.is_good for outcome in outcomes):
        begun = {"planned", "nothing to do"} if dry_run else {"made", "failed", "nothing to do"}
        raise click.exceptions.Exit(1 if any(outcome.status in begun for outcome in outcomes) else 2)


def _convert(*, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    from converter.cli.heap import keep_small
    from converter.cli.show import json_text, progress_bar, summary, summary_json
    from converter.cli.signals import Signals
    from converter.pipeline import convert

    recipe, resources = _recipe(options), _resources(options)
    keep_small()
    stop = Signals()
    with progress_bar(shown=not quiet and not as_json) as (progress, clock):
        report = convert(recipe=recipe, resources=resources, progress=progress, stop=stop, **options)
    if as_json:
        _print(json_text(summary_json(report, clock())))
    elif not quiet:
        _print(summary(report, clock(), verbose=verbose))


def _dry_run(*, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    from converter.cli.show import json_text, plan_text
    from converter.pipeline import plan_conversion

    recipe, resources = _recipe(options), _resources(options)
    del options["resume"]
    dry_run = plan_conversion(recipe=recipe, resources=resources, **options)
    if as_json:
        _print(json_text(dry_run.as_json()))
    elif not quiet:
        _print(plan_text(dry_run, verbose=verbose))


def _recipe(options: dict[str, Any]) -> Recipe:
    """Take the recipe's options out of the others."""
    from dataclasses import fields

    from converter.recipe import Recipe

    return Recipe(**{field.name: options.pop(field.name) for field in fields(Recipe)})


def _resources(options: dict[str, Any]) -> Resources:
    """Take what the conversion may use out of the options."""
    from converter.cli.surroundings import refuse_without_memory
    from converter.resources import Resources

    refuse_without_memory()
    memory, threads = options.pop("memory"), options.pop("threads")
    return Resources(memory=memory) if threads is None else Resources(memory=memory, threads=threads)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; ends the process with 0 done, 1 failed, 2 refused, 130 and 143 for signals."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "-v" in arguments or "--verbose" in arguments
    as_json = "--json" in arguments
    sys.exit(_run(lambda: cli(arguments, prog_name="convert", standalone_mode=False), verbose=verbose, as_json=as_json))


def console() -> NoReturn:
    """`main`, for a process of its own."""
    from converter.cli.surroundings import leave, settle

    settle()
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as exc:  # where there is no memory for more words, either
        with suppress(OSError):
            sys.stderr.write(f"error: {type(exc).__name__}\n")
    finally:
        leave(code)


def _run(command: Callable[[], object], *, verbose: bool, as_json: bool) -> int:
    """Run a command; its exit code. Errors become one line on stderr, and with --json an object on stdout."""
    from converter.cli.signals import Signalled

    # Read when the libraries are imported: nobody here compiles models, and no version check is wanted.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        _refuse_without_folder()
        # click gives back the code with which a command exits.
        code = command()
        return code if isinstance(code, int) else 0
    except click.ClickException as exc:
        return _say(f"{exc.format_message()} (convert --help says more)", exc.exit_code, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted: nothing was written to OUT", 130, as_json=as_json)
    except Signalled as exc:
        signal.alarm(0)
        return _say(str(exc), exc.exit_code, as_json=as_json)
    except Exception as exc:
        from converter.errors import ConverterError, printable

        if verbose:
            with suppress(OSError):
                traceback.print_exc()
        if isinstance(exc, ConverterError):
            return _say(str(exc), exc.exit_code, as_json=as_json)
        # Not foreseen, so the place where it happened is worth more than good manners; still one line.
        where = traceback.extract_tb(exc.__traceback__)[-1]
        name = f"{type(exc).__name__} in {os.path.basename(where.filename)}:{where.lineno}"  # noqa: PTH119
        return _say(f"{name}: {printable(str(exc))} (-v shows where)", 1, as_json=as_json)


def _refuse_without_folder() -> None:
    """Where the current folder is gone, a relative path leads nowhere, and a library of torch's ends the process."""
    from converter.errors import ConversionRefused

    try:
        os.getcwd()  # noqa: PTH109
    except OSError as exc:
        raise ConversionRefused(f"the current folder: {exc.strerror}; change to one that is there") from exc


def _say(message: str, code: int, *, as_json: bool) -> int:
    _complain(message)
    return _tell(message, code, as_json=as_json)


def _tell(message: str, code: int, *, as_json: bool) -> int:
    if as_json:
        with suppress(OSError):  # the exit code says it, too
            click.echo(json.dumps({"error": message, "exit_code": code}))
    return code


def _complain(message: str) -> None:
    """An error, for people. Where nobody can be told, that is no reason to do anything else."""
    with suppress(OSError):
        click.echo(f"error: {message}", err=True)


def _print(text: str) -> None:
    """Print what was asked for; `WriteFailed` where it can't be."""
    from converter.errors import WriteFailed

    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        raise  # click ends with 1, quietly: who read this far has seen enough
    except OSError as exc:
        raise WriteFailed(f"standard output: {exc.strerror or exc}") from exc
