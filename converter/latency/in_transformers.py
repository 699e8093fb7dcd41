"""transformers as a server: a process of its own that generates, with PEFT for an adapter that isn't merged."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from converter.latency.measure import CannotRun, Variant

_PROGRAM = "import sys; sys.path[:] = {path!r}; from converter.model.generation import serve; serve()"
_POLL = 0.5
"""Seconds between two checks whether to stop."""


class InTransformers:
    """`dtype` is bfloat16 or float16; `device` auto, cpu, cuda, …; `tick` is called while it waits and may raise."""

    name = "transformers"

    def __init__(self, dtype: str, device: str, tick: Callable[[], None], *, program: str = _PROGRAM) -> None:
        """`program` is what the process runs: Python, with a field for its `path`."""
        self.version = self.device = "unknown"
        self._dtype, self._on, self._tick, self._program = dtype, device, tick, program

    @contextmanager
    def opened(self, variant: Variant) -> Iterator[_Process]:
        with tempfile.TemporaryFile() as messages:
            running = subprocess.Popen(
                [sys.executable, "-c", self._program.format(path=sys.path)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # a Ctrl-C is this process's to hear
            )
            process = _Process(running, messages, self._tick)
            try:
                adapter = None if variant.adapter is None else str(variant.adapter)
                asked = {"folder": str(variant.folder), "adapter": adapter, "dtype": self._dtype, "device": self._on}
                process.say(asked)
                about = process.hear()["ready"]
                self.version, self.device = about["version"], about["device"]
                yield process
            finally:
                running.kill()
                running.communicate()


class _Process:
    """Speaks JSON lines with the process."""

    def __init__(self, process: subprocess.Popen[bytes], messages: IO[bytes], tick: Callable[[], None]) -> None:
        self._process, self._messages, self._tick = process, messages, tick

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
        self.say({"prompt": list(prompt), "new_tokens": new_tokens})
        while isinstance(token := self.hear(), int):
            yield token

    def say(self, value: object) -> None:
        assert self._process.stdin is not None  # noqa: S101  (a pipe)
        with suppress(BrokenPipeError):  # `hear` says that it ended
            self._process.stdin.write(json.dumps(value).encode() + b"\n")

    def hear(self) -> Any:
        """The next value that it says. `CannotRun` if that is an error, or if it has ended."""
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101  (a pipe)
        while not select.select([stdout], [], [], _POLL)[0]:
            self._tick()
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._messages.seek(0)
            said = self._messages.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise CannotRun(f"the process ended with {code}: {said[:200] or 'it said nothing'}")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise CannotRun(value["error"])
        return value
