"""Measure conversions beside today's flow and beside the plain work of reading and writing, in fresh processes.

    python benchmarks/bench.py [--quick] [--only batch] [--work build/bench] [--runs 3] [--picture PATH] [--keep]

Makes the models, measures, and deletes them; prints a Markdown table, and writes every run into `result.json` and a
picture into the work folder. The full run needs 20 GB of disk and twenty minutes; `--quick` does the smallest model
alone, `--only batch` the batches alone, `--only paths` each way to convert alone, `--only tuners` adapters of
other kinds than LoRA alone.
"""

from __future__ import annotations

# Nothing heavy is imported before the last measurement: a large parent takes memory from what it measures.
import argparse
import itertools
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import REPO, Measured, caches_in, measure
from plain import evict
from report import table

HERE = Path(__file__).resolve().parent
PACKAGES = ("nf4-converter", "torch", "numba", "numpy", "transformers", "peft", "bitsandbytes", "safetensors")
REFERENCE_NEEDS = 3.1
"""Memory that the reference flow takes, as a multiple of the base."""
ADAPTERS = 10
"""In a batch."""

_AS_WITHOUT_NUMBA = "import sys; sys.modules['numba'] = None; from converter.cli.main import console; console()"

Runs = list[dict[str, Any]]


@dataclass
class Bench:
    """One run of the benchmark."""

    work: Path
    runs: int
    keep: bool
    result: dict[str, Any] = field(default_factory=dict)

    def script(self, name: str, *arguments: object) -> Measured:
        """Run one of the scripts beside this one."""
        return self._run([sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)])

    def convert(self, *arguments: object, status: int = 0, numba: bool = True) -> Measured:
        """Run the command line, as if numba were not installed unless `numba`."""
        program = ["-m", "converter"] if numba else ["-c", _AS_WITHOUT_NUMBA]
        return self._run([sys.executable, *program, *map(str, arguments)], status)

    def forget(self) -> None:
        """Make the next conversion the first one of this user: no compiled kernels, no answers remembered."""
        for folder in caches_in(self.work).values():
            remove(Path(folder))

    def model(self, name: str) -> Path:
        """The folder of a model, made where it is missing, and out of the file cache."""
        self.say(f"making the model {name}")
        self.script("models", name, self.work / name)
        return self.work / name

    def save(self) -> None:
        """Write what was measured so far: what is measured later may fail."""
        (self.work / "result.json").write_text(json.dumps(self.result, indent=2) + "\n")

    def say(self, what: str) -> None:
        print(f"bench: {what}", file=sys.stderr, flush=True)

    def _run(self, command: list[str], status: int = 0) -> Measured:
        os.sync()  # what was written or deleted before is no part of it
        run = measure(command, caches_in(self.work))
        if run.status != status:
            tail = "\n".join(run.errors.strip().splitlines()[-15:])
            raise SystemExit(f"bench: exit status {run.status}, expected {status}: {' '.join(command)}\n{tail}")
        return run


def measure_imports(bench: Bench) -> None:
    """The floor of every conversion, and the commands that should take next to nothing."""
    bench.say("imports, and commands that take no conversion")
    bench.forget()
    bench.script("imports")  # brings the libraries into the file cache, compiles the kernels
    bench.result["imports"] = [figures(bench.script("imports")) for _ in range(bench.runs)]
    bench.result["help"] = [figures(bench.convert("--help")) for _ in range(bench.runs)]
    nowhere = ("--base", "./nowhere", "--out", bench.work / "out")
    bench.result["refusal"] = [figures(bench.convert(*nowhere, status=2)) for _ in range(bench.runs)]


def measure_stages(bench: Bench) -> None:
    """Each stage that computes, alone."""
    bench.say("each stage alone")
    bench.result["stages"] = json.loads(bench.script("stages").output)
    bench.say("each format's encoder and each scheme's reader alone")
    bench.result["schemes"] = json.loads(bench.script("schemes").output)


def measure_model(bench: Bench, name: str, *, reference: bool = True) -> None:
    """All that is measured of one model."""
    folder, out = bench.model(name), bench.work / "out"
    inputs = ("--base", folder / "base", "--adapter", folder / "adapter")
    base_bytes = size(folder / "base")

    def converted(*, cold: bool) -> dict[str, Any]:
        if cold:
            evict(folder / "base")
        run = bench.convert(*inputs, "--out", out, "--json")
        summary = json.loads(run.output)
        remove(out)
        kept = ("output_bytes", "predicted_memory_bytes")
        return figures(run) | {key: summary[key] for key in kept}

    bench.say(f"{name}: conversions and plain work")
    bench.forget()
    first = converted(cold=True)
    found: dict[str, Any] = {
        "base_bytes": base_bytes,
        "output_bytes": first["output_bytes"],
        "predicted_memory_bytes": first["predicted_memory_bytes"],
        "first": [first],
        "cold": [],
        "read cold": [],
        "read cached": [],
        "write": [],
    }
    for _ in range(bench.runs):  # in turns, because disks have moods
        evict(folder / "base")
        found["read cold"].append(json.loads(bench.script("plain", "read", folder / "base").output))
        written = bench.script("plain", "write", out, first["output_bytes"])
        found["write"].append(json.loads(written.output))
        out.unlink()
        found["cold"].append(converted(cold=True))
    found["read cached"] = [json.loads(bench.script("plain", "read", folder / "base").output)]
    found["cached"] = [converted(cold=False) for _ in range(bench.runs)]
    found["reference"] = measure_reference(bench, name, inputs, base_bytes) if reference else []
    bench.result["models"][name] = found
    bench.save()
    if not bench.keep:
        remove(folder)


