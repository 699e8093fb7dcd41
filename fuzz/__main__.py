"""Fuzz every parser of foreign files for some minutes: python -m fuzz [--minutes 10] [--corpus build/fuzz]

With atheris, which is guided by coverage, where it is installed; else with hypothesis. Each target has a process of its
own and an equal share of the time. Ends with 1 if anything but one of our own errors was raised, or an input took more
than ten seconds; what did it is in the corpus folder, as crash-…: make it a test.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from fuzz.targets import STRANGE, TARGETS, mutated

SECONDS_OF_AN_INPUT = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path, default=Path("build", "fuzz"))
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--hypothesis", action="store_true", help="even where atheris is installed")
    arguments = parser.parse_args()
    names = [arguments.target] if arguments.target else list(TARGETS)
    guided = find_spec("atheris") is not None and not arguments.hypothesis
    seconds = arguments.minutes * 60 / len(names)
    crashes = runs = 0
    for name in names:
        corpus = arguments.corpus / name.replace(" ", "-")
        corpus.mkdir(parents=True, exist_ok=True)
        count, crashed = (_guided if guided else _unguided)(name, corpus, seconds)
        runs, crashes = runs + count, crashes + crashed
        print(f"{name:16} {count:>12,} runs  {'crash' if crashed else 'no crash'}", flush=True)
    print(f"{'all':16} {runs:>12,} runs  {crashes} crashes, by {'atheris' if guided else 'hypothesis'}")
    return 1 if crashes else 0


def _guided(name: str, corpus: Path, seconds: float) -> tuple[int, bool]:
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = corpus.with_name(f"{corpus.name}.dictionary")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in STRANGE if len(word) < 60))
    command = [sys.executable, "-m", "fuzz.guided", name, f"-max_total_time={int(seconds)}", f"-dict={words}"]
    command += [f"-timeout={SECONDS_OF_AN_INPUT}", "-max_len=8192", "-rss_limit_mb=2048", "-print_final_stats=1"]
    run = subprocess.run([*command, f"-artifact_prefix={corpus}/", corpus], capture_output=True, text=True, check=False)
    found = re.search(r"number_of_executed_units: (\d+)", run.stderr) or re.search(r"Done (\d+) runs", run.stderr)
    if run.returncode:
        print(run.stdout[-3_000:], run.stderr[-3_000:], file=sys.stderr)
    return int(found[1]) if found else 0, run.returncode != 0


def _escaped(word: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in word)


def _unguided(name: str, corpus: Path, seconds: float) -> tuple[int, bool]:
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import NoSuchExample

    target, end, count = TARGETS[name], time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as scratch:

        def crashes(raw: bytes) -> bool:
            nonlocal count
            count += 1
            start = time.monotonic()
            try:
                target.parse(raw, Path(scratch))
            except Exception:
                return True
            return time.monotonic() - start > SECONDS_OF_AN_INPUT

        options = settings(
            max_examples=2_000, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        while time.monotonic() < end:
            try:
                crash = find(mutated(target.seeds), crashes, settings=options)
            except NoSuchExample:
                continue
            (corpus / "crash-hypothesis").write_bytes(crash)
            print(f"{name}: {crash[:200]!r}", file=sys.stderr)
            return count, True
    return count, False


if __name__ == "__main__":
    sys.exit(main())
