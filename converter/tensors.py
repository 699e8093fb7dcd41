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
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

_AT_A_TIME = 1 << 18
"""Values that are looked at together."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch, from safetensors' name or torch's own."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES.get(name, name))
    return dtype


def torch_device(name: str) -> torch.device:
    """The device that `--device` names; auto is an accelerator if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise ConversionRefused(f"--device {name}: {str(exc).splitlines()[0]}") from exc
    return device


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    import torch

    flat = value.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def refuse_not_finite(name: str, values: Tensor) -> None:
    """`NotFinite`, naming the tensor, if any value is NaN or infinite."""
    if not values.is_floating_point():
        return
    flat = values.flatten()
    for start in range(0, flat.numel(), _AT_A_TIME):  # a mask as large as the values would count as memory
        if not bool(flat[start : start + _AT_A_TIME].isfinite().all()):
            raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for {values.dtype}")
