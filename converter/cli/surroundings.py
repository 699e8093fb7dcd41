"""What a process of ours may be started with: standard streams that are closed, full or of another alphabet, and few
open files."""

from __future__ import annotations

import io
import os
import resource
import sys
from contextlib import suppress

from converter.errors import ConversionRefused

LEAST_DATA = 270_000_000
"""Bytes that Python and the libraries take by themselves, at the least."""


def settle() -> None:
    """Make the best of them, before anything else is opened."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file to be opened would have this number, and what a library prints would be written to it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (open as long as we are)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a summary is no reason to fail
    with suppress(OSError, ValueError):
        # What was asked for is for programs that use select(); a base and a batch may have hundreds of files open.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def refuse_without_memory() -> None:
    """`ConversionRefused` where a limit of memory is too low for the libraries alone: CPython 3.11 may be busy for ever
    with its own MemoryError where one is raised while they are imported."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY and limit < LEAST_DATA:
        raise ConversionRefused(
            f"the limit of memory (ulimit -d) is {limit:,} bytes; Python and the libraries alone take {LEAST_DATA:,}"
        )
