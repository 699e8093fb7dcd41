"""`convert evaluate OUT`: how well does it predict a text, and how far is it from the 16-bit model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from converter.cli.options import (
    PRINTING,
    REPORT,
    REVISIONS,
    adapters_from,
    base_and_adapter,
    flag,
    one_output,
    printing_from,
    take,
    with_device,
    with_help,
    with_offline,
    with_out_again,
    with_pickle,
)
from converter.cli.report import write_page
from converter.cli.values import Place, Size
from converter.cli.watch import watch_run

EXAMPLES = """\b
Examples:
  convert evaluate OUT --text T.txt
  convert evaluate OUT --text T.jsonl \\
    --base X --adapter Y --max-kl 0.05
Exit code:
  0 measured, and no gate is missed
  2 refused: the message says why
  3 base or adapter is missing
  4 a gate is missed
"""


@cloup.command(short_help="Measure a checkpoint on a text, and against the 16-bit model.", epilog=EXAMPLES)
@click.argument("out", type=Place(), required=False)
@cloup.option_group(
    "Input",
    with_out_again,
    cloup.option(
        "--text",
        type=Place("file"),
        metavar="FILE|ADDRESS",
        required=True,
        help="Text to predict: plain, JSON lines (.jsonl), a table (.parquet), or hf://datasets/ORG/NAME/FILE.",
    ),
    cloup.option(
        "--field",
        metavar="NAME",
        help="In JSON lines: what has the text, or a list of messages.  [default: text]",
    ),
    *base_and_adapter(
        base="Compare with this base, merged in 16 bits.",
        adapter="The adapter that is merged into it. If several were combined, repeat it in the same order.",
    ),
    flag("--compare", text="Compare with the base and adapter that the receipt names."),
    *REVISIONS.values(),
    with_offline,
    with_pickle,
)
@cloup.option_group(
    "Quality",
    cloup.option(
        "--max-perplexity-ratio",
        type=float,
        metavar="X",
        help="End with exit code 4 if perplexity grows by more than this factor, such as 1.05.",
    ),
    cloup.option(
        "--max-kl", type=float, metavar="NATS", help="End with exit code 4 if the KL divergence a token is larger."
    ),
    cloup.option(
        "--min-top1",
        type=float,
        metavar="SHARE",
        help="End with exit code 4 if fewer tokens have the same likeliest one, such as 0.95.",
    ),
)
@cloup.option_group(
    "Behaviour",
    cloup.option(
        "--window",
        type=int,
        metavar="N",
        help="Tokens that the models see at a time.  [default: 2048, or as many as they take]",
    ),
    cloup.option("--max-tokens", type=int, metavar="N", help="Stop at so many tokens.  [default: the whole text]"),
    cloup.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        metavar="DTYPE",
        default="float32",
        show_default=True,
        help="What is computed in: float32, bfloat16, float16.",
    ),
    cloup.option(
        "--memory",
        type=Size(),
        metavar="SIZE",
        help="Memory for activations and logits, besides one layer's weights.  [default: 1GB]",
    ),
    cloup.option(
        "--scratch",
        type=Place(),
        metavar="PATH",
        help="Folder for activations that don't fit into the memory. After each layer they are saved there, too: the "
        "same command resumes an interrupted run.  [default: the system's, and nothing is resumed]",
    ),
    with_device,
    REPORT,
    *PRINTING,
    with_help,
)
def evaluate(out: str | None, also_out: str | None, **options: Any) -> None:
    """Measure perplexity on a text and, against the 16-bit model, KL divergence, top-1 agreement, perplexity ratio.

    One layer is in memory at a time, so neither model has to fit.
    """
    place = one_output(out, also_out, "convert evaluate OUT --text FILE")
    from converter.api import evaluate as measure
    from converter.cli.heap import keep_small
    from converter.cli.printing import print_text
    from converter.cli.show.evaluation import evaluation_json, evaluation_text
    from converter.cli.show.progress import display
    from converter.cli.show.words import json_text
    from converter.cli.surroundings import refuse_without_memory
    from converter.gates import QualityGates
    from converter.page import evaluation_page

    refuse_without_memory()
    keep_small()  # else freed layers stay: on a model of 1.1 B, twice as much memory was taken
    printing, adapter = printing_from(options), adapters_from(options)
    gates = QualityGates(**take(options, "max_perplexity_ratio", "max_kl", "min_top1"))
    stop = click.get_current_context().obj
    watch = watch_run(printing, place)
    with display(printing.progress) as shown:
        told = watch.beside(shown).progress
        found = measure(place, adapter=adapter, gates=gates, progress=told, stop=stop, **options)
    figures = evaluation_json(found)
    watch.result(figures)
    if printing.report is not None:
        write_page(printing.report, evaluation_page(figures, Path(place).expanduser().resolve().name, gates))
    if printing.as_json:
        print_text(json_text(figures))
    elif not printing.quiet or not found.is_good:
        print_text(evaluation_text(Path(place), found))
    if not found.is_good:
        raise click.exceptions.Exit(4)
