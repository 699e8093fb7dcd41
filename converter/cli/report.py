"""`convert report OUT`: one HTML file about a finished output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from converter.cli.options import GATES, gates_from, with_help
from converter.cli.values import Place

if TYPE_CHECKING:
    from converter.batch.outcomes import Outcome
    from converter.errors import GateFailed
    from converter.samples import Sample

IN_STAGING = "report.html"
EXAMPLES = """\b
Examples:
  convert report OUT
  convert report OUT --out report.html
  convert report OUTS --min-survival 0.9
  convert report hf://ORG/NAME
"""


@cloup.command(short_help="Write one HTML file about an output, or a folder of outputs.", epilog=EXAMPLES)
@click.argument("out", metavar="OUT", type=Place())
@cloup.option_group(
    "Output",
    cloup.option(
        *("--out", "-o", "--output", "file"),
        type=Place("file"),
        metavar="FILE",
        help="File to write.  [default: OUT-report.html, beside OUT]",
    ),
)
@cloup.option_group("Quality", *GATES, help="What the report holds the figures against.")
@cloup.option_group("Behaviour", with_help)
def report(out: str, file: str | None, **options: Any) -> None:
    """Write a report: verdict, gates, inputs, sizes, error and survival by layer and module, the worst tensors.

    Of a folder of outputs: survival by adapter, own and shared bytes. OUT may be an address, such as hf://ORG/NAME. The
    file needs nothing else: no script, no font, no network.
    """
    from converter.cli.printing import print_text
    from converter.cli.show.words import from_here, text_of

    target = Path(file).expanduser() if file is not None else beside(out)
    write_report(out, target, gates_from(options))
    print_text(text_of([f"{from_here(target)}: open it in a browser"]))


def beside(out: str) -> Path:
    """Where the report of an output is written: beside it, because the receipt lists every file inside it. Of what lies
    in a store: in the current folder."""
    from converter.read.addresses import path_of

    path = path_of(out)
    if path is None:
        return Path.cwd() / f"{_last(out)}-report.html"
    whole = path.expanduser().resolve()
    return whole.with_name(f"{whole.name}-report.html")


def write_report(
    out: str, file: Path, gates: Any, samples: Sequence[Sample] = (), receipt: dict[str, Any] | None = None
) -> None:
    """Write the report of a finished output, or of the outputs that a folder holds. `samples` are those of the run that
    has just made it, `receipt` is its, if it is known. `ConversionRefused` without a receipt, `WriteFailed`."""
    from converter.errors import ConversionRefused
    from converter.page import Made, batch_page, page
    from converter.read.addresses import path_of
    from converter.read.folder import LocalFolder
    from converter.seal.receipt import RECEIPT, parse_receipt, read_receipt
    from converter.write.stores.reading import small_file

    path = path_of(out)
    if path is None:
        receipt = receipt or parse_receipt(small_file(out, RECEIPT))
        if receipt is None:
            raise ConversionRefused(f"{out}: its {RECEIPT} is none of this tool; convert it anew")
        write_page(file, page(receipt, _last(out), gates, samples))
        return
    folder = LocalFolder(path.expanduser()).path
    receipt, name = read_receipt(folder), folder.resolve().name
    if receipt is not None:
        text = page(receipt, name, gates, samples)
    else:
        inner = {path.name: read_receipt(path) for path in sorted(folder.iterdir()) if path.is_dir()}
        several = [Made(called, found, gates) for called, found in inner.items() if found is not None]
        if not several:
            raise ConversionRefused(f"{out}: no {RECEIPT} of this tool, so nothing is known of it; convert it anew")
        text = batch_page(several, name)
    write_page(file, text)


def write_batch_report(outcomes: Sequence[Outcome], file: Path, samples: Sequence[Sample]) -> None:
    """Write the report of a batch that has just ended: of each output that is there, and of what is not made."""
    from converter.page import Made, batch_page
    from converter.seal.receipt import read_receipt

    made: list[Made] = []
    not_made: dict[str, str] = {}
    for outcome in outcomes:
        job = outcome.job
        # An output that was there before the run, and misses a gate, is still there.
        is_there = outcome.is_good or (outcome.is_below_gate and job.out.is_dir())
        receipt = read_receipt(job.out) if is_there else None
        if receipt is None:
            not_made[job.label] = outcome.why
        else:
            made.append(Made(job.label, receipt, job.gates))
    write_page(file, batch_page(made, file.stem, not_made, samples))


def write_report_of_failure(failed: GateFailed, out: str, file: Path, gates: Any, samples: Sequence[Sample]) -> None:
    """Write the report of an output that misses a gate, to the file and into its staging folder."""
    from converter.page import page

    if failed.receipt is None or failed.staging is None:
        write_report(out, file, gates)  # OUT was there already
        return
    text = page(failed.receipt, _last(out), gates, samples)
    write_page(Path(failed.staging) / IN_STAGING, text)
    write_page(file, text)


def _last(out: str) -> str:
    """What an output is called."""
    return out.rstrip("/").rpartition("/")[2] if "://" in out else Path(out).expanduser().resolve().name


def write_page(file: Path, text: str) -> None:
    """Write a page of HTML. `WriteFailed`."""
    from converter.write.durable import writing

    with writing(file, len(text)):
        file.write_text(text, "utf-8")
