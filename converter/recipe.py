"""The choices that shape the output's bytes, and the versions that do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, get_args

from converter.calibration import Calibration
from converter.combination import Combination
from converter.errors import BadRecipe

QuantType = Literal["auto", "nf4", "fp4", "int8", "none", "w4a16", "w8a16", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16"]
Dtype = Literal["auto", "bfloat16", "float16"]
MergePrecision = Literal["float32", "reference"]
RoundingRule = Literal["auto", "nearest", "adapter"]
MergeOnto = Literal["base", "dequantized"]
Loader = Literal["transformers", "vllm"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What `bitsandbytes.functional.quantize_4bit` accepts."""
ROUNDED = ("nf4", "fp4", "int8", "w4a16", "w8a16")
"""Quant types whose codes an adapter's directions, or a text, may choose."""
MOST_SCALE = 1000.0
GROUP_SIZES = (32, 64, 128)
"""What servers' kernels for compressed-tensors' integers accept."""

MERGED = {"bf16": "bfloat16", "fp16": "float16"}
"""The merged model, not quantized, by the dtype that it is in."""
_MEANT = {"4bit": "nf4", "4-bit": "nf4", "8bit": "int8", "8-bit": "int8", "llm.int8": "int8", "16bit": "none"}
_MEANT |= {dtype: name for name, dtype in MERGED.items()}


def format_meant(text: str) -> str | None:
    """The format that people mean who write 4bit, NF4 or bfloat16: one of `QuantType` or of `MERGED`."""
    text = _MEANT.get(text.lower(), text.lower())
    return text if text in get_args(QuantType) or text in MERGED else None


def instead_of_format(text: str) -> str:
    """What to do instead, for a name of another tool's format; empty where there is nothing to say."""
    name = text.lower()
    if name.startswith(("gguf", "q2", "q3", "q4", "q5", "q6", "q8", "iq")):
        return "llama.cpp makes its formats itself: write bf16, and give OUT to its convert_hf_to_gguf.py"
    if name.startswith(("gptq", "awq", "int4", "w4")):
        return "w4a16 is what servers run in place of GPTQ's and AWQ's files"
    return ""


def choices_of_format(text: str, dtype: object = "auto") -> dict[str, Any]:
    """A format by name, as choices of a recipe; `dtype` is the one that is asked for. `BadRecipe` if they differ."""
    name = format_meant(text)
    if name not in MERGED:
        return {"quant_type": name or text, "dtype": dtype}
    if dtype not in ("auto", MERGED[name]):
        raise BadRecipe(f"`format` {name} and `dtype` {dtype} exclude each other")
    return {"quant_type": "none", "dtype": MERGED[name]}


