"""`convert verify OUT`: is it complete, unchanged, loadable, and what its base and adapter give?"""

from __future__ import annotations

from typing import Any

import click
import cloup

from converter.cli.options import (
    GATES,
    PRINTING,
    REVISIONS,
    adapters_from,
    base_and_adapter,
    flag,
    gates_from,
    one_output,
    printing_from,
    with_device,
    with_help,
    with_offline,
    with_out_again,
    with_pickle,
)
from converter.cli.values import Place, Share
from converter.cli.watch import watch_run

EXAMPLES = """\b
Examples:
  convert verify OUT
  convert verify OUT --compare
  convert verify OUT --base X
Exit code:
  0 verified
  1 something differs
  2 OUT is no checkpoint
  3 base or adapter is missing
  4 a gate is missed
"""


@cloup.command(short_help="Check a checkpoint, and compare it with its base and adapter.", epilog=EXAMPLES)
@click.argument("out", type=Place(), required=False)
@cloup.option_group(
    "Input",
    with_out_again,
    *base_and_adapter(
        base="Make OUT again from this base, and compare.",
        adapter="The adapter that is merged in. If several were combined, repeat it in the same order.",
    ),
    *REVISIONS.values(),
    cloup.option("--calibrate", type=Place("file"), metavar="FILE", help="The text by which OUT was calibrated."),
    with_offline,
    with_pickle,
)
@cloup.option_group(
    "Behaviour",
    flag("--compare", text="Make OUT again from the base and adapter that its receipt names, and compare."),
    flag("--require-receipt", text="Fail if OUT has no receipt."),
    cloup.option(
        "--sample", type=Share(), default="100%", show_default=True, help="Share of the tensors to make again."
    ),
    *GATES,
    cloup.option("--signature", type=Place("file"), metavar="FILE", help="Check this signature, as `sign` writes it."),
    cloup.option("--public-key", type=Place("file"), metavar="FILE", help="Public key of the signature, in PEM."),
    cloup.option(
        "--provenance", type=Place("file"), metavar="FILE", help="Check this statement, as `provenance` writes it."
    ),
    with_device,
    *PRINTING,
    with_help,
)
def verify(out: str | None, also_out: str | None, **options: Any) -> None:
    """Check a checkpoint: its digests, structure and values, and whether base and adapter give its bytes."""
    place = one_output(out, also_out, "convert verify OUT")
    from converter.api import verify as look
    from converter.cli.printing import print_text
    from converter.cli.show.progress import display
    from converter.cli.show.verification import verification_json, verification_text
    from converter.cli.show.words import json_text
    from converter.cli.surroundings import refuse_without_memory

    refuse_without_memory()
    printing = printing_from(options)
    options["adapter"] = adapters_from(options)
    watch = watch_run(printing, place)
    with display(printing.progress) as shown:
        found = look(place, gates=gates_from(options), progress=watch.beside(shown).progress, **options)
    watch.result(verification_json(found))
    if printing.as_json:
        print_text(json_text(verification_json(found)))
    elif not printing.quiet or not found.is_good:
        print_text(verification_text(place, found))
    if not found.is_good:
        raise click.exceptions.Exit(1 if found.problems else 4)
