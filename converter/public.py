"""The public names: what `from converter import …` gives."""

from converter.api import convert, evaluate, plan_conversion, summary, verify
from converter.batch.batch import convert_batch
from converter.batch.job_file import read_jobs
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome
from converter.calibration import Calibration
from converter.combination import Combination
from converter.errors import ConversionFailed, ConversionRefused, ConverterError, GateFailed
from converter.evaluation import Evaluation
from converter.gates import Gates, QualityGates
from converter.job import Job
from converter.merge.adapter import Adapter
from converter.observer import Progress
from converter.pipeline import Report
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.plan.plan import Plan
from converter.quantize.measure import Fidelity
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.recipe import Recipe
from converter.resources import Resources
from converter.verification import Verification

__all__ = [
    "Adapter",
    "BatchOptions",
    "Calibration",
    "Checkpoint",
    "Combination",
    "ConversionFailed",
    "ConversionRefused",
    "ConverterError",
    "Evaluation",
    "Fidelity",
    "GateFailed",
    "Gates",
    "Inputs",
    "Job",
    "LocalFolder",
    "Outcome",
    "Plan",
    "Progress",
    "QualityGates",
    "Recipe",
    "Report",
    "Resources",
    "Verification",
    "convert",
    "convert_batch",
    "evaluate",
    "make_plan",
    "plan_conversion",
    "read_jobs",
    "summary",
    "verify",
]
