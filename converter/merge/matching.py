"""Python's own `re`, run as a script in a process that may be killed: `patterns.py` asks it.

It imports nothing but the standard library, so that it starts in some 40 ms.
"""

from __future__ import annotations

import gc
import json
import re
import resource
import signal
import sys
import warnings


def found(expression: str, texts: list[str], *, whole: bool) -> list[tuple[int, str | None]]:
    """The texts, by their numbers, that an expression matches; with each what its group `idx` has, if it has one."""
    compiled = re.compile(expression)
    match = compiled.fullmatch if whole else compiled.match
    has_index = "idx" in compiled.groupindex
    matches = ((number, match(text)) for number, text in enumerate(texts))
    return [(number, one["idx"] if has_index else None) for number, one in matches if one is not None]


def answer(expression: str, texts: list[str], *, whole: bool) -> dict[str, object]:
    """What `found` gives, or why an expression is none."""
    try:
        return {"found": found(expression, texts, whole=whole)}
    except (re.error, RecursionError, OverflowError) as exc:
        return {"error": str(exc)}
    except MemoryError:
        pass  # only behind this block, what the expression took is free again, and an answer has room
    return {"error": "it takes too much memory"}


def main() -> None:
    """Read one request from standard input, and write one line for each of its expressions.

    When the processor has worked for `seconds`, SIGPROF ends this process: no `re` can be stopped in another way.
    """
    gc.disable()  # it would walk through millions of parts of an expression, and this process ends soon
    request = json.load(sys.stdin)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    memory = request["memory"] if hard == resource.RLIM_INFINITY else min(request["memory"], hard)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    warnings.simplefilter("ignore")
    for expression, whole in request["expressions"]:
        sys.stdout.write(json.dumps(answer(expression, request["texts"], whole=whole)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
