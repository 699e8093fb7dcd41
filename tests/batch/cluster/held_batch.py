"""A program: a batch on a cluster whose workers are held by marks. It prints its outcomes, and errors as one line."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from converter import BatchOptions, Resources, read_jobs
from converter.batch.cluster.cluster import convert_on_cluster
from converter.batch.cluster.ray_cluster import connected
from converter.batch.observer import BatchObserver
from converter.cli.signals import Signals
from converter.errors import ConverterError
from tests.batch.cluster.held_worker import held_part


def main(jobs: str, address: str) -> None:
    observer = BatchObserver(stop=Signals())
    options = BatchOptions(Resources(threads=1))
    connect = partial(connected, work=held_part)
    try:
        outcomes = convert_on_cluster(read_jobs(Path(jobs)), options, address, observer, connect=connect)
    except ConverterError as exc:
        sys.stderr.write(f"error: {exc}\n")
        sys.exit(exc.exit_code)
    rows = [{"out": str(o.job.out), "status": o.status, "notes": o.notes, "message": o.message} for o in outcomes]
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
