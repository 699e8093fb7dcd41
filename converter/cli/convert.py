"""`convert --base X --adapter Y --out Z`: one conversion, its plan, or one output for each of several adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from click.core import ParameterSource

from converter.cli.batch import run_batch
from converter.cli.config import config_text, with_config, with_print_config
from converter.cli.options import (
    CALIBRATION,
    COMBINATION,
    GATES,
    LINKS,
    MAX_SHARD_SIZE,
    PRINTING,
    QUALITY,
    REFERENCE,
    REPORT,
    RESOURCES,
    REVISIONS,
    STORES,
    Printing,
    flag,
    gates_from,
    printing_from,
    recipe_from,
    refuse_report,
    run_options_from,
    take,
    with_foreign_files,
    with_help,
    with_offline,
    with_overwrite,
    with_pickle,
    with_resume,
    with_strict,
)
from converter.cli.report import write_report, write_report_of_failure
from converter.cli.values import Place
from converter.cli.watch import watch_run

if TYPE_CHECKING:
    from converter.job import Adapters, Job
    from converter.recipe import Recipe

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".tif", ".tiff", ".bmp")
EXAMPLES = """\b
Examples:
  convert --base X --adapter Y --out Z
  convert --base X --format fp8 --out Z
  convert --adapter Y --dry-run
"""


class Commands(cloup.Group):
    """The commands; what is none of them may be a path that lacks its option."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and ("/" in name or Path(name).exists()):
            if name.lower().endswith(PICTURES):
                ctx.fail(f"{name!r} is a picture: this is the converter of models, not ImageMagick.")
            ctx.fail(f"{name!r} is no command. Give a model as --base, an adapter as --adapter, the result as --out.")
        return super().resolve_command(ctx, args)


