"""`convert sign OUT --key KEY`, `convert provenance OUT`: who made it, and of what."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from converter.cli.options import with_help
from converter.cli.values import Place

OUTPUT = click.argument("output", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
EXAMPLES = """\b
Examples:
  openssl ecparam -name prime256v1 \\
    -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout \\
    -out key.pub
  convert sign OUT --key key.pem
  convert verify OUT \\
    --signature OUT.sig \\
    --public-key key.pub
"""


@cloup.command(short_help="Sign an output with a key, as OpenSSF model signing does.", epilog=EXAMPLES)
@OUTPUT
@cloup.option_group(
    "Signature",
    cloup.option(
        "--key",
        type=Place("file"),
        metavar="FILE",
        required=True,
        help="Private key of an elliptic curve, in PEM, without a password.",
    ),
    cloup.option(
        *("--out", "-o", "--output", "file"),
        type=Place("file"),
        metavar="FILE",
        help="File to write.  [default: OUT.sig, beside OUT]",
    ),
)
@cloup.option_group("Behaviour", with_help)
def sign(output: Path, key: str, file: str | None) -> None:
    """Sign every file of OUT but its card. What is not as its receipt says is not signed."""
    from converter.cli.printing import print_text
    from converter.cli.show.words import from_here, text_of
    from converter.signing import sign as write

    target = _target(output, file, ".sig")
    write(output, Path(key).expanduser(), target)
    print_text(text_of([f"{from_here(target)}: check it with convert verify OUT --signature FILE --public-key KEY"]))


@cloup.command(short_help="Write what an output was made of, as an in-toto statement.")
@OUTPUT
@cloup.option_group(
    "Statement",
    cloup.option(
        "--builder", metavar="URI", help="Who runs the conversion, such as the URI of a workflow.  [default: unnamed]"
    ),
    cloup.option(
        *("--out", "-o", "--output", "file"),
        type=Place("file"),
        metavar="FILE",
        help="File to write.  [default: OUT.provenance.json, beside OUT]",
    ),
)
@cloup.option_group("Behaviour", with_help)
def provenance(output: Path, builder: str | None, file: str | None) -> None:
    """Write a SLSA provenance, from the receipt: files by sha256, base and adapter, recipe, versions.

    It has no times, so who makes OUT again gets the same statement.
    """
    from converter.cli.printing import print_text
    from converter.cli.show.words import from_here, text_of
    from converter.provenance import BUILDER, statement_of
    from converter.provenance import text_of as text_of_statement
    from converter.write.durable import LOCAL_DISK

    target = _target(output, file, ".provenance.json")
    LOCAL_DISK.put(target, text_of_statement(statement_of(output, builder or BUILDER)).encode())
    print_text(text_of([f"{from_here(target)}: check it with convert verify OUT --provenance FILE"]))


def _target(output: Path, file: str | None, suffix: str) -> Path:
    whole = output.expanduser().resolve()
    return whole.with_name(f"{whole.name}{suffix}") if file is None else Path(file).expanduser()
