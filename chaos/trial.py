"""One command in a process of its own, with a fault: what it leaves, and whether the same command then resumes."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HIDDEN = (".lock", ".journal", ".partial")
"""What a run that died right after it had named OUT may leave in it until the next one."""


HUNG = 1000


@dataclass
class Row:
    """The results of one kind of fault."""

    fault: str
    command: str
    """How to try this row alone."""
    tried: int = 0
    absent: int = 0
    """OUT, or an output of a batch, was not there, or no checkpoint, or still the earlier one."""
    whole: int = 0
    resumed: int = 0
    """The same command gave the bytes of an undisturbed run."""
    lost: int = 0
    """Tensors that were made a second time, at most in one trial."""
    skipped: str = ""
    failures: list[str] = field(default_factory=list)


Files = dict[str, bytes]
"""Of an output, by name."""


@dataclass
class Lab:
    """The inputs, a place to work in, and what an undisturbed run gives."""

    place: Path
    base: Path
    adapters: dict[str, Path]
    """By the name of the output, below OUT; without a name, it is OUT itself."""
    kind: str = ""
    """What is converted, as the rows call it, if not one adapter."""
    whole: dict[str, Files] = field(default_factory=dict)
    """By output."""
    tensors: int = 0
    """An undisturbed run makes; one that several outputs have of their own counts in each."""
    seconds: float = 0.0
    """An undisturbed run takes."""
    _made: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))

    def note_made(self, count: int) -> None:
        """Set `made`, where another run came in between, or another process made them."""
        self._made[:8] = count.to_bytes(8, "little")

    def command(self, out: Path, *options: str) -> list[str]:
        paths = ["--base", str(self.base), "--out", str(out)]
        for name, adapter in self.adapters.items():
            paths += ["--adapter", f"{name}={adapter}" if name else str(adapter)]
        return [*paths, "--max-shard-size", "1MB", "--threads", "1", "--journal-seconds", "0", "--quiet", *options]

    def row(self, fault: str, command: str) -> Row:
        """A row for a fault that `python -m chaos COMMAND` tries."""
        return Row(f"{fault}, {self.kind}" if self.kind else fault, f"python -m chaos {command}")

    def learn(self) -> None:
        """What an undisturbed run gives, makes and takes, from the second of two: the first warms up."""
        for name in ("first", "second"):
            started = time.monotonic()
            if code := self.run(self.command(self.place / name)):
                raise RuntimeError(f"an undisturbed run ended with {code}: {self.said()}")
            self.seconds = time.monotonic() - started
        self.whole, self.tensors = self.left(self.place / "second"), self.made

    def left(self, out: Path) -> dict[str, Files]:
        """The files of each output."""
        return {name: visible(out / name) for name in self.adapters}

    @property
    def made(self) -> int:
        """Tensors that were begun since the last `start`."""
        return int.from_bytes(self._made[:8], "little")

    def start(self, command: Sequence[str], *, held: bool = False) -> int:
        """Run a command line in a fork; its pid. `held`: stopped before it does anything."""
        self.note_made(0)
        # A signal in the midst of Python's own forking would be no signal to the command.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            if held:
                os.waitpid(pid, os.WUNTRACED)
            return pid
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(os.open(self.place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line begins, as in a new process
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            count_begun(lambda: self.note_made(self.made + 1))
            if held:
                os.kill(os.getpid(), signal.SIGSTOP)
            from converter.cli.main import main

            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                main(list(command))
            except KeyboardInterrupt:
                os._exit(130 if not self.made else 98)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
        os._exit(99)

    def run(self, command: Sequence[str]) -> int:
        """Run a command line to its end; its exit code, as `ended` gives it."""
        return ended(self.start(command))

    def said(self) -> str:
        return (self.place / "said").read_text(errors="replace").strip()

    def traced(self, command: Sequence[str], *options: str) -> int:
        """Run a command line under strace; its exit code."""
        pid = self.start(command, held=True)
        strace = subprocess.Popen(["strace", "-f", "-qq", *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
        status = Path(f"/proc/{pid}/status")
        while "TracerPid:\t0\n" in status.read_text():
            if strace.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                ended(pid)
                raise RuntimeError("strace can't attach to a process here")
        os.kill(pid, signal.SIGCONT)
        code = ended(pid)
        strace.wait()
        if code == HUNG:
            raise RuntimeError(f"hung: strace {' '.join(options)}")
        return code

    def judge(
        self,
        row: Row,
        out: Path,
        what: str,
        *options: str,
        earlier: dict[str, Files] | None = None,
        lift: Callable[[], object] = lambda: None,
    ) -> None:
        """Look at what a trial left, lift the fault, run the same command, and look again.

        `earlier` is what was there before; an output may still be that.
        """
        made, left, said = self.made, self.left(out), self.said()
        row.tried += 1
        if left == self.whole:
            row.whole += 1
        elif halves := [name for name in left if not self._is_absent_or_whole(name, left[name], earlier or {})]:
            row.failures.append(f"{what}: {out / halves[0]} is neither absent nor whole: {sorted(left[halves[0]])}")
        else:
            row.absent += 1
        if "Traceback" in said or len(said.splitlines()) > len(self.adapters):
            row.failures.append(f"{what}: said more than one line for each output: {said[:200]!r}")
        lift()
        code = self.run(self.command(out, *options))
        remains = leftovers(out.parent)
        if code == 0 and self.left(out) == self.whole and not remains:
            row.resumed += 1
            row.lost = max(row.lost, made + self.made - self.tensors if self.made else 0)
        else:
            row.failures.append(f"{what}: the same command ended with {code}, left {remains}: {self.said()[:300]}")

    def _is_absent_or_whole(self, name: str, files: Files, earlier: dict[str, Files]) -> bool:
        return files == self.whole[name] or "config.json" not in files or files == earlier.get(name)


class _Calls(logging.Handler):
    """Calls a function for each record."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self._function = function

    def emit(self, record: logging.LogRecord) -> None:
        self._function()


def count_begun(count: Callable[[], None]) -> None:
    """Call a function whenever this process begins a tensor, which the converter logs."""
    log = logging.getLogger("converter.tile")
    log.setLevel(logging.DEBUG)
    log.addHandler(_Calls(count))


def ended(pid: int, deadline: float = 60.0) -> int:
    """The exit code of a process, negative for a signal; `HUNG` if it had to be killed."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HUNG


def kill_after(pid: int, seconds: float, signum: int = signal.SIGKILL) -> int:
    """Send a process a signal some time later; how it ended."""
    time.sleep(seconds)
    os.kill(pid, signum)
    return ended(pid)


def leftovers(folder: Path) -> list[str]:
    """What a run that succeeds removes."""
    endings = (".partial", ".unfinished", ".replaced", *HIDDEN)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(endings))


def visible(out: Path) -> Files:
    """The files of OUT, but for hidden ones."""
    if not out.is_dir():
        return {}
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in HIDDEN and path.is_file()}


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
