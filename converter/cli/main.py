"""The process: arguments in, exit code out.

Heavy libraries are imported after the arguments are parsed.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

import click

from converter.cli.commands import cli
from converter.cli.printing import report_error


def main(arguments: list[str] | None = None, command: click.Command = cli) -> NoReturn:
    """Run the command line. Ends the process with 0 done, 1 failed, 2 refused, 130 and 143 for signals."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(command, arguments))


def console(command: click.Command = cli) -> NoReturn:
    """`main`, for a process of its own."""
    from converter.cli.surroundings import leave, settle

    settle()
    code = 1
    try:
        main(command=command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as exc:  # there may be no memory for more words
        with suppress(OSError):
            sys.stderr.write(f"error: {type(exc).__name__}\n")
    finally:
        leave(code)


def run(command: click.Command, arguments: list[str]) -> int:
    """Run a command; its exit code. An error becomes one line on stderr and, with --json, an object on stdout."""
    from converter.cli.signals import Signalled

    verbose, as_json = "-v" in arguments or "--verbose" in arguments, "--json" in arguments
    # Read when the libraries are imported: nobody here compiles models, and no version check is wanted.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        _refuse_without_folder()
        # click returns the code with which a command exits.
        code = command.main(arguments, prog_name="convert", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as exc:
        return report_error(f"{exc.format_message()} (convert --help says more)", exc.exit_code, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return report_error("interrupted: nothing was written to OUT", 130, as_json=as_json)
    except Signalled as exc:
        signal.alarm(0)
        return report_error(str(exc), exc.exit_code, as_json=as_json)
    except Exception as exc:
        from converter.errors import ConverterError, printable

        if verbose:
            with suppress(OSError):
                traceback.print_exc()
        if isinstance(exc, ConverterError):
            return report_error(str(exc), exc.exit_code, as_json=as_json)
        # A bug: one line all the same, and it says where.
        where = traceback.extract_tb(exc.__traceback__)[-1]
        name = f"{type(exc).__name__} in {os.path.basename(where.filename)}:{where.lineno}"  # noqa: PTH119
        return report_error(f"{name}: {printable(str(exc))} (-v shows where)", 1, as_json=as_json)


def _refuse_without_folder() -> None:
    """If the current folder is gone, relative paths lead nowhere, and a library of torch's would end the process."""
    from converter.errors import ConversionRefused

    try:
        os.getcwd()  # noqa: PTH109
    except OSError as exc:
        raise ConversionRefused(f"the current folder: {exc.strerror}; change to one that is there") from exc
