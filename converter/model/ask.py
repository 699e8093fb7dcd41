"""Asking transformers what it makes of a checkpoint: in a process of its own, and once.

Importing transformers takes seconds and hundreds of megabytes, which end with that process. Answers are remembered, by
everything that they depend on: the versions, the config, the tensors' names and shapes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from converter import errors
from converter.model.answers import answer
from converter.model.architecture import Architecture, Shape
from converter.read import cache

SECONDS = 300
"""Time for one answer, after which a config counts as one that transformers can't build."""
MEMORY = 4_000_000_000
"""Bytes that the process may take which answers: a config can name lists and modules without end. As many tensors as a
checkpoint may have take about one billion."""

_FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""Signals that no config is at fault for, but a user, or a system without memory."""
_KIND, _MOST_ANSWERS = "architectures", 64
_ANSWERS = "7"
"""Changes with what an answer says: answers of another kind are not remembered."""
_PROGRAM = "import sys; sys.path[:] = {path!r}; from converter.model.answers import serve; serve({memory})"
"""With this process's own path: a folder named converter may lie where the command is run."""


class TransformersProcess:
    """A process that has transformers and answers questions. It starts with the first one, and again if it has died."""

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY, program: str = _PROGRAM) -> None:
        """`program` is what the process runs: Python, with fields for its `path` and its `memory`."""
        self._seconds = seconds
        self._memory = memory
        self._program = program
        self._process: subprocess.Popen[str] | None = None
        self._took_too_long = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    def ask(self, question: str) -> Any:
        """The answer to a question; both are JSON. Raises what answering raised there.

        `BadCheckpoint` if the process died of the question, or took too long; `ConversionFailed` if somebody ended it.
        """
        if self._process is not None and self._process.poll() is not None:
            self.end()  # what it died of was another question
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018  (pipes)
        self._took_too_long = False
        clock = threading.Timer(self._seconds, self._expire)
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # a process that died says so below
                process.stdin.write(question + "\n")
                process.stdin.flush()
            # Answering takes seconds, and this process needs torch anyway.
            import torch  # noqa: F401

            line = process.stdout.readline()
        finally:
            clock.cancel()
        if not line:
            raise self._why_it_ended(process)
        result = json.loads(line)
        if "error" in result:
            raise getattr(errors, result["error"])(result["message"])
        return result["answer"]

    def end(self) -> None:
        """End the process, and give back its memory."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        atexit.register(self.end)
        return subprocess.Popen(
            [sys.executable, "-c", self._program.format(path=sys.path, memory=self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # It computes nothing, and the stacks of threads would count as its memory.
            env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def _expire(self) -> None:
        self._took_too_long = True
        if self._process is not None:
            self._process.kill()

    def _why_it_ended(self, process: subprocess.Popen[str]) -> errors.ConverterError:
        number = -process.wait()
        if number in _FROM_OUTSIDE and not self._took_too_long:
            name = signal.Signals(number).name
            return errors.ConversionFailed(f"the process that asks transformers was ended by {name}; try it again")
        stderr = process.stderr.read() if process.stderr is not None else ""
        reason = stderr.strip().rpartition("\n")[2] or "it ended, or took too long"
        return errors.BadCheckpoint(f"config.json: transformers failed on it: {reason[:200]}")


_process = TransformersProcess()


def dismiss() -> None:
    """End the process that has transformers, and give back its memory."""
    _process.end()


def _answered(question: str) -> Any:
    # Where transformers is loaded already, there is nothing to save.
    return answer(json.loads(question)) if "transformers" in sys.modules else _process.ask(question)


class Questions:
    """Questions about checkpoints, each of which is asked once: answers are remembered, also for later runs."""

    def __init__(self, answered: Callable[[str], Any] = _answered, versions: Callable[[str], str] = version) -> None:
        """`answered` gives the answer to a question, both as JSON; `versions` the version of an installed package."""
        self._answered = answered
        self._versions = functools.cache(versions)  # to look one up takes a millisecond
        self._known: dict[str, Any] = {}

    def describe(
        self,
        config: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        *,
        quantize: bool,
        dtype: str,
        keep: Iterable[str] = (),
        remote_code: bool = False,
        library: str = "bitsandbytes",
    ) -> Architecture:
        """`answers.describe`."""
        request = {"config": config, "shapes": shapes, "quantize": quantize, "dtype": dtype, "keep": list(keep)}
        request |= {"remote_code": remote_code, "library": library}
        return Architecture.from_json(self._ask({"question": "describe", **request}))

    def parameters(
        self, config: Mapping[str, Any], shapes: Mapping[str, Shape], names: Iterable[str], *, dtype: str
    ) -> dict[str, str]:
        """`answers.parameters`."""
        request = {"config": config, "shapes": shapes, "names": list(names), "dtype": dtype}
        found: dict[str, str] = self._ask({"question": "parameters", **request})
        return found

    def check_loaders(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Shape],
        quantized: Iterable[str],
        uneven: Iterable[str] = (),
    ) -> dict[str, list[str]]:
        """`answers.check_loaders`. Of a sealed folder that is what was planned, the plan's answer holds."""
        request = {"config": config, "tensors": tensors, "quantized": sorted(quantized), "uneven": sorted(uneven)}
        found: dict[str, list[str]] = self._ask({"question": "check_loaders", **request})
        return found

    def reads_alike(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """`meta_model.reads_alike`."""
        return bool(self._ask({"question": "reads_alike", "config": config, "other": other}))

    def _ask(self, request: dict[str, Any]) -> Any:
        question = json.dumps(request, sort_keys=True)
        made_by = [self._versions(name) for name in ("nf4-converter", "transformers", "bitsandbytes")]
        key = hashlib.sha256("\n".join([*made_by, _ANSWERS, question]).encode()).hexdigest()
        if key not in self._known:
            remembered = cache.load(_KIND, key)
            if remembered is None:
                remembered = self._answered(question)
                cache.store(_KIND, key, remembered, most=_MOST_ANSWERS)
            self._known[key] = remembered
        return self._known[key]


_questions = Questions()
describe = _questions.describe
check_loaders = _questions.check_loaders
parameters = _questions.parameters
reads_alike = _questions.reads_alike
