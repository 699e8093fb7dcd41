"""Whether this machine has what a conversion needs: versions, devices, kernels, caches, a disk, the Hub's login."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from converter.merge.change import Rounding
from converter.quantize.format import Rows
from converter.quantize.formats import format_of
from converter.read.cache import cache_folder
from converter.read.hub.login import Login, login
from converter.recipe import Recipe
from converter.tensors import as_bytes
from converter.threads import Buffers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.quantize.format import Encoder

PACKAGE = "nf4-converter"
RECIPE = Recipe("nf4", dtype="bfloat16")
"""Of the weight that is quantized everywhere."""
SLOW_DISK = 100_000_000
"""Bytes a second below which a disk, not the processor, decides how long a conversion takes."""
_ROWS, _COLUMNS = 256, 4096
_PIECE, _PIECES = 8 << 20, 8


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["good", "note", "wrong"]
    """note: a conversion works without it."""
    found: str
    step: str = ""
    """What to do about it, if it is not good."""


def examine(folder: Path, *, offline: bool = False) -> Iterator[Finding]:
    """Check everything; takes seconds. `folder`: where outputs will be written; its disk is measured."""
    yield from of_versions(requires(PACKAGE) or [], version)
    yield from of_devices()
    yield of_kernels()
    known = login(offline=offline)
    yield of_folder("cache", cache_folder(), "set XDG_CACHE_HOME to a folder that can be written")
    yield of_folder("Hub cache", known.cache, "set HF_HOME to a folder on a disk with room")
    yield of_disk(folder)
    yield of_login(known)


def of_versions(required: Iterable[str], installed: Callable[[str], str]) -> Iterator[Finding]:
    """Python and what we require; `installed` gives a package's version, or raises `PackageNotFoundError`."""
    from packaging.requirements import Requirement

    yield Finding("Python", "good", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for requirement in map(Requirement, required):
        extra = not (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        name, wanted = requirement.name, str(requirement.specifier)
        install = f"pip install '{name}{wanted}'"
        try:
            found = installed(name)
        except PackageNotFoundError:
            if not extra:
                yield Finding(name, "wrong", f"not installed, {wanted} is needed", install)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Finding(name, "note" if extra else "wrong", f"{found}, {wanted} is needed", install)
        elif not extra:
            yield Finding(name, "good", found)


def of_devices() -> Iterator[Finding]:
    """The processor; and each GPU, which must quantize a tensor to the bytes that the processor gives."""
    import torch

    yield Finding("processors", "good", f"{len(os.sched_getaffinity(0))} for this process")
    if not torch.cuda.is_available():
        has_driver = Path("/proc/driver/nvidia/version").exists()
        if has_driver and not torch.backends.cuda.is_built():
            step = "install the CUDA build of PyTorch: pytorch.org/get-started"
            yield Finding("GPU", "wrong", "there is a driver, but this PyTorch is built without CUDA", step)
        elif has_driver:
            yield Finding("GPU", "wrong", "there is a driver, but CUDA finds no device", "look at nvidia-smi")
        else:
            yield Finding("GPU", "note", "none; the processors convert", "")
        return
    expected = quantized_by(format_of(RECIPE).encoder(torch.device("cpu"), kernels=False), sample())
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        memory = torch.cuda.get_device_properties(device).total_memory
        name = f"{torch.cuda.get_device_name(device)}, {memory / 1e9:.0f} GB"
        try:
            found = quantized_by(format_of(RECIPE).encoder(device, kernels=False), sample().to(device))
        except RuntimeError as exc:
            step = "update its driver, or convert with `device` cpu"
            yield Finding(f"cuda:{number}", "wrong", f"{name}: {str(exc).splitlines()[0]}", step)
            continue
        yield of_comparison(f"cuda:{number}", name, expected, found)


def of_comparison(what: str, name: str, expected: bytes, found: bytes) -> Finding:
    """Whether a device gives the bytes that it should."""
    if found == expected:
        return Finding(what, "good", f"{name}: quantizes a tensor to the bytes that the processor gives")
    step = "convert with `device` cpu; test the card's memory and update its driver"
    return Finding(what, "wrong", f"{name}: quantizes a tensor to other bytes than the processor", step)


def of_kernels() -> Finding:
    """The compiled kernels: the bytes of bitsandbytes, and how fast."""
    import torch

    cpu = torch.device("cpu")
    expected = quantized_by(format_of(RECIPE).encoder(cpu, kernels=False), sample())
    try:
        encoder = format_of(RECIPE).encoder(cpu, kernels=True)
        found = quantized_by(encoder, sample())  # compiles them
    except ImportError:
        return Finding(
            "kernels", "note", "numba is missing, so quantizing takes several times longer", "pip install numba"
        )
    started = time.perf_counter()
    quantized_by(encoder, sample())
    rate = _ROWS * _COLUMNS / (time.perf_counter() - started) / 1e6
    if found != expected:
        step = "empty the cache folder, and install the versions of the package's constraints.txt"
        return Finding("kernels", "wrong", "they give other bytes than bitsandbytes", step)
    return Finding("kernels", "good", f"the bytes of bitsandbytes, {rate:.0f} million weights a second and thread")


def sample() -> Tensor:
    """A weight as models have them: (rows, columns), bfloat16, the same each time."""
    import torch

    values = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    return (values * 0.02).bfloat16()


def quantized_by(encoder: Encoder, weight: Tensor) -> bytes:
    """The codes and scales that an encoder makes of a weight."""
    rows = Rows("a sample", 0, weight, None, Rounding.of(RECIPE), "BF16")
    made = encoder.encode(rows, Buffers(pinned=False))
    raw = b"".join(bytes(as_bytes(values)) for _, _, values in made.pieces)
    return raw + (b"" if made.scales is None else bytes(as_bytes(made.scales)))


def of_folder(what: str, folder: Path, step: str) -> Finding:
    """Whether files can be kept there."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Finding(what, "wrong", f"{folder}: can't be written", step)
    status = os.statvfs(nearest)
    return Finding(what, "good", f"{folder}: {status.f_bavail * status.f_frsize / 1e9:.1f} GB free")


def of_disk(folder: Path) -> Finding:
    """How fast a file is written there, durably, and read again from the disk."""
    folder = folder.expanduser()
    raw = os.urandom(_PIECE)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(_PIECES):
                file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            written = _PIECE * _PIECES / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(_PIECE):
                pass
            read = _PIECE * _PIECES / (time.perf_counter() - started)
    except OSError as exc:
        return Finding("disk", "wrong", f"{folder}: {exc.strerror}", "give a folder in which you may write")
    found = f"{folder}: writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s"
    if min(written, read) < SLOW_DISK:
        return Finding("disk", "note", found, "a conversion waits for this disk; put base and OUT on a faster one")
    return Finding("disk", "good", found)


def of_login(known: Login) -> Finding:
    """Whether gated and private repositories can be read."""
    if known.user is not None:
        return Finding("Hub", "good", f"{known.endpoint}: logged in as {known.user}")
    if known.problem:
        step = "log in anew with `hf auth login`, or unset HF_TOKEN; without a network, give `offline`"
        return Finding("Hub", "wrong", f"{known.endpoint}: a token is there, but: {known.problem}", step)
    if known.has_token:
        return Finding("Hub", "note", f"{known.endpoint}: a token is there; nobody was asked whose it is")
    return Finding("Hub", "note", f"{known.endpoint}: not logged in", "for gated models: `hf auth login`")
