"""Quiet, offline imports of libraries that talk or fetch when they are imported."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("transformers", "bitsandbytes", "torch")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' remarks from the user while they are imported or asked; their errors still raise.

    bitsandbytes also asks the package `kernels`, where that is installed, to fetch code from a hub: it is made to look
    absent for the time being.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    absent = "kernels" not in sys.modules
    if absent:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if absent and sys.modules.get("kernels", 0) is None:
            del sys.modules["kernels"]
