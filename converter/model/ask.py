"""Asking transformers what it makes of a checkpoint: in a process of its own, and once.

Importing transformers takes seconds and hundreds of megabytes, which end with that process. Answers are remembered, by
everything that they depend on: the versions, the config, the tensors' names and shapes.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from converter import errors
from converter.model.answers import answer
from converter.model.architecture import Architecture, Shape
from converter.read import cache

SECONDS = 300
"""Time for one answer, after which a config counts as one that transformers can't build."""
_FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""Signals that no config is at fault for, but a user, or a system without memory."""
MEMORY = 4_000_000_000
"""Bytes that the process may take which answers: a config can name lists and modules without end. As many tensors as a
checkpoint may have take about one billion."""
_KIND, _KEPT_ANSWERS = "architectures", 64
_CHILD = "from converter.model.answers import serve; serve({memory})"

_known: dict[str, Any] = {}


def describe(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    *,
    quantize: bool,
    dtype: str,
    keep: Iterable[str] = (),
    remote_code: bool = False,
) -> Architecture:
    """`answers.describe`, asked once."""
    request = {"config": config, "shapes": shapes, "quantize": quantize, "dtype": dtype, "keep": list(keep)}
    return Architecture.from_json(_ask({"question": "describe", **request, "remote_code": remote_code}))


def check_output(config: Mapping[str, Any], tensors: Mapping[str, Shape], quantized: Iterable[str]) -> list[str]:
    """`answers.check_output`, asked once: of a sealed folder that is what was planned, the plan's answer holds."""
    request = {"config": config, "tensors": tensors, "quantized": sorted(quantized)}
    problems: list[str] = _ask({"question": "check_output", **request})
    return problems


def _ask(request: dict[str, Any]) -> Any:
    raw = json.dumps(request, sort_keys=True)
    key = _key(raw)
    if key not in _known:
        remembered = cache.load(_KIND, key)
        if remembered is None:
            # Where transformers is loaded already, there is nothing to save.
            remembered = answer(json.loads(raw)) if "transformers" in sys.modules else _ask_child(raw)
            cache.store(_KIND, key, remembered, most=_KEPT_ANSWERS)
        _known[key] = remembered
    return _known[key]


class _Child:
    """A process that has transformers; it ends with its input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(memory=MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # It computes nothing, and the stacks of threads would count as its memory.
            env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self._took_too_long = False

    def ask(self, raw: str) -> Any:
        """The answer to a question; raises what answering raised there."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None  # noqa: S101, PT018  (pipes)
        clock = threading.Timer(SECONDS, self._expire)
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that died says so below
                stdin.write(raw + "\n")
                stdin.flush()
            # Answering takes seconds, and this process needs torch anyway.
            import torch  # noqa: F401

            line = stdout.readline()
        finally:
            clock.cancel()
        if not line:
            number = -self._process.wait()
            if number in _FROM_OUTSIDE and not self._took_too_long:
                name = signal.Signals(number).name
                raise errors.ConversionFailed(f"the process that asks transformers was ended by {name}; try it again")
            reason = stderr.read().strip().rpartition("\n")[2] or "it ended, or took too long"
            raise errors.BadCheckpoint(f"config.json: transformers failed on it: {reason[:200]}")
        result = json.loads(line)
        if "error" in result:
            raise getattr(errors, result["error"])(result["message"])
        return result["answer"]

    def _expire(self) -> None:
        self._took_too_long = True
        self._process.kill()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


_child: _Child | None = None


def _ask_child(raw: str) -> Any:
    global _child
    if _child is not None and not _child.is_alive():
        dismiss()  # what it died of was another question
    if _child is None:
        _child = _Child()
        atexit.register(dismiss)
    return _child.ask(raw)


def dismiss() -> None:
    """End the process that has transformers, and give back its memory."""
    global _child
    if _child is not None:
        _child.end()
        _child = None


def _key(raw: str) -> str:
    made_by = [version(name) for name in ("nf4-converter", "transformers", "bitsandbytes")]
    return hashlib.sha256("\n".join([*made_by, raw]).encode()).hexdigest()
