"""torch by name: dtypes, devices; the bytes of a tensor, and whether its values are finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.errors import ConversionRefused, NotFinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

_EXPONENTS = {
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F80_0000),
    "float64": ("<u8", 0x7FF0_0000_0000_0000),
}
"""An integer of the dtype's size, and the bits of the exponent: only in NaN and infinity all of them are set."""
_AT_A_TIME = 1 << 17
"""Values whose exponents are in memory at a time: few enough for the processor's cache."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch, from safetensors' name or torch's own."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES.get(name, name))
    return dtype


def stored_dtype(value: Tensor) -> str | None:
    """The name that safetensors has for a tensor's dtype; None if it has none."""
    own = str(value.dtype).removeprefix("torch.")
    return next((name for name, torch_name in _TORCH_NAMES.items() if torch_name == own), None)


def torch_device(name: str) -> torch.device:
    """The device of this name; auto is an accelerator if there is one. `ConversionRefused` if it can't be used."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        why = str(exc).splitlines()[0]
        if name.startswith("cuda") and not torch.backends.cuda.is_built():
            why = "this PyTorch is built without CUDA: install a build for CUDA (pytorch.org/get-started), or use cpu"
        elif name.startswith("cuda") and not torch.cuda.is_available():
            why = "there is no CUDA device, or no driver for it (nvidia-smi lists them): use cpu"
        raise ConversionRefused(f"`device` {name}: {why}") from exc
    return device


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    import torch

    flat = value.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def all_finite(raw: bytes | memoryview, dtype: str) -> bool:
    """Whether no value is NaN or infinite: their bytes, and their dtype by safetensors' name or torch's."""
    import numpy

    kind, exponent = _EXPONENTS.get(_TORCH_NAMES.get(dtype, dtype), ("u1", None))
    if exponent is None:
        return True
    bits, mask = numpy.frombuffer(raw, kind), numpy.dtype(kind).type(exponent)
    # In parts, for the exponents of all would take as much memory as the values.
    parts = (bits[start : start + _AT_A_TIME] for start in range(0, bits.size, _AT_A_TIME))
    return all((part & mask).max() != mask for part in parts)


def refuse_not_finite(name: str, values: Tensor) -> None:
    """`NotFinite`, naming the tensor, if any value is NaN or infinite."""
    if not all_finite(as_bytes(values), str(values.dtype).removeprefix("torch.")):
        raise not_finite(name, values.dtype)


def not_finite(name: str, dtype: torch.dtype) -> NotFinite:
    return NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for {dtype}")
