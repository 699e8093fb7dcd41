"""An adapter's regular expressions, with the meaning that PEFT gives them, and within limits of time and memory.

PEFT hands them to `re`, which can run for years on an expression such as `(a|aa)+$`, and cannot be stopped. No look at
an expression tells the bad ones from the good ones that trainers really write. So names are matched here, and all that
is more than a name in a process of its own (`matching.py`), which ends when it has taken too long.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from converter.errors import BadAdapter, ConversionFailed
from converter.merge import matching

SECONDS = 10.0
"""Of computing, for all of an adapter's expressions and what they are matched against at a time; a hundred thousand
names take about two."""
MEMORY = 1_000_000_000
"""Bytes that the process may take which matches."""
_HANGS = 300.0
"""Seconds of the clock on the wall after which that process counts as hanging."""
_FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""Signals that no expression is at fault for, but a user, or a system without memory."""

_NAME = re.compile(r"\^?(?:[\w-]|\\?\.)*")
"""What `re` matches in no time, whatever surrounds it here."""
_LONGEST_NAME, _MOST_NAMES = 1_000, 1_000
"""Characters of a name, and how many are matched here: so many take a moment."""


class Pattern(NamedTuple):
    """A regular expression, and where it comes from."""

    key: str
    """The option."""
    written: str
    """What the option has."""
    expression: str
    """What PEFT makes of it."""
    whole: bool = False
    """Whether it must match all of a text; else the beginning."""

    def is_name(self) -> bool:
        return len(self.written) <= _LONGEST_NAME and _NAME.fullmatch(self.written) is not None


class Patterns:
    """The patterns of one adapter's config, which messages call `where`."""

    def __init__(self, where: str, patterns: Iterable[Pattern], seconds: float = SECONDS) -> None:
        """Raises `BadAdapter` for a pattern that is not a regular expression."""
        self._where = where
        self._seconds = seconds
        self._patterns = tuple(dict.fromkeys(patterns))
        self._found: dict[str, dict[Pattern, str | None]] = {}
        """Text → the patterns that match it, and the group `idx` of each."""
        self._names_only = len(self._patterns) <= _MOST_NAMES and all(one.is_name() for one in self._patterns)
        self._add([])

    def learn(self, texts: Iterable[str]) -> None:
        """Match all patterns against texts that will be asked for: many at once take hardly longer than one.

        Raises `BadAdapter` for a pattern that takes too long.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._found]
        if new:
            self._add(new)

    def match(self, pattern: Pattern, text: str) -> bool:
        """Whether a pattern matches a text. Raises as `learn` does."""
        return pattern in self._of(text)

    def index(self, pattern: Pattern, text: str) -> str | None:
        """What the group `idx` has in a text; None if the pattern doesn't match. Raises as `learn` does."""
        return self._of(text).get(pattern)

    def _of(self, text: str) -> dict[Pattern, str | None]:
        if text not in self._found:
            self._add([text])
        return self._found[text]

    def _add(self, texts: list[str]) -> None:
        answers = self._match_here(texts) if self._names_only else self._match_in_a_process(texts)
        self._found |= {text: {} for text in texts}
        for pattern, answer in zip(self._patterns, answers, strict=True):
            for number, index in answer:
                self._found[texts[number]][pattern] = index

    def _match_here(self, texts: list[str]) -> list[list[tuple[int, str | None]]]:
        return [matching.found(one.expression, texts, whole=one.whole) for one in self._patterns]

    def _match_in_a_process(self, texts: list[str]) -> list[list[tuple[int, str | None]]]:
        request = {
            "seconds": self._seconds,
            "memory": MEMORY,
            "expressions": [(one.expression, one.whole) for one in self._patterns],
            "texts": texts,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", Path(matching.__file__)],
                input=json.dumps(request).encode(),
                capture_output=True,
                check=False,
                timeout=_HANGS,
                start_new_session=True,  # what is typed at a terminal reaches this process only, which ends that one
            )
            lines, code = done.stdout.splitlines(), done.returncode
        except subprocess.TimeoutExpired as exc:
            lines, code = (exc.stdout or b"").splitlines(), -signal.SIGPROF
        answers = [json.loads(line) for line in lines]
        for pattern, answer in zip(self._patterns, answers, strict=False):
            if "error" in answer:
                raise BadAdapter(f"{self._said(pattern)} is not a regular expression: {answer['error']}")
        if code:
            self._refuse(code, self._patterns[len(answers) :])
        return [answer["found"] for answer in answers]

    def _refuse(self, code: int, left: Sequence[Pattern]) -> None:
        """Say why the process ended that matches, in the middle of the first of `left`."""
        if code < 0 and -code in _FROM_OUTSIDE:
            name = signal.Signals(-code).name
            raise ConversionFailed(f"the process that matches an adapter's patterns was ended by {name}; try it again")
        subject = self._said(left[0]) if left else f"{self._where}: its patterns"
        if code == -signal.SIGPROF:
            raise BadAdapter(f"{subject} takes longer than {self._seconds:g} s to match")
        raise BadAdapter(f"{subject} is more than Python's regular expressions can take")

    def _said(self, pattern: Pattern) -> str:
        return f"{self._where}: {pattern.key} {pattern.written[:60]!r}"
