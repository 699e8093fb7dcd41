"""`convert completion bash|zsh|fish`: a script by which a shell completes commands, options and paths."""

from __future__ import annotations

import click
import cloup

from converter.cli.options import with_help

NAMES = ("convert", "nf4-convert")
"""Under which the program is installed."""
ASKED_BY = "_CONVERT_COMPLETE"
"""The environment variable by which the script asks either of them."""

INSTALL = """\b
To use it, add one line:
bash, in ~/.bashrc:
  eval "$(nf4-convert completion bash)"
zsh, in ~/.zshrc:
  eval "$(nf4-convert completion zsh)"
fish, in ~/.config/fish/config.fish:
  nf4-convert completion fish | source
"""


@cloup.command(short_help="Print a script that makes your shell complete commands and paths.", epilog=INSTALL)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@with_help
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script by which a shell completes commands, options, folders and job files."""
    from click.shell_completion import get_completion_class

    from converter.cli.printing import print_text

    found = get_completion_class(shell)
    assert found is not None  # noqa: S101  (click has all three)
    whole = context.find_root().command
    print_text("\n".join(found(whole, {}, name, ASKED_BY).source() for name in NAMES))
