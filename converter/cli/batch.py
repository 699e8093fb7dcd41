"""`convert batch jobs.toml`: many adapters, one pass over each base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from converter.cli.options import (
    GATES,
    LINKS,
    PRINTING,
    REPORT,
    RESOURCES,
    Printing,
    flag,
    gates_from,
    printing_from,
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
from converter.cli.report import write_batch_report
from converter.cli.values import Part
from converter.cli.watch import watch_run

if TYPE_CHECKING:
    from converter.batch.forecast import Forecast
    from converter.batch.outcomes import Outcome
    from converter.job import Job, RunOptions


EXAMPLES = """\b
Examples:
  convert batch jobs.toml
  convert batch jobs.toml --dry-run
  convert batch jobs.toml --slice 1/4
A line of a job file:
  {"base": "X", "adapter": "Y",
   "out": "Z", "format": "nf4"}
"""


@cloup.command(short_help="Convert many adapters, in one pass over each base.", epilog=EXAMPLES)
@click.argument("jobs", type=click.Path(path_type=Path))
@cloup.option_group(
    "Input",
    cloup.option(
        "--slice", "part", type=Part(), metavar="I/N", help="Convert the I-th of N parts of the jobs, from 1."
    ),
    with_offline,
    with_foreign_files,
    with_pickle,
)
@cloup.option_group("Output", with_overwrite, REPORT, *LINKS)
@cloup.option_group("Quality, of jobs that state none", *GATES)
@cloup.option_group(
    "Resources",
    *RESOURCES,
    cloup.option(
        "--ray", metavar="HOST:PORT|local", help="Run on the nodes of this Ray cluster; local: start one here."
    ),
)
@cloup.option_group(
    "Behaviour",
    flag("--dry-run", text="Plan every job; write nothing."),
    with_resume,
    with_strict,
    *PRINTING,
    with_help,
)
@click.pass_obj
def batch(stop: Callable[[], int | None], /, jobs: Path, *, part: tuple[int, int] | None, **options: Any) -> None:
    """Make a checkpoint for each job of a file: TOML or YAML with jobs, or one JSON object per line."""
    from converter.batch.job_file import read_file
    from converter.batch.jobs import slice_of
    from converter.cli.printing import note

    asked = read_file(jobs, stores=False)
    wanted = [one.job for one in asked]
    left = sorted(frozenset().union(*(one.tables for one in asked)))
    if left and not options["quiet"]:
        note(f"{jobs}: {', '.join(left)}: not done by `convert batch`; `convert pipeline {jobs}` does it")
    if part is not None:
        wanted = slice_of(wanted, *part)
    gates = gates_from(options)
    wanted = [replace(job, gates=job.gates.completed(gates)) for job in wanted]
    of_batch, printing = take(options, "strict", "link", "against"), printing_from(options)
    run_batch(stop, wanted, run_options_from(options), of_batch, printing, **options)


def run_batch(
    stop: Callable[[], int | None],
    jobs: Sequence[Job],
    how: RunOptions,
    of_batch: dict[str, Any],
    printing: Printing,
    *,
    dry_run: bool,
    ray: str | None = None,
) -> None:
    """Exit with 0 if every output is made, 1 if some are, 2 if nothing could start; 4 if only gates were missed."""
    from converter.batch.observer import BatchObserver
    from converter.batch.options import BatchOptions
    from converter.cli.heap import keep_small
    from converter.cli.printing import print_text
    from converter.cli.show.batch import batch_json, batch_text
    from converter.cli.show.progress import display
    from converter.cli.show.words import json_text
    from converter.errors import printable
    from converter.samples import Samples

    if dry_run:
        refuse_report(printing)
    if of_batch["against"] is not None:
        of_batch["against"] = Path(of_batch["against"])
    terms = BatchOptions(**vars(how), **of_batch)
    keep_small()
    # On a cluster this process sees neither the memory nor the rate of the nodes.
    samples = Samples() if printing.report is not None and ray is None else None
    watch = watch_run(printing, ", ".join(sorted({str(Path(job.label).parent) for job in jobs})))
    with display(printing.progress, outputs=len(jobs)) as display_:
        shown = watch.beside(display_, samples)

        def tell(outcome: Outcome) -> None:
            shown.ended(printable(outcome.job.label), None if outcome.is_good else outcome.why)

        forecasts: list[Forecast] = []
        foretell = forecasts.append if dry_run else None
        observer = BatchObserver(shown.progress, stop, ended=tell, foretold=foretell)
        if ray is None:
            from converter.batch.batch import convert_jobs

            outcomes = convert_jobs(jobs, terms, observer, dry_run=dry_run)
        else:
            from converter.batch.cluster.cluster import convert_on_cluster

            outcomes = convert_on_cluster(jobs, terms, ray, observer, dry_run=dry_run)
    watch.result(batch_json(outcomes, shown.seconds(), forecasts))
    if printing.report is not None:
        taken = samples.ended() if samples is not None and any(one.status == "made" for one in outcomes) else ()
        write_batch_report(outcomes, printing.report, taken)
    if printing.as_json:
        print_text(json_text(batch_json(outcomes, shown.seconds(), forecasts)))
    elif not printing.quiet:
        print_text(batch_text(outcomes, shown.seconds(), forecasts, verbose=printing.verbose))
    if not all(outcome.is_good for outcome in outcomes):
        if all(outcome.is_good or outcome.is_below_gate for outcome in outcomes):
            raise click.exceptions.Exit(4)
        begun = {"planned", "nothing to do"} if dry_run else {"made", "failed", "nothing to do"}
        raise click.exceptions.Exit(1 if any(outcome.status in begun for outcome in outcomes) else 2)
