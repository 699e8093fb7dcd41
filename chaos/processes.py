"""Faults of a process and of its system calls: it is killed, or told that the disk failed."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from chaos.trial import HUNG, Lab, Row, fresh, kill_after, visible
from converter.cli.surroundings import LEAST_DATA

CHANGES = (
    "pwrite64 write fsync fdatasync rename renameat renameat2 ftruncate fallocate mkdir unlink unlinkat rmdir link"
)
CHANGES += " linkat"
ERRORS = [
    ("ENOSPC", "pwrite64 write fallocate mkdir"),
    ("EIO", "pwrite64 fsync fdatasync rename renameat2 ftruncate unlink"),
    ("EIO", "pread64 preadv read"),
    ("EROFS", "openat mkdir rename renameat2"),
]

Scene = tuple[str, Callable[[Lab, Path], Path], tuple[str, ...]]
"""What a run finds: its name, how it is made (gives OUT), and the options that go with it."""


def new(_: Lab, place: Path) -> Path:
    return fresh(place) / "out"


def _empty(_: Lab, place: Path) -> Path:
    return fresh(place / "out")


def _earlier(lab: Lab, place: Path) -> Path:
    shutil.copytree(lab.place / "earlier", fresh(place) / "out")
    return place / "out"


SCENES: list[Scene] = [
    ("a new OUT", new, ()),
    ("an empty folder as OUT", _empty, ()),
    ("--overwrite", _earlier, ("--overwrite",)),
]


def calls_of(lab: Lab, scene: Scene, calls: str) -> Counter[str]:
    """How often an undisturbed run makes each system call; afterwards, `lab.made` is what it made."""
    log = lab.place / "calls"
    out = scene[1](lab, lab.place / "place")
    code = lab.traced(lab.command(out, *scene[2]), "-o", str(log), "-e", f"trace={_known(calls)}")
    if code:
        raise RuntimeError(f"an undisturbed run ended with {code}: {lab.said()}")
    return Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))


def _known(calls: str) -> str:
    return ",".join(f"?{call}" for call in calls.split())


def sample(calls: Counter[str], every: int) -> list[tuple[str, int]]:
    """A sample of the calls, as (name, its number among those of that name): one of every `every`, at least one."""
    each = [(call, number) for call, count in calls.items() for number in range(1, count + 1)]
    return each[random.randrange(min(every, len(each))) :: every] if each else []


def kills(lab: Lab, every: int, scenes: list[Scene], command: str = "kills") -> Iterator[Row]:
    """Kill at every call that changes the disk."""
    for scene in scenes:
        name, prepare, options = scene
        row = Row(f"kill -9 at a system call that changes the disk, {name}", f"python -m chaos {command}")
        usual = lab.tensors
        calls, lab.tensors = calls_of(lab, scene, CHANGES), lab.made
        for call, number in sample(calls, every):
            out = prepare(lab, lab.place / "place")
            earlier = lab.left(out)
            inject = f"inject={call}:signal=SIGKILL:when={number}"
            code = lab.traced(lab.command(out, *options), "-o", os.devnull, "-e", f"trace={call}", "-e", inject)
            if code == 0:
                continue  # fewer calls this time
            lab.judge(row, out, f"{call} {number}", *options, earlier=earlier)
        lab.tensors = usual
        yield row


def errors(lab: Lab, every: int, faults: list[tuple[str, str]] = ERRORS, command: str = "errors") -> Iterator[Row]:
    """Have every call fail once."""
    scene = SCENES[0]
    for error, calls in faults:
        row = lab.row(f"{error} from {', '.join(calls.split())}", command)
        for call, number in sample(calls_of(lab, scene, calls), every):
            out = scene[1](lab, lab.place / "place")
            inject = f"inject={call}:error={error}:when={number}"
            lab.traced(lab.command(out), "-o", os.devnull, "-e", f"trace={call}", "-e", inject)
            lab.judge(row, out, f"{error} from {call} {number}")
        yield row


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def instants(
    lab: Lab, count: int, signals: tuple[signal.Signals, ...] = SIGNALS, command: str = "instants"
) -> Iterator[Row]:
    """Kill, and ask for an end, at instants drawn by chance."""
    for signum in signals:
        row = lab.row(f"{signum.name} at a random instant", command)
        for _ in range(count):
            out = new(lab, lab.place / "place")
            code = kill_after(lab.start(lab.command(out)), random.uniform(0, lab.seconds), signum)
            # Python itself dies of a signal that comes before the command line has begun.
            if code not in (0, -signum, 128 + signum):
                row.failures.append(f"ended with {code}: {lab.said()}")
            lab.judge(row, out, signum.name)
        yield row


def memory(lab: Lab, every: int) -> Iterator[Row]:
    """Less memory than it takes, in new processes: too little for the libraries, then ever more, to enough."""
    row = Row("RLIMIT_DATA below what is needed", "python -m chaos memory")
    hung = 0
    for limit in (200_000_000, *range(LEAST_DATA, 2_000_000_000, 400_000 * every)):
        out = new(lab, lab.place / "place")
        command = [sys.executable, "-m", "converter", *lab.command(out)]
        limited = partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, -1))
        process = subprocess.Popen(command, preexec_fn=limited, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            hung += 1
            process.kill()
            _, said = process.communicate()
        if process.returncode == 0:
            break
        lab.note_made(0)  # it isn't known
        # OpenBLAS and C++ have last words of their own.
        (lab.place / "said").write_bytes(b"".join(said.splitlines()[-1:]))
        lab.judge(row, out, f"{limit:,} bytes")
    if hung:
        row.fault += f" ({hung} hung and had to be killed)"
    yield row


def damage(lab: Lab, count: int) -> Iterator[Row]:
    """Cut files short, and flip bits in them."""
    for how in ("cut short", "with flipped bits"):
        row = Row(f"files in staging {how}", "python -m chaos damage")
        for _ in range(count):
            out = new(lab, lab.place / "place")
            staging = out.with_name("out.partial")
            for _ in range(10):
                kill_after(lab.start(lab.command(out)), random.uniform(0.2, 1.0) * lab.seconds)
                if staging.exists() and list(staging.iterdir()):
                    break
            made = lab.made
            for path in staging.iterdir() if staging.exists() else []:
                if path.stat().st_size:
                    _spoil(path, how)
            lab.note_made(made)
            lab.judge(row, out, how)
        yield row
        for which in ("base", "adapter"):
            row = Row(f"{which} {how}, before or between runs", "python -m chaos damage")
            for number in range(count):
                _damage_input(lab, row, which, how, between=bool(number % 2))
            yield row


def _damage_input(lab: Lab, row: Row, which: str, how: str, *, between: bool) -> None:
    out = new(lab, lab.place / "place")
    if between:
        kill_after(lab.start(lab.command(out)), random.uniform(0.2, 1.0) * lab.seconds)
    folder = lab.base if which == "base" else lab.adapters[""]
    path = random.choice(sorted(folder.glob("*.safetensors")))
    raw, times = path.read_bytes(), path.stat()
    _spoil(path, how)
    code = lab.run(lab.command(out))
    left, whole = visible(out), lab.whole[""]
    if code == 0 and left != whole and how == "with flipped bits":
        # The format has no checksums: other values are another input. The receipt must say so.
        if left["conversion.json"] == whole["conversion.json"]:
            row.failures.append("another input, the same receipt")
        shutil.rmtree(out)
    if code == HUNG:
        row.failures.append(f"{path.name} {how}: hung")

    def lift() -> None:
        path.write_bytes(raw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    lab.judge(row, out, f"{path.name} {how}", lift=lift)


def _spoil(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "cut short":
        del raw[random.randrange(len(raw)) :]
    else:
        for _ in range(3):
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    path.write_bytes(raw)
