"""Running a command in a fresh process and measuring it from outside: wall time, CPU time, peak memory."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
_PERIOD_MS = 10
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""All on the CPU and without a network, so that the commands compare."""


def caches_in(work: Path) -> dict[str, str]:
    """Variables that keep what is remembered between commands in a work folder: as one user's, and nobody else's."""
    return {"XDG_CACHE_HOME": str(work / "cache"), "NUMBA_CACHE_DIR": str(work / "numba")}


@dataclass(frozen=True)
class Measured:
    """One finished process."""

    status: int
    seconds: float
    cpu_seconds: float
    """Of the process and those of its children that it waited for."""
    peak: int
    """VmHWM in bytes: what the process had in memory at its most, pages of mapped files included."""
    anonymous: int
    """The largest RssAnon that was seen: the same without pages of files."""
    children: int
    """The largest VmHWM of the processes that it started; 0 if it started none."""
    written: int
    """Bytes that it and those children wrote into files, as the system counts the pages of files that they changed."""
    output: str
    errors: str


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command in the repository's root and wait for it, looking at its memory 100 times a second."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            cwd=REPO,
            env={**os.environ, **_ENVIRONMENT, **(environment or {})},
        )
        seen = _watch(child.pid)
        seconds = time.monotonic() - started
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)  # already waited for: spares Popen the attempt
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(
        child.returncode, seconds, cpu, seen.peak, seen.anonymous, seen.children, 512 * usage.ru_oublock, *texts
    )


@dataclass
class _Seen:
    peak: int = 0
    anonymous: int = 0
    children: int = 0


def _watch(pid: int) -> _Seen:
    """What a process has in memory until it ends, which is noticed at once."""
    seen = _Seen()
    ended = select.poll()
    descriptor = os.pidfd_open(pid)
    try:
        ended.register(descriptor, select.POLLIN)
        while not ended.poll(_PERIOD_MS):
            peak, anonymous = _memory(pid)
            seen.peak, seen.anonymous = max(seen.peak, peak), max(seen.anonymous, anonymous)
            for child in _children(pid):
                seen.children = max(seen.children, _memory(child)[0])
    finally:
        os.close(descriptor)
    return seen


def _memory(pid: int) -> tuple[int, int]:
    """VmHWM and RssAnon in bytes; zeros for a process that has ended."""
    found = {"VmHWM:": 0, "RssAnon:": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, *rest = line.split()
            if name in found:
                found[name] = int(rest[0]) * 1024
    except OSError:
        pass
    return found["VmHWM:"], found["RssAnon:"]


def _children(pid: int) -> list[int]:
    """The processes that a process has started, by any of its threads, and theirs."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        return found
    return found + [grandchild for child in found for grandchild in _children(child)]
