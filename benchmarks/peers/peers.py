"""Measure other tools at their own job beside ours, in turns, each in an environment of its own: `make peers`.

    python benchmarks/peers/peers.py [--only times] [--model 1.1] [--killed 0.1] [--runs 2] [--result FILE]

Time, processor time, memory, bytes written and the distance from a float32 merge are those of the first model; what
kill -9 leaves is that of the second, once half of the bytes lie there, and once nearly all do. The base is in the file
cache. Writes the result after each step; takes half an hour and 20 GB of disk, environments included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

from contenders import CONTENDERS, HERE, Contender, Inputs  # noqa: E402
from killed import fresh, held, kill, loads, looks_complete  # noqa: E402
from measure import Measured, caches_in, measure  # noqa: E402

NAMES = ("mergekit", "axolotl", "unsloth-zoo", "llm-compressor", "auto-round")
MOMENTS = {"half of the bytes": 0.5, "nearly all bytes": 0.99}
"""When to kill: the share of its final bytes that lies there. A share of the time would depend on the machine."""
KEPT = ("seconds", "cpu_seconds", "peak", "children", "written")


@dataclass
class Peers:
    """One run."""

    work: Path
    place: Path
    environments: Path
    result: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        self.place.write_text(json.dumps(self.result, indent=2) + "\n")

    def quiet(self) -> dict[str, str]:
        """The environment of every tool: own caches, no packages from elsewhere, no network, no GPU."""
        alone = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        alone["OMP_WAIT_POLICY"] = "passive"  # spinning would count as work where others work, too
        return caches_in(self.work) | alone

    def run(self, line: list[str]) -> Measured:
        done = measure(line, self.quiet())
        if done.status:
            raise SystemExit(f"peers: exit status {done.status}: {' '.join(line)}\n{done.errors[-2000:]}")
        return done

    def say(self, what: str) -> None:
        print(f"peers: {what}", file=sys.stderr, flush=True)

    def model(self, name: str) -> Inputs:
        """Base and adapter, with a tokenizer, which several tools insist on; and the two merged."""
        folder = self.work / name
        self.run([sys.executable, str(REPO / "benchmarks" / "models.py"), name, str(folder)])
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REPO / "fixtures" / "tiny-base" / part, folder / "base")
        inputs = Inputs(folder / "base", folder / "adapter", folder / "merged")
        if not inputs.merged.exists():
            words = ["--base", inputs.base, "--adapter", inputs.adapter, "--out", inputs.merged, "--format", "bf16"]
            self.run([sys.executable, "-m", "converter", *map(str, words)])
        return inputs

    def line(self, contender: Contender, inputs: Inputs, room: Path) -> list[str]:
        return contender.line(inputs, room, self.environments)

    def error(self, inputs: Inputs, out: Path) -> dict[str, Any]:
        line = [sys.executable, str(HERE / "error.py"), str(inputs.base), str(inputs.adapter), str(out)]
        found: dict[str, Any] = json.loads(self.run(line).output)
        return found


def checkpoint(room: Path) -> Path:
    """The checkpoint in `out`: some tools make a folder in it."""
    configs = sorted((room / "out").rglob("config.json"), key=lambda path: len(path.parts))
    return configs[0].parent if configs else room / "out"


def measure_all(peers: Peers, name: str, runs: int) -> None:
    """Each contender, in turns."""
    inputs, rows = peers.model(name), peers.result["rows"]
    for number in range(runs):
        for contender in CONTENDERS:
            peers.say(f"{name} B, round {number + 1} of {runs}, {contender.name}")
            room = fresh(peers.work / "room")
            if contender.ours and not number:  # the first one of a user compiles, and asks transformers
                peers.run(peers.line(contender, inputs, room))
                fresh(room)
            peers.run([sys.executable, str(REPO / "benchmarks" / "plain.py"), "read", str(inputs.base)])
            os.sync()
            row = rows.setdefault(contender.name, {"job": contender.job, "tool": contender.tool, "runs": []})
            done = measure(line := peers.line(contender, inputs, room), peers.quiet())
            if done.status:  # the others go on
                peers.say(f"exit status {done.status}: {' '.join(line)}\n{done.errors[-2000:]}")
                row["failed"] = done.errors.strip().splitlines()[-1]
                peers.save()
                continue
            row["runs"].append({key: getattr(done, key) for key in KEPT})
            if not number:
                row["error"] = peers.error(inputs, checkpoint(room))
                row["output_bytes"] = held(checkpoint(room))
            peers.save()
    shutil.rmtree(peers.work / name)


def kill_all(peers: Peers, name: str) -> None:
    """What each contender leaves."""
    inputs = peers.model(name)
    for contender in CONTENDERS:
        peers.say(f"{name} B, killed: {contender.name}")
        room = fresh(peers.work / "room")
        done = measure(line := peers.line(contender, inputs, room), peers.quiet())
        if done.status or not looks_complete(checkpoint(room)):  # the others go on
            peers.say(f"exit status {done.status}, no checkpoint: {' '.join(line)}\n{done.errors[-2000:]}")
            continue
        whole, right = held(room), peers.error(inputs, checkpoint(room))
        found: dict[str, Any] = {}
        for moment, share in MOMENTS.items():
            fresh(room)
            line = peers.line(contender, inputs, room)
            if not kill(line, room, peers.quiet(), int(share * whole)):
                found[moment] = {"state": "ended before"}
                continue
            found[moment] = {"state": state(peers, inputs, checkpoint(room), right)}
            if share == min(MOMENTS.values()):  # and then the same command once more
                again = measure(line, peers.quiet())
                ended = again.status == 0 and looks_complete(checkpoint(room))
                found["again"] = "right" if ended and peers.error(inputs, checkpoint(room)) == right else "not right"
        peers.result["killed"][contender.name] = found
        peers.save()
    shutil.rmtree(peers.work / name)


def state(peers: Peers, inputs: Inputs, out: Path, right: dict[str, Any]) -> str:
    """What lies at OUT, in a word."""
    if not out.exists() or not any(out.rglob("*")):
        return "nothing"
    if not looks_complete(out):
        return "a part that loads" if loads(out) else "a part"
    try:
        same = peers.error(inputs, out) == right
    except SystemExit:
        same = False
    return "all of it" if same else "looks complete, wrong weights"


def versions(environments: Path) -> dict[str, str]:
    """Of the tools, and of what they run on."""
    found = {}
    for name in NAMES:
        package = "llmcompressor" if name == "llm-compressor" else name
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
        line = [str(environments / name / "bin" / "python"), "-c", code, package, "transformers", "torch"]
        own, transformers, torch = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
        found[name] = f"{own} (transformers {transformers}, torch {torch})"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="1.1")
    parser.add_argument("--killed", default="0.1")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", choices=["times", "killed"], help="this half; the result keeps the other one")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "peers")
    parser.add_argument("--result", type=Path, default=HERE / "peers.json")
    args = parser.parse_args()
    work = args.work.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    peers = Peers(work, args.result, args.work.resolve())
    peers.result = json.loads(args.result.read_text()) if args.result.exists() else {}
    peers.result |= {"versions": versions(peers.environments), "processors": len(os.sched_getaffinity(0))}
    if args.only != "killed":
        peers.result |= {"model": args.model, "rows": {}}
        measure_all(peers, args.model, args.runs)
    if args.only != "times":
        peers.result |= {"killed_model": args.killed, "killed": {}}
        kill_all(peers, args.killed)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
