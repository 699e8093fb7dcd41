"""Base model plus LoRA adapter → ready-to-serve 4-bit checkpoint, streamed."""

from converter.adapter import Adapter
from converter.batch import convert_batch
from converter.budget import Resources
from converter.decide import make_plan
from converter.errors import ConversionFailed, ConversionRefused, ConverterError
from converter.inputs import Inputs
from converter.jobs import Job, read_jobs
from converter.measure import Fidelity
from converter.members import Outcome, Terms
from converter.pipeline import Progress, Report, convert, plan_conversion
from converter.plan import Plan
from converter.read import Checkpoint, LocalFolder
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
