"""Base model plus LoRA adapter → ready-to-serve 4-bit checkpoint, streamed."""

from converter.adapter import Adapter
from converter.errors import ConversionFailed, ConversionRefused, ConverterError
from converter.inputs import Inputs
from converter.measure import Fidelity
from converter.pipeline import Progress, Report, convert
from converter.plan import Plan, make_plan
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
    "LocalFolder",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "convert",
    "make_plan",
]
