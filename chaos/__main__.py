"""Try every fault, print a table, end with 1 if anything was lost that may not be."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from chaos import batches, disks, processes
from chaos.trial import Lab, Row, fresh


def experiments(lab: Lab, *, short: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """By the name on the command line."""
    scenes = processes.SCENES[:1] if short else processes.SCENES
    return {
        "kills": lambda: processes.kills(lab, 12 if short else 1, scenes),
        "errors": lambda: processes.errors(lab, 30 if short else 1),
        "instants": lambda: processes.instants(lab, 4 if short else 60),
        "memory": lambda: processes.memory(lab, 15 if short else 1),
        "damage": lambda: processes.damage(lab, 2 if short else 40),
        "full": lambda: disks.full(lab, 12 if short else 1),
        "dying": lambda: disks.dying(lab, 2 if short else 40),
        "power": lambda: disks.power(lab, 40 if short else 1, 3 if short else 60),
        "batch": lambda: batches.batch(prepare_batch(lab), 80 if short else 1, 150 if short else 5, 2 if short else 60),
    }


def prepare(place: Path) -> Lab:
    """Inputs, an earlier conversion, and what an undisturbed one gives; the libraries are loaded."""
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    import torch

    from converter import Recipe, Resources, convert
    from converter.silence import quietly

    torch.set_num_threads(1)
    with quietly():
        from tests.models import save_adapter, save_base

        base = save_base(place / "base", "llama", sharded=True, num_hidden_layers=1, vocab_size=6000)
        adapter = save_adapter(place / "adapter", base, "llama")
    lab = Lab(place, base, {"": adapter})
    other = Recipe(max_shard_size=1_000_000, double_quant=False)
    convert(base, adapter, place / "earlier", other, Resources(threads=1))
    lab.learn()
    return lab


def prepare_batch(lab: Lab) -> Lab:
    """Three adapters on the same base: two of the same modules, one of more."""
    from converter.silence import quietly

    place = fresh(lab.place / "batch")
    with quietly():
        from tests.models import save_adapter

        attention = {"target_modules": ["q_proj", "v_proj"]}
        adapters = {
            name: save_adapter(place / f"adapter {name}", lab.base, "llama", scale=0.02 * number, **settings)
            for number, (name, settings) in enumerate({"a": attention, "b": attention, "c": {}}.items(), 1)
        }
    several = Lab(place, lab.base, adapters, batches.KIND)
    several.learn()
    return several


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| fault | tried | OUT absent | OUT whole | resumed to the same bytes | tensors made twice, at most | losses "
        "| command |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.fault} | skipped: {row.skipped} | | | | | | `{row.command}` |")
        else:
            cells = (row.fault, row.tried, row.absent, row.whole, row.resumed, row.lost, len(row.failures))
            lines.append("| " + " | ".join(map(str, cells)) + f" | `{row.command}` |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="kills, errors, instants, memory, damage, full, dying, power, batch")
    parser.add_argument("--short", action="store_true", help="a sample of each")
    parser.add_argument("--json", type=Path, help="the figures, as JSON")
    options = parser.parse_args()
    rows: list[Row] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        lab = prepare(Path(folder))
        wanted = experiments(lab, short=options.short)
        for kind in options.kinds or wanted:
            reason = ""
            if kind in ("kills", "errors", "power", "batch") and shutil.which("strace") is None:
                reason = "needs strace"
            if kind in ("full", "dying", "power"):
                reason = disks.missing() or reason
            if reason:
                rows.append(Row(kind, f"python -m chaos {kind}", skipped=reason))
                print(f"{kind}: skipped: {reason}", file=sys.stderr)
                continue
            for row in wanted[kind]():
                rows.append(row)
                print(f"{time.monotonic() - started:5.0f} s  {row.fault}: {row.tried}", file=sys.stderr, flush=True)
                for failure in row.failures:
                    print(f"    {failure}", file=sys.stderr, flush=True)
    print(table(rows), end="")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
