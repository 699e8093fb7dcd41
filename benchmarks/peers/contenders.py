"""What is measured side by side: each tool's command for one job, and ours for the same output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]


@dataclass(frozen=True)
class Inputs:
    """What every contender starts from."""

    base: Path
    adapter: Path
    merged: Path
    """Base and adapter merged in 16 bits, for tools that only quantize."""


@dataclass(frozen=True)
class Contender:
    """One tool at one job."""

    job: str
    """What comes out; those of one job are compared."""
    tool: str
    environment: str | None
    """The name of its environment in build/peers; None: that of this project."""
    command: Callable[[Inputs, Path], list[object]]
    """Makes its arguments after python, from the inputs and from an empty folder. All that it writes goes there; its
    result is `out` in that folder."""

    @property
    def name(self) -> str:
        return f"{self.tool}: {self.job}"

    @property
    def ours(self) -> bool:
        return self.tool == "convert"

    def line(self, inputs: Inputs, room: Path, environments: Path) -> list[str]:
        """The whole command."""
        python = environments / self.environment / "bin" / "python" if self.environment else sys.executable
        return [str(word) for word in (python, *self.command(inputs, room))]


def _convert(form: str) -> Callable[[Inputs, Path], list[object]]:
    def command(inputs: Inputs, room: Path) -> list[object]:
        start = ["-m", "converter", "--base", inputs.base, "--adapter", inputs.adapter]
        return [*start, "--out", room / "out", "--format", form]

    return command


def _script(name: str) -> Callable[[Inputs, Path], list[object]]:
    return lambda inputs, room: [HERE / f"{name}.py", inputs.base, inputs.adapter, room / "out"]


def _mergekit(inputs: Inputs, room: Path) -> list[object]:
    model = f"{inputs.base}+{inputs.adapter}"
    stated = {"models": [{"model": model}], "merge_method": "passthrough", "dtype": "bfloat16"}
    (room / "merge.yml").write_text(json.dumps(stated))  # JSON is YAML
    places = [room / "merge.yml", room / "out", "--lora-merge-cache", room / "cache"]
    return ["-m", "mergekit.scripts.run_yaml", *places, "--lazy-unpickle"]


def _usual_flow(inputs: Inputs, room: Path) -> list[object]:
    places = ["--merged", room / "merged", "--out", room / "out"]
    return [REPO / "benchmarks" / "reference_flow.py", "--base", inputs.base, "--adapter", inputs.adapter, *places]


def _llm_compressor(scheme: str) -> Callable[[Inputs, Path], list[object]]:
    script = REPO / "fixtures" / "real" / "data_free.py"
    return lambda inputs, room: [script, "--merged", inputs.merged, "--out", room / "out", "--format", scheme]


def _auto_round(inputs: Inputs, room: Path) -> list[object]:
    return [HERE / "auto_round_model_free.py", inputs.merged, room / "out"]


CONTENDERS = (
    Contender("16 bits", "convert", None, _convert("bf16")),
    Contender("16 bits", "mergekit", "mergekit", _mergekit),
    Contender("16 bits", "axolotl", "axolotl", _script("axolotl_merge")),
    Contender("16 bits", "unsloth-zoo", "unsloth-zoo", _script("unsloth_merge")),
    Contender("16 bits", "PEFT + transformers", None, _script("peft_merge")),
    Contender("NF4", "convert", None, _convert("nf4")),
    Contender("NF4", "PEFT + transformers", None, _usual_flow),
    Contender("4-bit integers", "convert", None, _convert("w4a16")),
    Contender("4-bit integers", "llm-compressor", "llm-compressor", _llm_compressor("W4A16")),
    Contender("4-bit integers", "AutoRound", "auto-round", _auto_round),
    Contender("FP8", "convert", None, _convert("fp8")),
    Contender("FP8", "llm-compressor", "llm-compressor", _llm_compressor("FP8_DYNAMIC")),
)
