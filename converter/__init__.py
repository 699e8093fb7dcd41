"""Base model plus LoRA adapter → ready-to-serve 4-bit checkpoint, streamed."""

from __future__ import annotations

from converter.errors import ConversionFailed, ConversionRefused, ConverterError
from converter.recipe import Recipe