def measure_reference(bench: Bench, name: str, inputs: tuple[object, ...], base_bytes: int) -> Runs:
    """Today's flow, once; not at all where there isn't the memory for it."""
    need = REFERENCE_NEEDS * base_bytes
    if (available := available_memory()) < need:
        bench.say(f"{name}: no reference flow: it needs {need / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free")
        return []
    bench.say(f"{name}: the reference flow")
    merged, out = bench.work / "merged", bench.work / "reference"
    evict(Path(str(inputs[1])))
    try:
        return [figures(bench.script("reference_flow", *inputs, "--merged", merged, "--out", out))]
    finally:
        remove(merged)
        remove(out)


def measure_batch(bench: Bench, name: str) -> None:
    """Ten adapters in one pass over a base, beside one alone, and beside ten, one after the other."""
    folder, out = bench.model(name), bench.work / "out"
    for kind in ("qv", "all"):
        bench.script("models", name, folder, "--adapters", kind, "--count", ADAPTERS)

    def converted(*adapters: str) -> dict[str, Any]:
        bench.script("plain", "read", folder / "base")  # into the file cache, should something have driven it out
        inputs = [word for adapter in adapters for word in ("--adapter", folder / "adapters" / adapter)]
        run = bench.convert("--base", folder / "base", *inputs, "--out", out, "--json")
        disk = disk_used(out)
        remove(out)
        return figures(run) | {"disk_bytes": disk}

    bench.forget()
    few, many = ([f"{kind}-{number}" for number in range(ADAPTERS)] for kind in ("qv", "all"))
    bench.say(f"{name}: a batch of {ADAPTERS} adapters on q_proj and v_proj")
    converted(few[0])  # compiles the kernels, and asks transformers
    found: dict[str, Any] = {"model": name, "adapters": ADAPTERS}
    bench.result["batch"] = found
    found["qv"] = {"alone": [], "batch": []}
    for _ in range(bench.runs):  # in turns
        found["qv"]["alone"].append(converted(few[0]))
        found["qv"]["batch"].append(converted(*few))
    bench.save()
    bench.say(f"{name}: a batch of {ADAPTERS} adapters on all linear layers, and each alone")
    half = ADAPTERS // 2
    before = [converted(adapter) for adapter in many[:half]]
    batch = converted(*many)  # amid the others, because disks have moods
    found["all"] = {"alone": before + [converted(adapter) for adapter in many[half:]], "batch": [batch]}
    bench.save()
    if not bench.keep:
        remove(folder)


WITHOUT_NUMBA = "NF4, without numba"
PATHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "NF4": ("base", ()),
    "16 bits": ("base", ("--format", "bf16")),
    "int8": ("base", ("--format", "int8")),
    "NF4, single quant": ("base", ("--no-double-quant",)),
    "NF4, float16 base": ("float16", ()),
    "NF4, float32 base": ("float32", ()),
    "16 bits, float32 base": ("float32", ("--format", "bf16")),
    "NF4, one thread": ("base", ("--threads", "1")),
    "NF4, Conv1D": ("conv1d", ()),
    WITHOUT_NUMBA: ("base", ()),
}
"""What people convert to and from, beside the usual: a path → its base, and what it takes on the command line."""


def measure_paths(bench: Bench, name: str) -> None:
    """Processor time of each path, on one model, in one run."""
    folder, out = bench.model(name), bench.work / "out"
    bench.forget()
    found: dict[str, Runs] = {path: [] for path in PATHS}
    bench.script("variants", name, folder)
    for number in range(bench.runs + 1):  # in turns; the first compiles, and asks transformers
        for path, (base, arguments) in PATHS.items():
            adapter = folder / ("adapter-conv1d" if base == "conv1d" else "adapter")
            words = ("--base", folder / base, "--adapter", adapter, "--out", out, *arguments)
            run = bench.convert(*words, numba=path != WITHOUT_NUMBA)
            remove(out)
            if number:
                found[path].append(figures(run))
    bench.result["paths"] = {"model": name, "runs": found}
    bench.save()
    if not bench.keep:
        remove(folder)


