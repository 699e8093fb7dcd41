"""Real servers on this machine's processor, each in the environment that `environments.py` makes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

READY_WITHIN, ENDED_WITHIN = 1200, 60
"""Seconds that a server may take to start, and to end."""


class NotServed(Exception):
    """The server ended, or doesn't answer; says its last words."""


OPTIONS = {"vllm": ["--enforce-eager", "--max-model-len", "512"], "transformers": ["--device", "cpu"]}


def command(server: str, environment: Path, models: Sequence[str], port: int) -> list[str]:
    program = str(environment / "bin" / server)
    return [program, "serve", *models, "--host", "127.0.0.1", "--port", str(port), *OPTIONS[server]]


def surroundings(environment: Path) -> dict[str, str]:
    """Without a network, without an accelerator, and with what lies beside the environment."""
    beside = [str(environment / name) for name in ("alias", "beside") if (environment / name).is_dir()]
    fixed = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"}
    fixed |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin steal from each other
    fixed |= {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(READY_WITHIN)}  # 300 by default: too few for FP8 on a CPU
    fixed |= {"VLLM_CPU_INT4_W4A8": "0"}  # on some CPUs it would make 8-bit integers of the activations of W4A16
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(beside)}


@contextmanager
def running(server: str, environment: Path, models: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server that answers; `models`: those to load at the start. `NotServed` if it doesn't start."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as messages:
        process = subprocess.Popen(
            command(server, environment, models, port),
            env=surroundings(environment),
            stdout=messages,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait(process, address, log)
        yield address
    finally:
        end(process)


def wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + READY_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise NotServed(last_error(log))
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise NotServed(f"no answer in {READY_WITHIN} seconds; {last_error(log)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and all that it started, which are in a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(ENDED_WITHIN)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def last_error(log: Path) -> str:
    """The line of a log that says why it ended: the last error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "See root cause above" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]
