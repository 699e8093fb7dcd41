"""The schemes of compressed-tensors: which values share a scale, what a code stands for, how both are stored.

https://github.com/vllm-project/compressed-tensors: `quantization/quant_scheme.py` (presets), `compressors/` (tensors).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from converter.model.servers import FUSED

VERSION = "0.20.0"
"""Of compressed-tensors, whose tensors and config ours equal; the config names it."""
GROUP_SIZES = (128, 64, 32)
"""Values that may share a scale in the integer schemes, those first that more servers' kernels take."""
LARGEST_E4M3, SMALLEST_E4M3, LARGEST_E2M1 = 448.0, 0.125, 6.0
"""The largest values of both floating-point types; what a scale in E4M3 is where it would be zero."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """One scheme, with its settings."""

    preset: str
    """Its name in compressed-tensors."""
    layout: str
    """`format` in the config: how codes are stored."""
    bits: int
    kind: Literal["int", "float"]
    strategy: Literal["group", "tensor_group", "channel", "block"]
    group: int | None = None
    """Values of a row that share a scale (group, tensor_group)."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale (block)."""
    searches: bool = False
    """Whether the scale of a group is searched (integers): `scale_search`."""
    scale_dtype: str | None = None
    """Of the scales, as torch spells it; None: the weight's."""
    activations: tuple[tuple[str, Any], ...] | None = None
    """How servers quantize activations; None: they don't."""

    @property
    def top(self) -> float:
        """What the largest absolute value that shares a scale becomes: half the range of the codes."""
        if self.kind == "int":
            return ((1 << self.bits) - 1) / 2
        return LARGEST_E4M3 if self.bits == 8 else LARGEST_E2M1

    @property
    def has_global_scale(self) -> bool:
        """Whether a weight has a scale for its scales, which the parts of what servers fuse share."""
        return self.strategy == "tensor_group"

    def extent(self, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if self.block is not None:
            return self.block
        return (1, columns if self.group is None else self.group)

    def scales_shape(self, shape: Shape) -> Shape:
        """The scales of a weight of `shape` (out_features, in_features), or of some rows of it."""
        rows, columns = self.extent(shape[1])
        return (-(shape[0] // -rows), -(shape[1] // -columns))

    def fits(self, shape: Shape) -> bool:
        """Whether a weight of `shape` (out_features, in_features) can be stored: groups don't go from row to row."""
        return self.group is None or shape[1] % self.group == 0

    def tensors(self, module: str, shape: Shape, dtype: str) -> dict[str, tuple[str, Shape]]:
        """What a weight of `shape` is stored as: name → dtype as safetensors spells it, and shape.

        `dtype` is that of tensors that aren't quantized.
        """
        scales = self.scales_shape(shape)
        if self.layout == "pack-quantized":
            return {
                f"{module}.weight_packed": ("I32", (shape[0], -(shape[1] * self.bits // -32))),
                f"{module}.weight_scale": (dtype, scales),
                f"{module}.weight_shape": ("I64", (2,)),
            }
        if self.layout == "float-quantized":
            return {f"{module}.weight": ("F8_E4M3", shape), f"{module}.weight_scale": (dtype, scales)}
        stored = "U8" if self.scale_dtype == "torch.uint8" else "F8_E4M3"
        tensors: dict[str, tuple[str, Shape]] = {
            f"{module}.weight_packed": ("U8", (shape[0], shape[1] // 2)),
            f"{module}.weight_scale": (stored, scales),
        }
        if self.has_global_scale:
            tensors[f"{module}.weight_global_scale"] = ("F32", (1,))
        return tensors

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """The config's `quantization_config`; `ignore`: modules of a quantized kind that are not.

        `ModelCompressor.update_config` of compressed-tensors
        """
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": True,
            "group_size": self.group,
            "strategy": self.strategy,
            "dynamic": False,
        }
        if self.block is not None:
            weights["block_structure"] = list(self.block)
        if self.scale_dtype is not None:
            weights["scale_dtype"] = self.scale_dtype
        scheme = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if self.activations is None else dict(self.activations),
            "output_activations": None,
            "format": self.layout,
        }
        return {
            "config_groups": {"group_0": scheme},
            "format": self.layout,
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }


def _dynamic(strategy: str, group: int | None) -> tuple[tuple[str, Any], ...]:
    """Activations in E4M3, with scales that servers take while they run."""
    settings = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": group, "strategy": strategy}
    return (*settings.items(), ("dynamic", True))


SCHEMES: dict[str, Scheme] = {
    "w4a16": Scheme("W4A16", "pack-quantized", 4, "int", "group", 128),
    "w8a16": Scheme("W8A16", "pack-quantized", 8, "int", "group", 128),
    "fp8": Scheme("FP8_DYNAMIC", "float-quantized", 8, "float", "channel", activations=_dynamic("token", None)),
    "fp8-block": Scheme(
        "FP8_BLOCK", "float-quantized", 8, "float", "block", block=(128, 128), activations=_dynamic("group", 128)
    ),
    "nvfp4a16": Scheme(
        "NVFP4A16", "nvfp4-pack-quantized", 4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn"
    ),
    "mxfp4a16": Scheme("MXFP4A16", "mxfp4-pack-quantized", 4, "float", "group", 32, scale_dtype="torch.uint8"),
}
"""By the name that a recipe gives it."""


def fused_with(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Weight → the weights among `names` that servers fuse with it, itself included, in their order in `names`."""
    parts: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        number = next((number for number, group in enumerate(FUSED) if last in group), last)
        parts.setdefault((module, number), []).append(name)
    return {name: tuple(group) for group in parts.values() for name in group}
