"""Faults of a disk: it is full, becomes read-only, dies, or loses its power."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.processes import CHANGES, SCENES, calls_of, sample
from chaos.trial import Lab, Row, ended, fresh, kill_after, visible

_SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN: the filesystem answers everything with an error from now on
_NOT_EVEN_THE_LOG = 2


def _sh(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def missing() -> str:
    """Why disks can't be tried here; nothing if they can."""
    if os.geteuid() != 0:
        return "needs root, to mount"
    try:
        _sh("losetup", "-f")
        _sh("mkfs.ext4", "-V")
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"no loop device or no mkfs.ext4 here: {exc}"
    return ""


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    fresh(folder)
    _sh("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        _sh("umount", folder)


def make_image(image: Path, megabytes: int = 24) -> Path:
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    _sh("mkfs.ext4", "-q", "-F", image)
    return image


@contextmanager
def mounted(image: Path, folder: Path, options: str = "loop") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    _sh("mount", "-o", options, image, folder)
    try:
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            # A namespace that was made meanwhile has it mounted still, in the state that an experiment left.
            raise RuntimeError(f"{image} is read-only from the start: run this while nobody makes mount namespaces")
        yield folder
    finally:
        _sh("umount", folder)


def full(lab: Lab, every: int) -> Iterator[Row]:
    """Room for a part of the output only."""
    whole = sum(len(raw) for files in lab.whole.values() for raw in files.values())
    row = Row("ENOSPC on a tmpfs of any size", "python -m chaos full")
    for size in range(16_384, whole + 400_000, 65_536 * every):
        with tmpfs(lab.place / "disk", size) as disk:
            if lab.run(lab.command(disk / "out")) == 0:
                break
            lab.judge(
                row,
                disk / "out",
                f"{size:,} bytes",
                lift=lambda disk=disk: _sh("mount", "-o", "remount,size=64m", disk),
            )
    yield row
    row = Row("ENOSPC on ext4 with any room", "python -m chaos full")
    for free in range(0, whole + 400_000, 65_536 * every):
        with mounted(make_image(lab.place / "image"), lab.place / "disk") as disk:
            ballast = disk / "ballast"
            _fill(ballast, free)
            if lab.run(lab.command(disk / "out")) == 0:
                break
            lab.judge(row, disk / "out", f"{free:,} bytes", lift=ballast.unlink)
    yield row


def _fill(ballast: Path, free: int) -> None:
    """Take room, until this much is left."""
    piece = 32_768
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while (room := os.statvfs(ballast)).f_bavail * room.f_bsize > free:
            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)


def dying(lab: Lab, count: int) -> Iterator[Row]:
    """A disk that becomes read-only, or answers nothing but errors, while it is written."""
    for kind in ("becomes read-only", "answers every call with an error"):
        row = Row(f"ext4 that {kind} at a random instant", "python -m chaos dying")
        image, folder = lab.place / "image", lab.place / "disk"
        for _ in range(count):
            make_image(image)
            with mounted(image, folder, "loop,errors=remount-ro") as disk:
                pid = lab.start(lab.command(disk / "out"))
                time.sleep(random.uniform(0.0, lab.seconds))
                if kind == "becomes read-only":
                    _trigger(disk).write_text("1")
                else:
                    descriptor = os.open(disk, os.O_RDONLY)
                    with contextlib.suppress(OSError):
                        fcntl.ioctl(descriptor, _SHUT_DOWN, _NOT_EVEN_THE_LOG.to_bytes(4, "little"))
                    os.close(descriptor)
                ended(pid)
                made, said = lab.made, lab.said()
            subprocess.run(["e2fsck", "-fy", image], check=False, capture_output=True)
            with mounted(image, folder) as disk:
                lab.note_made(made)
                (lab.place / "said").write_text(said)
                lab.judge(row, disk / "out", kind)
        yield row


def _trigger(disk: Path) -> Path:
    device = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True).stdout
    return Path("/sys/fs/ext4") / Path(device.strip()).name / "trigger_fs_error"


def power(lab: Lab, every: int, count: int) -> Iterator[Row]:
    """The image as it is at an instant, without what the system had not written to it, mounted anew."""
    image, copy, folder = lab.place / "image", lab.place / "copy", lab.place / "disk"

    def look(row: Row, what: str) -> None:
        made = lab.made
        with mounted(copy, lab.place / "after") as after:
            lab.note_made(made)
            lab.judge(row, after / "out", what)

    row = Row("power loss at a random instant, ext4", "python -m chaos power")
    for _ in range(count):
        with mounted(make_image(image), folder) as disk:
            pid = lab.start(lab.command(disk / "out"))
            kill_after(pid, random.uniform(0.0, 1.2 * lab.seconds), signal.SIGKILL)
            _sh("cp", "--sparse=always", image, copy)
            done = bool(visible(disk / "out"))
        look(row, f"power, done: {done}")
    yield row

    row = Row("power loss at a system call that changes the disk, ext4", "python -m chaos power")
    for call, number in sample(calls_of(lab, SCENES[0], CHANGES), every):
        with mounted(make_image(image), folder) as disk:
            inject = f"inject={call}:signal=SIGKILL:when={number}"
            out = lab.command(disk / "out")
            lab.traced(out, "-o", os.devnull, "-e", f"trace={call}", "-e", inject)
            _sh("cp", "--sparse=always", image, copy)
        look(row, f"power at {call} {number}")
    yield row

    row = Row("power loss right after it said that it is done, ext4", "python -m chaos power")
    for _ in range(max(count // 4, 2)):
        with mounted(make_image(image), folder) as disk:
            lab.run(lab.command(disk / "out"))
            _sh("cp", "--sparse=always", image, copy)
        before = row.whole
        look(row, "power after the end")
        if row.whole == before:
            row.failures.append("it was said to be done, and is not there")
    yield row