@dataclass(frozen=True)
class Recipe:
    """The choices that shape the output's bytes; part of the fingerprint. Raises `BadRecipe` for contradictions."""

    quant_type: QuantType = "auto"
    """nf4, fp4: four bits of bitsandbytes. int8: its LLM.int8. none: the merged model in 16 bits. Others are schemes of
    compressed-tensors: `quantize.schemes`. auto: what a base of bitsandbytes is in, with its double quant and block
    size, unless others are asked for; else nf4."""
    double_quant: bool = True
    """Quantize the absmax too (nf4 and fp4): 4.13 instead of 4.5 bits a weight at block size 64."""
    block_size: int = 64
    """Values that share one absmax (nf4 and fp4)."""
    dtype: Dtype = "auto"
    """The dtype of kept tensors, of `quant_state` and of compute. auto: the base's; bfloat16 for a float32 base."""
    merge_precision: MergePrecision = "float32"
    """float32: quantize the float32 sum. reference: round it to `dtype` first, as the usual flow does."""
    keep: tuple[str, ...] = ()
    """Patterns of modules to leave in 16 bits: a glob on the full path, or its last parts."""
    max_shard_size: int = 5_000_000_000
    """Bytes of tensors in one output file; a single weight may exceed it."""
    group_size: int | None = None
    """Values of a row that share a scale (w4a16 and w8a16). None: the largest of 128, 64, 32 that all weights allow."""
    scale_search: bool = False
    """Whether the scale of each group is the one that gives the smallest squared error (w4a16 and w8a16), not the one
    that the library takes from the largest value."""
    rounding: RoundingRule = "auto"
    """nearest: to the nearest code. adapter: so that what the adapter does survives. auto: adapter where the values of
    a quantized base lie on the output's code points, else nearest."""
    merge_onto: MergeOnto = "base"
    """dequantized: what the weights' NF4 codes stand for, which QLoRA trained on (none, for output in 16 bits)."""
    scale: float = 1.0
    """What the adapter's change is multiplied by."""
    target: Loader = "transformers"
    """Who loads the output: transformers takes experts in 16 bits only, vllm in NF4 only, one tensor for each (nf4)."""
    combine: Combination | None = None
    """How several adapters become the one that is merged."""
    calibration: Calibration | None = None
    """By which text the codes are chosen, so that what the weights make of their real inputs is kept."""

    def __post_init__(self) -> None:
        for value, allowed, option in (
            (self.quant_type, get_args(QuantType), "`quant_type`"),
            (self.dtype, get_args(Dtype), "`dtype`"),
            (self.merge_precision, get_args(MergePrecision), "`merge_precision`"),
            (self.block_size, BLOCK_SIZES, "`block_size`"),
            (self.rounding, get_args(RoundingRule), "`rounding`"),
            (self.merge_onto, get_args(MergeOnto), "`merge_onto`"),
            (self.target, get_args(Loader), "`target`"),
        ):
            if value not in allowed:
                instead = instead_of_format(str(value)) if value is self.quant_type else ""
                raise BadRecipe(
                    f"{option} {value}: expected one of {', '.join(map(str, allowed))}{instead and '; '}{instead}"
                )
        if self.max_shard_size < 1_000_000:
            raise BadRecipe(f"`max_shard_size` {self.max_shard_size}: expected at least 1MB")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise BadRecipe(f"`group_size` {self.group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}")
        if self.group_size is not None and self.quant_type not in ("w4a16", "w8a16"):
            named = "nf4, the default" if self.quant_type == "auto" else self.quant_type
            raise BadRecipe(f"`group_size` has no meaning with {named}: only w4a16 and w8a16 have groups")
        if self.scale_search and self.quant_type not in ("w4a16", "w8a16"):
            named = "nf4, the default" if self.quant_type == "auto" else self.quant_type
            raise BadRecipe(f"`scale_search` has no meaning with {named}: only w4a16 and w8a16 have it")
        if self.rounding == "adapter" and self.merge_precision == "reference":
            raise BadRecipe(
                "`rounding` adapter has no meaning with `merge_precision` reference, which rounds as PEFT does"
            )
        if self.rounding == "adapter" and self.quant_type not in ("auto", *ROUNDED):
            raise BadRecipe(
                f"`rounding` adapter has no meaning with {self.quant_type}: only {', '.join(ROUNDED)} have it"
            )
        if self.merge_onto == "dequantized" and self.quant_type != "none":
            raise BadRecipe(
                "`merge_onto` dequantized is for output in 16 bits: give `quant_type` none. Codes of four bits made of "
                "the 16-bit base are closer to it than codes of codes"
            )
        if self.target == "vllm" and self.quant_type not in ("auto", "nf4"):
            raise BadRecipe(f"`target` vllm has no meaning with {self.quant_type}: only nf4 depends on who loads it")
        if not (math.isfinite(self.scale) and abs(self.scale) <= MOST_SCALE and self.scale):
            raise BadRecipe(f"`scale` {self.scale:g}: expected a number that is not 0, at most {MOST_SCALE:g}")
        if self.calibration is not None and self.quant_type not in ("auto", *ROUNDED):
            raise BadRecipe(
                f"`calibrate` has no meaning with {self.quant_type}: only {', '.join(ROUNDED)} are calibrated"
            )
        if self.keep and self.quant_type == "none":
            raise BadRecipe("`keep` has no meaning with `quant_type` none: nothing is quantized")

    @property
    def four_bit(self) -> bool:
        return self.quant_type in ("nf4", "fp4")

    def resolved(self, base_dtype: str) -> Recipe:
        """The recipe with quant type and `dtype` decided, given the dtype of the base's weights as safetensors spells
        it."""
        dtype = self.dtype if self.dtype != "auto" else "float16" if base_dtype == "F16" else "bfloat16"
        return replace(self, dtype=dtype, quant_type="nf4" if self.quant_type == "auto" else self.quant_type)

    def merged(self) -> Recipe:
        """The recipe of the merged model in 16 bits, of which this one's output is made."""
        return Recipe(
            quant_type="none",
            dtype=self.dtype,
            merge_precision=self.merge_precision,
            merge_onto=self.merge_onto,
            scale=self.scale,
            combine=self.combine,
        )

    @classmethod
    def from_json(cls, stated: object) -> Recipe:
        """A recipe from JSON or TOML values, such as `as_json` gives. `BadRecipe` for anything else."""
        if not isinstance(stated, dict) or not stated.keys() <= {field.name for field in fields(cls)}:
            raise BadRecipe("not a table of a recipe's names and values")
        keep = stated.get("keep", [])
        keep = [keep] if isinstance(keep, str) else keep
        if not isinstance(keep, list) or not all(isinstance(text, str) and text.isprintable() for text in keep):
            raise BadRecipe("keep is not a list of texts")
        for key in ("double_quant", "scale_search"):
            if not isinstance(stated.get(key, False), bool):
                raise BadRecipe(f"{key} is neither true nor false")
        for key, what in (
            ("max_shard_size", "a number of bytes"),
            ("block_size", "a number"),
            ("group_size", "a number"),
        ):
            # Python compares numbers of any length, but prints none of thousands of digits.
            if type(stated.get(key, 0)) is not int or stated.get(key, 0) >= 2**63:
                raise BadRecipe(f"{key} is not {what}")
        if type(stated.get("scale", 1.0)) not in (int, float) or abs(stated.get("scale", 1.0)) >= 2**63:
            raise BadRecipe("scale is not a number")
        combine = None if stated.get("combine") is None else Combination.from_json(stated["combine"])
        calibration = None if stated.get("calibration") is None else Calibration.from_json(stated["calibration"])
        try:
            return cls(**stated | {"keep": tuple(keep), "combine": combine, "calibration": calibration})
        except RecursionError as exc:
            raise BadRecipe("nested too deeply") from exc

    def as_json(self) -> dict[str, Any]:
        """JSON values, without those choices that came later and are not made."""
        combined = None if self.combine is None else self.combine.as_json()
        calibrated = None if self.calibration is None else self.calibration.as_json()
        stated = asdict(self) | {"keep": sorted(self.keep), "combine": combined, "calibration": calibrated}
        unsaid = {"group_size": None, "rounding": "auto", "scale": 1.0, "combine": None, "merge_onto": "base"}
        unsaid |= {"target": "transformers", "scale_search": False, "calibration": None}
        return {key: value for key, value in stated.items() if key not in unsaid or value != unsaid[key]}


@cache
def versions() -> dict[str, str]:
    """Versions of what shapes the bytes: package → version."""
    return {name: version(name) for name in ("nf4-converter", "torch", "bitsandbytes")}
