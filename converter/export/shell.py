"""A script that starts a server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def lines(words: Sequence[str]) -> str:
    """A file with a word in each line, such as pip's requirements."""
    return "".join(f"{word}\n" for word in words)


def script(what: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
    """`what` it does is its comment. More arguments are given to the server."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    run = f'exec {shlex.join(words)} "$@"'
    return "\n".join(["#!/bin/sh", f"# {what}", "set -eu", 'cd "$(dirname "$0")"', *exports, run]) + "\n"
