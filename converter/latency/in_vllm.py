"""vLLM as a server: `vllm serve` runs in a process group of its own and is asked over HTTP.

An adapter that isn't merged is served with --enable-lora.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from converter.latency.measure import CannotRun, Variant

READY_WITHIN, ENDED_WITHIN, ANSWERS_WITHIN = 1200, 60, 600
"""Timeouts in seconds: until the server is ready, until it has ended, until the next part of an answer comes."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""
_MODEL, _ADAPTER = "model", "adapter"


class InVllm:
    """`program` is vLLM's command, to which `arguments` are added. `room` is the number of tokens of a prompt and its
    answer."""

    name = "vllm"

    def __init__(
        self, program: str, dtype: str, room: int, tick: Callable[[], None], arguments: Sequence[str] = ()
    ) -> None:
        self.version, self.device = "unknown", "a device of its choice"
        self._program, self._dtype, self._room = program, dtype, room
        self._tick, self._arguments = tick, arguments

    @contextmanager
    def opened(self, variant: Variant) -> Iterator[_Served]:
        port = _free_port()
        with tempfile.TemporaryFile() as messages:
            try:
                process = subprocess.Popen(
                    self._command(variant, port),
                    env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=messages,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as exc:
                raise CannotRun(f"{self._program}: {exc.strerror}") from exc
            served = _Served(port, _ADAPTER if variant.adapter is not None else _MODEL)
            try:
                self._wait(process, served, messages)
                self.version = str(served.get("/version")["version"])
                yield served
            finally:
                _end(process)

    def _command(self, variant: Variant, port: int) -> list[str]:
        words = [self._program, "serve", str(variant.folder), "--served-model-name", _MODEL]
        words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self._dtype]
        words += ["--max-model-len", str(self._room)]
        if variant.adapter is not None:
            module = json.dumps({"name": _ADAPTER, "path": str(variant.adapter)})
            words += ["--enable-lora", "--lora-modules", module, "--max-lora-rank", str(_rank(variant.adapter))]
        return [*words, *self._arguments]

    def _wait(self, process: subprocess.Popen[bytes], served: _Served, messages: IO[bytes]) -> None:
        until = time.monotonic() + READY_WITHIN
        while time.monotonic() < until:
            self._tick()
            if process.poll() is not None:
                raise CannotRun(_last_error(messages))
            with suppress(CannotRun):
                served.get("/health")
                return
            time.sleep(0.2)
        raise CannotRun(f"no answer in {READY_WITHIN} seconds; {_last_error(messages)}")


class _Served:
    """A server that answers on a port of this machine."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    def get(self, path: str) -> Any:
        """The server's answer as JSON values; None if it is empty."""
        with self._answer("GET", path) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Iterator[object]:
        asked = {"model": self._model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0}
        asked |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        with self._answer("POST", "/v1/completions", json.dumps(asked)) as answer:
            while line := answer.readline():
                said = line.strip().removeprefix(b"data: ")
                if not said or said == b"[DONE]":
                    continue
                event = json.loads(said)
                if "error" in event:
                    raise CannotRun(_message(event))
                for choice in event["choices"]:
                    if "token_ids" not in choice:
                        raise CannotRun("this vLLM doesn't say which tokens it sends: 0.11 and later do")
                    yield from choice["token_ids"] or ()

    @contextmanager
    def _answer(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWERS_WITHIN)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise CannotRun(f"{path}: {answer.status}: {_message_of(answer.read())}")
            yield answer
        except (OSError, http.client.HTTPException) as exc:
            raise CannotRun(f"{path}: {exc}") from exc
        finally:
            connection.close()


def _message_of(text: bytes) -> str:
    try:
        return _message(json.loads(text))
    except (ValueError, AttributeError):
        return text.decode(errors="replace")[:300]


def _message(answer: Any) -> str:
    error = answer.get("error", answer)
    return " ".join(str(error.get("message", error)).split())[:300]


def _rank(adapter: Path) -> int:
    """The smallest rank that vLLM takes and that is enough for the adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    highest = max((rank for rank in ranks if isinstance(rank, int)), default=_RANKS[0])
    return next((rank for rank in _RANKS if rank >= highest), highest)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDED_WITHIN)
            break
    with suppress(ProcessLookupError):  # what it started, and didn't end
        os.killpg(process.pid, signal.SIGKILL)


def _last_error(messages: IO[bytes]) -> str:
    """Why the server ended: the last error in its log, or the log's last line."""
    messages.seek(0)
    lines = [line.strip() for line in messages.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "See root cause above" not in line]
    return "it ended: " + (errors or lines or ["it said nothing"])[-1][:300]
