"""`convert pipeline job.toml`: from registry to server, published only if the gates are passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import cloup

from converter.cli.options import (
    PRINTING,
    RESOURCES,
    flag,
    printing_from,
    run_options_from,
    with_foreign_files,
    with_help,
    with_offline,
    with_overwrite,
    with_pickle,
    with_resume,
)
from converter.cli.values import Part, Place
from converter.cli.watch import watch_run

EXAMPLES = """\b
Examples:
  convert pipeline job.toml
  convert pipeline job.toml --events -
A job.toml:
  base = "ORG/BASE"
  adapter = "ORG/LORA"
  out = "s3://BUCKET/MODEL"
  min_survival = 0.9
  [evaluate]
  text = "held-out.jsonl"
  max_kl = 0.05
Exit code:
  0 published, or nothing to do
  1 a step failed
  2 refused: the message says why
  3 base or adapter is missing
  4 a gate is missed
"""


@cloup.command(short_help="Fetch, convert, verify, hold the gates, publish, announce.", epilog=EXAMPLES)
@click.argument("jobs", metavar="FILE", type=click.Path(path_type=Path))
@cloup.option_group(
    "Input",
    cloup.option("--slice", "part", type=Part(), metavar="I/N", help="Take the I-th of N parts of the jobs, from 1."),
    with_offline,
    with_foreign_files,
    with_pickle,
)
@cloup.option_group(
    "Output",
    with_overwrite,
    flag("--create-pr", text="With hf:// as out: open a pull request instead of committing."),
    cloup.option(
        "--work",
        type=Place(),
        metavar="DIR",
        help="Where outputs are made, and state.json says what is done.  [default: FILE.work, beside FILE]",
    ),
    cloup.option(
        "--events",
        metavar="FILE|-",
        help="Append a JSON line for each step that begins or ends. -: to stdout, which then has nothing else.",
    ),
)
@cloup.option_group("Resources", *RESOURCES)
@cloup.option_group("Behaviour", with_resume, *PRINTING, with_help)
@click.pass_obj
def pipeline(
    stop: Callable[[], int | None],
    /,
    jobs: Path,
    *,
    part: tuple[int, int] | None,
    work: str | None,
    events: str | None,
    create_pr: bool,
    **options: Any,
) -> None:
    """Make the outputs that a file of jobs asks for and publish what is good: fetch, convert, verify, gates, publish,
    announce.

    Nothing is published that fails a check or misses a gate. The same command resumes, and does nothing if all is done.
    """
    from converter.batch.job_file import read_file
    from converter.batch.jobs import slice_of
    from converter.cli.heap import keep_small
    from converter.cli.printing import print_text
    from converter.cli.show.pipeline import EventLines, pipeline_json, pipeline_text
    from converter.cli.show.progress import display
    from converter.cli.show.words import json_text
    from converter.delivery.delivery import DeliveryObserver, Event, deliver, exit_code_of
    from converter.errors import printable

    printing = printing_from(options)
    if events == "-" and printing.as_json:
        raise click.UsageError("--events - and --json both write to stdout: give a file to --events")
    asked = read_file(jobs, stores=True)
    if part is not None:
        kept = slice_of([one.job for one in asked], *part)
        asked = [one for one in asked if any(one.job is job for job in kept)]
    folder = Path(work).expanduser() if work is not None else jobs.with_name(f"{jobs.name}.work")
    terms = replace(run_options_from(options), create_pr=create_pr)
    keep_small()
    watch = watch_run(printing, jobs)
    with EventLines(events) as lines, display(printing.progress, outputs=len(asked)) as display_:
        shown = watch.beside(display_)

        def hear(event: Event) -> None:
            lines.write(event)
            if event.state == "failed":
                shown.ended(printable(event.out), event.reason.removeprefix(f"{event.out}: "))
            elif event.step == "announce" and event.state != "began":
                shown.ended(printable(event.out), None)

        outputs, state = deliver(asked, folder, terms, DeliveryObserver(shown.progress, stop, hear))
    watch.result(pipeline_json(outputs, state, shown.seconds()))
    if printing.as_json:
        print_text(json_text(pipeline_json(outputs, state, shown.seconds())))
    elif not printing.quiet and events != "-":
        print_text(pipeline_text(outputs, state, shown.seconds()))
    if (code := exit_code_of(outputs)) != 0:
        raise click.exceptions.Exit(code)
