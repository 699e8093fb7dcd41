"""What a registry shows of an output: tags, figures, the report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from converter.job import Job
from converter.read.addresses import is_registered
from converter.write.store import Told

REPORT = "report.html"


def telling(job: Job) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Told]:
    """What tells of the output of a job, from its receipt, and from the gates and the evaluation of a pipeline.

    Base and adapter are named by id and commit on the Hub, or by the address in a registry. Places of other kinds are
    private.
    """

    def tell(receipt: Mapping[str, Any], measured: Mapping[str, Any]) -> Told:
        def report() -> str:
            from converter.page import page

            return page(receipt, job.label, job.gates)

        origin, tags = receipt["origin"], {"fingerprint": receipt["fingerprint"]}
        tags["format"] = receipt["recipe"]["quant_type"]
        tags["architecture"] = receipt["architecture"]
        for name, asked in (("base", job.base), ("adapter", job.adapter)):
            address = os.fspath(asked) if isinstance(asked, str | os.PathLike) else ""
            if origin.get(f"{name}_name") is not None:
                tags[name] = origin[f"{name}_name"]
            elif is_registered(address):
                tags[name] = address
            if origin.get(f"{name}_commit") is not None:
                tags[f"{name}_commit"] = origin[f"{name}_commit"]
        figures = {"gates": asdict(job.gates), **receipt["summary"], **measured}
        return Told(tags, dict(_numbers(figures)), {REPORT: report})

    return tell


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, by their path: relative_error.worst."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)
