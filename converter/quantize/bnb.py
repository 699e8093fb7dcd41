"""The door to bitsandbytes: its library, its tables, its config. Nothing else imports it."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.silence import quietly

if TYPE_CHECKING:
    from torch import Tensor

    from converter.recipe import Recipe

NESTED_BLOCK = 256
"""Absmax values that share one nested absmax; fixed in `bitsandbytes.functional.quantize_4bit`."""


@cache
def functional() -> Any:
    """`bitsandbytes.functional`, imported when it is first needed."""
    with quietly():
        import bitsandbytes.functional

    return bitsandbytes.functional


def quantization_config(recipe: Recipe, skip_modules: Sequence[str] | None) -> dict[str, Any]:
    """What `transformers.BitsAndBytesConfig.to_dict` gives, less the keys that no loader reads."""
    four_bit = recipe.four_bit
    return {
        "bnb_4bit_compute_dtype": recipe.dtype if four_bit else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": recipe.quant_type if four_bit else "fp4",
        "bnb_4bit_use_double_quant": four_bit and recipe.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skip_modules is None else list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
    }


def quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and absmax (float32) of centred absmax: `quantize_blockwise` of bitsandbytes."""
    native = _native_quantize_blockwise() if centred.device.type == "cpu" else None
    if native is not None:
        return native(centred)
    codes, state = functional().quantize_blockwise(centred, blocksize=NESTED_BLOCK)
    return codes, state.absmax


@cache
def dynamic_map() -> Tensor:
    """What each code of an absmax stands for: float32 [256]. `bitsandbytes.functional.create_dynamic_map()`

    Seven decades, each with twice as many steps as the one below it, for both signs; and 0 and 1.
    https://arxiv.org/abs/1511.04561
    """
    import torch

    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        steps = 10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += steps.tolist() + (-steps).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _native_quantize_blockwise() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The function of bitsandbytes' CPU library that `quantize_blockwise` calls. A direct call saves importing the
    package, which takes a second. None where this version's library doesn't have it."""
    import torch

    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(str(Path(found.origin).with_name("libbitsandbytes_cpu.so"))).cquantize_blockwise_cpu_fp32
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_longlong] * 2
    function.restype = None

    def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.contiguous()
        codes = torch.empty(values.shape, dtype=torch.uint8)
        absmax = torch.empty(-(values.numel() // -NESTED_BLOCK), dtype=torch.float32)
        # A name keeps it alive: if two threads ask first, the cache drops the earlier map while the library reads it.
        code = dynamic_map()
        pointers = (tensor.data_ptr() for tensor in (code, values, absmax, codes))
        function(*pointers, NESTED_BLOCK, values.numel())
        return codes, absmax

    return quantize