def measure_tuners(bench: Bench, name: str) -> None:
    """Adapters of several kinds on one base, in turns, beside the imports that each needs."""
    folder, out = bench.model(name), bench.work / "out"
    bench.script("tuners", name, folder)

    def converted(kind: str) -> dict[str, Any]:
        run = bench.convert(
            "--base", folder / "base", "--adapter", folder / "tuners" / kind, "--out", out, "--threads", 1, "--json"
        )
        remove(out)
        return figures(run) | {"predicted_memory_bytes": json.loads(run.output)["predicted_memory_bytes"]}

    bench.forget()
    bench.say(f"{name}: adapters of several kinds")
    kinds = [place.name for place in sorted((folder / "tuners").iterdir())]
    for kind in kinds:
        converted(kind)  # compiles the kernels, and asks transformers
    runs: dict[str, Runs] = {kind: [] for kind in kinds}
    floors: dict[str, Runs] = {"imports": [], "imports with PEFT": []}
    for _ in range(bench.runs):  # in turns
        floors["imports"].append(figures(bench.script("imports")))
        floors["imports with PEFT"].append(figures(bench.script("imports", "peft")))
        for kind, some in runs.items():
            some.append(converted(kind))
    bench.result["tuners"] = {"model": name, "kinds": runs, **floors}
    bench.save()
    if not bench.keep:
        remove(folder)


def measure_evaluation(bench: Bench, name: str) -> None:
    """An output measured on a short text, beside the 16-bit model, and one calibrated by it: how much memory one layer
    at a time takes."""
    bench.say(f"{name}: evaluation and calibration, one layer at a time")
    folder, out = bench.model(name), bench.work / "out"
    inputs = ("--base", folder / "base", "--adapter", folder / "adapter")
    bench.convert(*inputs, "--out", out)
    for part, place in itertools.product(("tokenizer.json", "tokenizer_config.json"), (out, folder / "base")):
        shutil.copy(REPO / "fixtures" / "tiny-base" / part, place)
    text = ("--text", Path(__file__), "--max-tokens", 2048)
    run = bench.convert("evaluate", out, *text, *inputs, "--memory", "200MB", "--scratch", bench.work)
    bench.result.setdefault("evaluation", {})[name] = figures(run) | {
        "base_bytes": size(folder / "base"),
        "output_bytes": size(out),
    }
    remove(out)
    calibrate = ("--calibrate", Path(__file__), "--calibrate-tokens", 2048)
    bench.result.setdefault("calibration", {})[name] = figures(bench.convert(*inputs, "--out", out, *calibrate)) | {
        "base_bytes": size(folder / "base"),
    }
    remove(out)
    bench.save()
    if not bench.keep:
        remove(folder)


def measure_plan(bench: Bench) -> None:
    """The plan for a model of 70 billion parameters, of which there are headers only."""
    folder = bench.model("70")
    bench.say("the plan of a 70B")
    bench.forget()
    command = ("--base", folder / "base", "--adapter", folder / "adapter", "--dry-run")
    bench.result["plan of a 70B"] = {
        "first": [figures(bench.convert(*command))],
        "again": [figures(bench.convert(*command)) for _ in range(bench.runs)],
    }
    remove(folder)


def figures(run: Measured) -> dict[str, Any]:
    """What is kept of a run."""
    kept = asdict(run)
    for key in ("status", "output", "errors"):
        del kept[key]
    return kept


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def disk_used(folder: Path) -> int:
    """Bytes on the disk of all files in a folder; one with several names counts once."""
    files = [path.lstat() for path in folder.rglob("*") if not path.is_dir()]
    return sum({(file.st_dev, file.st_ino): file.st_blocks * 512 for file in files}.values())


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def conditions() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    parser.add_argument(
        "--only", choices=["batch", "paths", "tuners", "evaluation"], help="this section alone, and the imports"
    )
    parser.add_argument("--work", type=Path, default=REPO / "build" / "bench", help="default: build/bench")
    parser.add_argument("--runs", type=int, help="of each command; the median counts (default: 3, --quick: 2)")
    parser.add_argument("--picture", type=Path, help="default: performance.png in the work folder")
    parser.add_argument("--keep", action="store_true", help="keep the models for the next run")
    args = parser.parse_args()
    runs: int = args.runs if args.runs is not None else 2 if args.quick else 3
    if runs < 1:
        parser.error("--runs: at least 1")
    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, runs, args.keep, conditions() | {"quick": args.quick, "models": {}})

    measure_imports(bench)
    if args.only is None:
        measure_stages(bench)
        for name in ["0.3"] if args.quick else ["0.3", "1.1", "3.2"]:
            measure_model(bench, name)
    if args.only in (None, "paths"):
        measure_paths(bench, "0.3" if args.quick else "1.1")
    if args.only in (None, "batch"):
        measure_batch(bench, "0.3" if args.quick else "1.1")
    if args.only in (None, "tuners"):
        measure_tuners(bench, "0.3")
    if args.only in (None, "evaluation"):
        for name in ["0.3"] if args.quick else ["1.1", "3.2"]:
            measure_evaluation(bench, name)
    if args.only is None and not args.quick:
        bench.runs = 1
        measure_model(bench, "wide", reference=False)
        measure_plan(bench)
    bench.forget()
    bench.save()
    print(table(bench.result))
    if bench.result["models"]:
        from picture import draw

        draw(bench.result, args.picture or work / "performance.png")


if __name__ == "__main__":
    main()
