"""`convert verify OUT`: is it complete, unchanged, loadable, and what its base and adapter give?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.options import Share, flag, printing_from, with_device, with_offline, with_printing


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH|ID", help="Make OUT again from this base, and compare.")
@click.option("--base-revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option("--adapter", metavar="PATH|ID", help="The adapter that is merged in.")
@click.option("--adapter-revision", metavar="REV", help="Branch, tag or commit of an adapter on the Hub.")
@flag("--compare", text="Make OUT again from the base and adapter that its receipt names, and compare.")
@flag("--require-receipt", text="Fail if OUT has no receipt.")
@click.option("--sample", type=Share(), default="100%", show_default=True, help="Share of the tensors to make again.")
@with_device
@with_offline
@with_printing
def verify(out: Path, **options: Any) -> None:
    """Check a checkpoint: its digests, structure and values, and whether base and adapter give its bytes.

    Exit code: 0 verified, 1 something differs, 2 OUT is no checkpoint, 3 base or adapter is needed and can't be had.
    """
    from converter.cli.printing import print_text
    from converter.cli.show.progress import display
    from converter.cli.show.verification import verification_json, verification_text
    from converter.cli.show.words import json_text
    from converter.cli.surroundings import refuse_without_memory
    from converter.verification import verify as look

    refuse_without_memory()
    printing = printing_from(options)
    with display(printing.progress) as shown:
        found = look(out, progress=shown.progress, **options)
    if printing.as_json:
        print_text(json_text(verification_json(found)))
    elif not printing.quiet or not found.is_good:
        print_text(verification_text(out, found))
    if not found.is_good:
        raise click.exceptions.Exit(1)
