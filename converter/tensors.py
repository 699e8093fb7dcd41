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


def refuse_not_finite(name: str, values: Tensor, *, kernels: bool = False) -> None:
    """`NotFinite` if any value is NaN or infinite; `kernels`: without a mask as large as the values."""
    if not values.is_floating_point():
        return
    integers = {"bfloat16": ("uint16", 0x7F80), "float16": ("uint16", 0x7C00), "float32": ("uint32", 0x7F800000)}
    kind = integers.get(str(values.dtype).removeprefix("torch."))
    if kernels and kind is not None and values.is_contiguous():
        from converter.quantize.kernels import all_finite

        finite = all_finite(values.view(torch_dtype(kind[0])).numpy().ravel(), kind[1])
    else:
        finite = bool(values.isfinite().all())
    if not finite:
        raise NotFinite(f"{name}: holds a NaN or an infinity, or a value too large for {values.dtype}")
