"""`convert export OUT --server vllm`: the command, packages and manifests that a server needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from converter.cli.options import with_help
from converter.cli.values import Place

EXAMPLES = """\b
Examples:
  convert export OUT --server vllm
  convert export OUT --server triton \\
    --out repository --model ORG/NAME
"""


@cloup.command(short_help="Write what a server needs to serve an output.", epilog=EXAMPLES)
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@cloup.option_group(
    "Server",
    cloup.option(
        "--server",
        type=click.Choice(["vllm", "sglang", "tgi", "triton"]),
        required=True,
        help="vllm: also manifests for Kubernetes. triton: a model repository for its vLLM backend.",
    ),
    cloup.option(
        "--model",
        metavar="PATH|ID",
        help="Where the server finds OUT: a path on its machine, or an id on the Hub.  [default: /models/NAME]",
    ),
    cloup.option(
        "--gpus", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Split it among N GPUs."
    ),
    cloup.option("--image", metavar="IMAGE", help="Container image of the server.  [default: NAME-vllm, see docs]"),
    cloup.option("--converter-image", metavar="IMAGE", help="Container image of the converter, in the job."),
)
@cloup.option_group(
    "Output",
    cloup.option(
        *("--out", "-o", "--output", "folder"),
        type=Place(),
        metavar="DIR",
        help="Folder to write, new or empty.  [default: OUT-SERVER, beside OUT]",
    ),
)
@cloup.option_group("Behaviour", with_help)
def export(output: Path, folder: str | None, *, server: str, **options: Any) -> None:
    """Write the command, the packages and the manifests that a server needs to serve OUT, or say why it can't."""
    from converter.cli.printing import print_text
    from converter.cli.show.words import from_here, text_of
    from converter.export.export import export as write
    from converter.export.served import Serving

    whole = output.expanduser().resolve()
    target = whole.with_name(f"{whole.name}-{server}") if folder is None else Path(folder).expanduser()
    given = {name: value for name, value in options.items() if value is not None}
    names = write(output, server, target, Serving(**given))
    print_text(text_of([f"{from_here(target)}/{name}" for name in names]))
