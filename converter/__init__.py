"""Base model plus LoRA adapter → ready-to-serve 4-bit checkpoint, streamed."""

from converter.batch.batch import convert_batch
from converter.batch.jobs import Job, read_jobs
from converter.batch.members import Outcome, Terms
from converter.errors import ConversionFailed, ConversionRefused, ConverterError
from converter.merge.adapter import Adapter
from converter.pipeline import Progress, Report, convert, plan_conversion
from converter.plan.budget import Resources
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint, LocalFolder
from converter.recipe import Recipe

__all__ = [
    "Adapter",
    "Checkpoint",
    "ConversionFailed",
    "ConversionRefused",
    "ConverterError",
    "Fidelity",
    "Inputs",
    "Job",
    "LocalFolder",
    "Outcome",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "Resources",
    "Terms",
    "convert",
    "convert_batch",
    "make_plan",
    "plan_conversion",
    "read_jobs",
]
