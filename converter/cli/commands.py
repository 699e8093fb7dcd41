"""All commands. A new one is a file of its own beside this one, and a line here."""

from __future__ import annotations

from converter.cli.batch import batch
from converter.cli.benchmark import benchmark
from converter.cli.completion import completion
from converter.cli.convert import cli
from converter.cli.doctor import doctor
from converter.cli.evaluate import evaluate
from converter.cli.export import export
from converter.cli.pipeline import pipeline
from converter.cli.report import report
from converter.cli.sign import provenance, sign
from converter.cli.verify import verify

for command in (verify, evaluate, benchmark, batch, pipeline, export, report, sign, provenance, doctor, completion):
    cli.add_command(command)

__all__ = ["cli"]
