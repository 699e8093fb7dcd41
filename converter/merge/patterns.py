"""An adapter's regular expressions, matched within a time limit.

PEFT hands them to `re`, which can run for years on an expression such as `(a|aa)+$`, and cannot be stopped. No look at
an expression tells the bad ones from the good ones that trainers really write. So `re` only says what is a valid
expression, and the matching is done by `regex`: the same language, but for what is refused, and a limit on the time,
after which the adapter is refused. Compiling has limits of its own, for nothing can stop that: `regex` writes out what
an expression repeats, so that `a{2000000000}` would take all memory there is.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from typing import Any

from converter.errors import BadAdapter, Unsupported

_parser: Any = re._parser  # type: ignore[attr-defined]
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)

MAX_LENGTH = 20_000
"""Characters of an expression; one that lists every module of a large model has about as many."""
MAX_COUNT = 5_000
"""Expressions of one adapter; one that gives every module a rank of its own has about a thousand."""
MAX_SIZE = 1_000_000
"""Steps of all of one adapter's expressions, repetitions written out; `regex` takes up to 300 bytes for each."""
SECONDS = 10.0
"""Of computing, for compiling one adapter's expressions and for all that they are matched against; a hundred thousand
names take about two."""

_OF_REGEX_ALONE = re.compile(r"\{(?!\d*(?:,\d*)?\})|\[:\^?\w+:\]")
"""Braces around anything but numbers are characters to `re`, and to `regex` mistakes that a match may have, as
`a{e<=1}`; so are brackets and colons, and `regex` takes `[[:alpha:]]` for letters."""


class Patterns:
    """The expressions of one adapter's config, which messages call `where`. They share `SECONDS`."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = SECONDS
        self._count = 0
        self._size = 0

    def search_from_start(self, expression: str, text: str) -> Any:
        """What `re.match` gives, or `BadAdapter` for an expression that is none or takes too long."""
        return self._timed("match", expression, text)

    def covers(self, expression: str, text: str) -> bool:
        """Whether `re.fullmatch` finds the expression to be all of the text."""
        return self._timed("fullmatch", expression, text) is not None

    def check(self, key: str, written: str, expression: str) -> None:
        """Refuse what is not an expression: what becomes of `written`, a value of the option `key`."""
        self._count += 1
        if self._count > MAX_COUNT:
            raise BadAdapter(f"{self._where}: more than {MAX_COUNT:,} patterns and saved modules")
        if len(expression) > MAX_LENGTH:
            raise BadAdapter(
                f"{self._where}: {key} has a pattern of {len(expression):,} characters, expected at most {MAX_LENGTH:,}"
            )
        start = time.thread_time()
        try:
            if _OF_REGEX_ALONE.search(re.sub(r"\\.", "", expression, flags=re.DOTALL)):
                raise Unsupported(
                    f"{self._where}: {key} {written[:60]!r} has braces or brackets that this tool reads otherwise than "
                    "PEFT: write a backslash before them"
                )
            self._size += _size(expression)
            if self._size > MAX_SIZE:
                raise BadAdapter(
                    f"{self._where}: {key} {written[:60]!r} repeats too much, or all patterns are too long"
                )
            if self._left <= 0:
                raise BadAdapter(f"{self._where}: its patterns take longer than {SECONDS:g} s to compile")
            _compiled(expression)
        except (re.error, RecursionError, OverflowError) as exc:
            raise BadAdapter(f"{self._where}: {key} {written[:60]!r} is not a regular expression: {exc}") from exc
        finally:
            self._left -= time.thread_time() - start

    def _timed(self, method: str, expression: str, text: str) -> Any:
        start = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return getattr(_compiled(expression), method)(text, timeout=self._left)
        except TimeoutError as exc:
            raise BadAdapter(
                f"{self._where}: the pattern {expression[:60]!r} takes longer than {SECONDS:g} s to match"
            ) from exc
        finally:
            self._left -= time.thread_time() - start


def _size(expression: str) -> int:
    """Steps of an expression whose repetitions are written out as often as they must match at least."""
    with warnings.catch_warnings(action="ignore"):
        return _steps(_parser.parse(expression))


def _steps(part: Any) -> int:
    """Of what Python's parser makes of an expression: groups, branches and their like are sequences in tuples."""
    if isinstance(part, tuple):
        if len(part) == 2 and part[0] in _REPEATS:
            least, _, repeated = part[1]
            return max(1, int(least)) * _steps(repeated)
        return sum(_steps(inner) for inner in part)
    return sum(_steps(inner) for inner in part) if isinstance(part, list | _parser.SubPattern) else 1


@functools.lru_cache(maxsize=MAX_COUNT)
def _compiled(expression: str) -> Any:
    import regex

    with warnings.catch_warnings(action="ignore"):  # what they think of an expression is not for the user
        re.compile(expression)
    try:
        return regex.compile(expression)
    except regex.error as exc:
        raise re.error(str(exc)) from exc
