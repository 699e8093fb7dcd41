"""The process: arguments in, exit code out.

Little is imported before there is someone to catch a Ctrl-C, and heavy libraries only after the arguments are parsed.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click

    from converter.cli.signals import Signals


def main(arguments: list[str] | None = None, command: click.Command | None = None) -> NoReturn:
    """Run the command line. Ends the process with 0 done, 1 failed, 2 refused, 3 undecided, 4 below a gate, 130 and
    143 for signals."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments, command))


def console(command: click.Command | None = None) -> NoReturn:
    """`main`, for a process of its own."""
    code = 1
    try:
        from converter.cli.surroundings import settle

        settle()
        main(command=command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
        _write("error: SIGINT: nothing was written to OUT\n")
    except BaseException as exc:  # there may be no memory for more words
        _write(f"error: {type(exc).__name__}\n")
    finally:
        leave(code)


def run(arguments: list[str], command: click.Command | None = None) -> int:
    """Run a command, all of them by default; its exit code.

    An error becomes one line on stderr and, with --json, an object on stdout.
    """
    from converter.cli.signals import Signalled, Signals

    stop = Signals()
    try:
        return _run(arguments, command, stop)
    except Signalled as exc:
        signal.alarm(0)
        return _report(str(exc), exc.exit_code, arguments)
    except Exception as exc:
        from converter.errors import ConverterError, printable

        if stop.received is not None and not isinstance(exc, ConverterError):
            # Imports that a signal ended, half done.
            signal.alarm(0)
            return _report(str(Signalled(stop.received)), 128 + stop.received, arguments)
        if "-v" in arguments or "--verbose" in arguments:
            with suppress(OSError):
                import traceback

                traceback.print_exc()
        if isinstance(exc, ConverterError):
            return _report(str(exc), exc.exit_code, arguments)
        # A bug: one line all the same, and it says where.
        name = f"{type(exc).__name__} in {_place_of(exc)}"
        return _report(f"{name}: {printable(str(exc))} (-v shows where)", 1, arguments)


def _run(arguments: list[str], command: click.Command | None, stop: Signals) -> int:
    """Run a command. Raises what went wrong, except wrong usage, which it reports."""
    import click

    from converter.cli.commands import cli

    # Read when the libraries are imported: nobody here compiles models, and no version check is wanted.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        _refuse_without_folder()
        # click returns the code with which a command exits.
        code = (command or cli).main(arguments, prog_name="convert", standalone_mode=False, obj=stop)
        return code if isinstance(code, int) else 0
    except click.ClickException as exc:
        return _report(f"{exc.format_message()} (convert --help says more)", exc.exit_code, arguments)


def _report(message: str, code: int, arguments: list[str]) -> int:
    from converter.cli.printing import report_error

    return report_error(message, code, as_json="--json" in arguments)


def leave(code: int) -> NoReturn:
    """End without tearing the libraries down, which takes torch half a second, and without waiting for threads, which
    may wait for what one has that died of too little memory."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who printed it has heard of it
            stream.flush()
    os._exit(code)


def _refuse_without_folder() -> None:
    """If the current folder is gone, relative paths lead nowhere, and a library of torch's would end the process."""
    from converter.errors import ConversionRefused

    try:
        os.getcwd()  # noqa: PTH109
    except OSError as exc:
        raise ConversionRefused(f"the current folder: {exc.strerror}; change to one that is there") from exc


def _place_of(exc: Exception) -> str:
    import traceback

    where = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{os.path.basename(where.filename)}:{where.lineno}"  # noqa: PTH119


def _write(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(text)