@cloup.group(
    cls=Commands,
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    epilog=EXAMPLES,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # both spellings
        "max_content_width": 100,
    },
)
@cloup.option_group(
    "Input",
    cloup.option(
        *("--base", "--model", "base"), **REFERENCE, help="Base model.  [default: the one that the adapter names]"
    ),
    cloup.option(
        *("--adapter", "adapters"),
        type=Place(),
        metavar="[NAME=]PATH|ID",
        multiple=True,
        help="PEFT adapter. Without one, only quantize. Give several, or a glob, to make OUT/NAME for each; "
        "--combine makes one output of them.",
    ),
    *REVISIONS.values(),
    with_offline,
    with_foreign_files,
    with_pickle,
)
@cloup.option_group(
    "Output",
    cloup.option(
        *("--out", "-o", "--output", "out"),
        type=Place(),
        metavar="PATH|ADDRESS",
        help="Folder to write, or hf://ORG/NAME[@BRANCH], s3://BUCKET/PREFIX, gs://, az://, "
        "models:/NAME[@ALIAS]. It appears only when it is complete.",
    ),
    with_overwrite,
    MAX_SHARD_SIZE,
    cloup.option(
        "--card",
        type=Place("file"),
        metavar="FILE",
        help="Your own text for the model card: Markdown, without metadata.",
    ),
    REPORT,
    *LINKS,
    *STORES,
)
@cloup.option_group("Several adapters into one", *COMBINATION)
@cloup.option_group("Quality", *QUALITY, *CALIBRATION, *GATES)
@cloup.option_group("Resources", *RESOURCES)
@cloup.option_group(
    "Behaviour",
    with_config,
    with_print_config,
    flag("--dry-run", text="Print the plan; write nothing, download no shard."),
    with_resume,
    with_strict,
    *PRINTING,
    click.version_option(package_name="nf4-converter", help="Print the version."),
    with_help,
)
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Merge an adapter into a base and write a checkpoint that is ready to serve."""
    if (command := context.invoked_subcommand) is not None:
        refuse_dropped(context, command, options)
        return
    if all(context.get_parameter_source(name) is ParameterSource.DEFAULT for name in options):
        click.echo(short_help(context), err=True)
        raise click.exceptions.Exit(2)
    if options["print_config"]:
        click.echo(config_text(context), nl=False)
        return
    del options["config"], options["print_config"]
    adapters, dry_run = options.pop("adapters"), options.pop("dry_run")
    options["card"], options["gates"] = card_text(options["card"]), gates_from(options)
    if not options["base"] and not adapters:
        raise click.UsageError("Give --base, or an --adapter that names its base.")
    if not options["out"] and not dry_run:
        raise click.UsageError("Give --out, or --dry-run.")
    of_store = take(options, "work", "disk", "create_pr")
    of_batch, printing = take(options, "strict", "link", "against"), printing_from(options)
    if (is_named(adapters) and options["combine"] is None) or of_batch["against"] is not None:
        refuse_store(options["out"], of_store)
        if options.pop("calibrate") is not None:
            raise click.UsageError("--calibrate goes with one output: convert each adapter by itself.")
        jobs = jobs_from(adapters, options)
        run_batch(context.obj, jobs, run_options_from(options), of_batch, printing, dry_run=dry_run)
        return
    recipe = recipe_from(options)
    what: dict[str, Any] = {"adapter": adapter_of(adapters, recipe), "recipe": recipe}
    what |= vars(run_options_from(options)) | of_store
    del what["open_device"]
    if dry_run:
        refuse_report(printing)
        print_plan(printing, what | options)
        return

    from converter.api import convert
    from converter.cli.heap import keep_small
    from converter.cli.printing import print_text
    from converter.cli.show.progress import display
    from converter.cli.show.summary import summary, summary_json
    from converter.cli.show.words import json_text
    from converter.errors import GateFailed
    from converter.samples import Samples

    keep_small()
    watch = watch_run(printing, options["out"])
    samples = Samples() if printing.report is not None else None
    with display(printing.progress) as display_:
        shown = watch.beside(display_, samples)
        try:
            report = convert(**what, **options, progress=shown.progress, stop=context.obj)
        except GateFailed as failed:
            if printing.report is not None and samples is not None:
                write_report_of_failure(failed, options["out"], printing.report, options["gates"], samples.ended())
            raise
    watch.result(summary_json(report, shown.seconds()))
    if printing.report is not None and samples is not None:
        taken = () if report.nothing_to_do else samples.ended()
        receipt = None if report.store is None else report.store.receipt
        write_report(report.label, printing.report, options["gates"], taken, receipt)
    if printing.as_json:
        print_text(json_text(summary_json(report, shown.seconds())))
    elif not printing.quiet:
        print_text(summary(report, shown.seconds(), verbose=printing.verbose))


def refuse_store(out: str | None, of_store: Mapping[str, Any]) -> None:
    """Several outputs go to folders."""
    from converter.read.addresses import path_of

    if (out is not None and path_of(out) is None) or any(of_store.values()):
        raise click.UsageError("Several outputs go to folders: give a folder as --out, or convert each by itself.")


def refuse_dropped(context: click.Context, command: str, options: Mapping[str, Any]) -> None:
    """Options before a command are those of a conversion, and the command would know nothing of them."""
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    names = [option.opts[0] for option in context.command.params if option.name in given]
    if names:
        raise click.UsageError(
            f"{', '.join(names)} before {command}: of a conversion, which {command} is not. Options of {command} come "
            f"after it; convert {command} --help lists them."
        )


def short_help(context: click.Context) -> str:
    """What is printed where nothing is asked for."""
    formatter, command = context.make_formatter(), context.command
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    if isinstance(command, cloup.Group):
        command.format_commands(context, formatter)
    command.format_epilog(context, formatter)
    return f"{formatter.getvalue()}\nconvert --help lists every option."


def print_plan(printing: Printing, asked: dict[str, Any]) -> None:
    """Print what `convert` would do."""
    from converter.api import plan_conversion
    from converter.cli.printing import print_text
    from converter.cli.show.plan import plan_text
    from converter.cli.show.words import json_text

    del asked["resume"], asked["card"], asked["gates"], asked["check_tiles"]
    dry_run = plan_conversion(**asked)
    if printing.as_json:
        print_text(json_text(dry_run.as_json()))
    elif not printing.quiet:
        print_text(plan_text(dry_run, verbose=printing.verbose))


def adapter_of(adapters: Sequence[str], recipe: Recipe) -> Adapters | None:
    """The one that is merged, or all that are combined."""
    if recipe.combine is not None:
        return tuple(adapters)
    return adapters[0] if adapters else None


def is_named(adapters: Sequence[str]) -> bool:
    """Whether each adapter's output lies under OUT by the adapter's name."""
    if len(adapters) == 1 and set("=*?[") & set(adapters[0]):  # of a folder of adapters, one is meant
        from converter.batch.jobs import are_named

        return are_named(adapters)
    return len(adapters) > 1


def jobs_from(adapters: Sequence[str], options: dict[str, Any]) -> list[Job]:
    """A job for each adapter; takes what a job says out of the options."""
    from converter.batch.jobs import named_jobs
    from converter.job import Job

    recipe = recipe_from(options)
    base, out, of_base, of_adapter, card, gates = take(
        options, "base", "out", "base_revision", "adapter_revision", "card", "gates"
    ).values()
    if of_adapter is not None and len(adapters) > 1:
        raise click.UsageError("--adapter-revision goes with one --adapter; `convert batch` takes one for each.")
    folder = Path(out or "OUT")
    if is_named(adapters) and recipe.combine is None:
        jobs = named_jobs(adapters, folder, base, recipe, of_base, of_adapter)
        return [replace(job, card=card, gates=gates) for job in jobs]
    return [Job(folder, adapter_of(adapters, recipe), base, recipe, of_base, of_adapter, card, gates)]


def card_text(file: str | None) -> str:
    """The text of `--card`."""
    if file is None:
        return ""
    try:
        text = Path(file).expanduser().read_text()
    except (OSError, UnicodeDecodeError, RuntimeError) as exc:
        raise click.UsageError(f"--card {file}: {getattr(exc, 'strerror', None) or exc}") from exc
    if text.startswith("---"):
        raise click.UsageError(f"--card {file}: begins with metadata; the card has its own, so give text only")
    return text
