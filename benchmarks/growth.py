"""How time and memory grow: with the base, its tensors, the adapters of a batch, and the rank. `make growth`.

    python benchmarks/growth.py [--only sizes tensors adapters ranks] [--runs 2] [--work build/growth] [--result FILE]

Time is the processor's, and above the imports', so that what else a machine does changes it little. Each model is made,
measured and deleted; the largest takes 16 GB of disk, and its output 6. Writes the result after each model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import REPO, caches_in, measure

HERE = Path(__file__).resolve().parent
SIZES = ("0.1", "0.3", "1.1", "3.2", "8")
ADAPTERS = (2, 20, 200)
RANKS = (16, 64, 256)
KEPT = ("seconds", "cpu_seconds", "peak", "anonymous", "children")


@dataclass
class Growth:
    """One run."""

    work: Path
    place: Path
    runs: int
    result: dict[str, Any] = field(default_factory=dict)

    def run(self, *words: object) -> dict[str, Any]:
        """Run python on something, as the same user each time: compiled kernels and answers are remembered."""
        os.sync()
        done = measure([sys.executable, *map(str, words)], caches_in(self.work))
        if done.status:
            raise SystemExit(f"growth: exit status {done.status}: {words}\n{done.errors[-2000:]}")
        return {key: getattr(done, key) for key in KEPT}

    def model(self, name: str, *words: object) -> Path:
        self.run(HERE / "models.py", name, self.work / name, *words)
        return self.work / name

    def converted(self, base: Path, *adapters: Path, again: bool = True, form: str = "nf4") -> dict[str, Any]:
        """Medians are not taken here: all runs are kept. The first of a checkpoint asks transformers, and isn't."""
        out = self.work / "out"
        given = [word for adapter in adapters for word in ("--adapter", adapter)]
        runs = []
        for number in range(self.runs + again):
            runs.append(self.run("-m", "converter", "--base", base, *given, "--out", out, "--format", form))
            shutil.rmtree(out)
            print(f"growth: {base}, {len(adapters)} adapters, {number}: {runs[-1]}", file=sys.stderr, flush=True)
        return {
            "base_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
            "adapter_bytes": sum(path.stat().st_size for folder in adapters for path in folder.glob("*.safetensors")),
            "first": runs[0] if again else None,
            "runs": runs[again:],
        }

    def keep(self, part: str, key: object, found: dict[str, Any]) -> None:
        self.result.setdefault(part, {})[str(key)] = found
        self.place.write_text(json.dumps(self.result, indent=2) + "\n")


def sizes(growth: Growth) -> None:
    for name in SIZES:
        folder = growth.model(name)
        growth.keep("sizes", name, growth.converted(folder / "base", folder / "adapter"))
        shutil.rmtree(folder)


def tensors(growth: Growth) -> None:
    """To 16 bits: in NF4 it would be five times as many tensors, and a checkpoint may have 200,000."""
    folder = growth.model("many")
    growth.keep("tensors", 100_011, growth.converted(folder / "base", folder / "adapter", form="bf16"))
    shutil.rmtree(folder)


def adapters(growth: Growth) -> None:
    """On q_proj and v_proj of one base."""
    folder = growth.model("0.3", "--adapters", "qv", "--count", max(ADAPTERS))
    growth.converted(folder / "base", folder / "adapters" / "qv-0", again=False)  # so that transformers was asked
    for count in ADAPTERS:
        some = [folder / "adapters" / f"qv-{number}" for number in range(count)]
        growth.keep("adapters", count, growth.converted(folder / "base", *some, again=False))
    shutil.rmtree(folder)


def ranks(growth: Growth) -> None:
    folder = growth.model("1.1")
    for rank in RANKS:
        growth.model("1.1", "--rank", rank)
        growth.keep("ranks", rank, growth.converted(folder / "base", folder / f"adapter-{rank}"))
    shutil.rmtree(folder)


PARTS = {"sizes": sizes, "tensors": tensors, "adapters": adapters, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="the result keeps the rest")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=REPO / "build" / "growth")
    parser.add_argument("--result", type=Path, default=HERE / "growth.json")
    args = parser.parse_args()
    growth = Growth(args.work.resolve(), args.result, args.runs)
    growth.work.mkdir(parents=True, exist_ok=True)
    growth.result = json.loads(args.result.read_text()) if args.result.exists() else {}
    growth.run(HERE / "imports.py")
    growth.result["imports"] = [growth.run(HERE / "imports.py") for _ in range(args.runs)]
    for part in args.only:
        PARTS[part](growth)
    shutil.rmtree(growth.work)


if __name__ == "__main__":
    main()
