"""Every output format's encoder and every scheme's reader, alone, on one tile over and over.

Prints, as JSON, what → name → threads → GB of bfloat16 weights a second: what an encoder takes, and a reader gives.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stages import COLUMNS, RANK, ROWS, rate

from converter.merge.change import Rounding
from converter.merge.lora import LoraMerge
from converter.quantize.format import Rows
from converter.quantize.formats import FORMATS, format_of
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.read.stored.schemes import sources_of
from converter.read.stored.stored import is_stored
from converter.recipe import Recipe
from converter.threads import Buffers

GROUP = 128
EXACT = Rounding("float32", "bfloat16")


def main() -> None:
    several = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        readers = {name: partial(Reads, save(Path(place) / name, name)) for name in ("nf4", *PARTS)}
        encoders = {name: partial(Encodes, name) for name in FORMATS}
        torch.set_num_threads(1)
        print(json.dumps({"encoders": rates(encoders, several), "readers": rates(readers, several)}))


def rates(stages: dict[str, Any], several: int) -> dict[str, dict[str, float]]:
    return {
        name: {"1 thread": rate(stage, 1), f"{several} threads": rate(stage, several)} for name, stage in stages.items()
    }


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


class Encodes:
    """Merges LoRA into a tile and encodes the sum, with what error and survival take."""

    def __init__(self, name: str) -> None:
        recipe = Recipe(quant_type=name, dtype="bfloat16", group_size=GROUP if name in ("w4a16", "w8a16") else None)  # type: ignore[arg-type]
        self.encoder = format_of(recipe).encoder(torch.device("cpu"), kernels=True)
        self.encoder.load({"BF16"})
        merge = LoraMerge(random(RANK, COLUMNS), random(ROWS, RANK), 1.0, EXACT)
        self.rows = Rows("w", 0, random(ROWS, COLUMNS).bfloat16(), merge, EXACT, "BF16", largest=0.2)
        self.buffers = Buffers(pinned=False)

    def __call__(self) -> None:
        self.encoder.encode(self.rows, self.buffers)


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    if dtype is torch.int32:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    return torch.randint(0, 100, shape).to(dtype)


def packed(bits: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "weight_packed": codes(ROWS, COLUMNS * bits // 32, dtype=torch.int32),
        "weight_scale": random(ROWS, COLUMNS // GROUP).bfloat16(),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    return tensors, of_compressed_tensors("pack-quantized", num_bits=bits, strategy="group", group_size=GROUP)


def of_compressed_tensors(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"type": "int", "symmetric": True, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def fp8() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    scales = random(ROWS // 128, COLUMNS // 128).abs()
    return {"weight": random(ROWS, COLUMNS).to(torch.float8_e4m3fn), "weight_scale_inv": scales}, {
        "quant_method": "fp8"
    }


def nvfp4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "weight_packed": codes(ROWS, COLUMNS // 2),
        "weight_scale": random(ROWS, COLUMNS // 16).abs().to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    return tensors, of_compressed_tensors("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)


def fp8_by_channel() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "weight": random(ROWS, COLUMNS).to(torch.float8_e4m3fn),
        "weight_scale": random(ROWS, 1).abs().bfloat16(),
    }
    return tensors, of_compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel")


def int8() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "weight": codes(ROWS, COLUMNS, dtype=torch.int8),
        "SCB": random(ROWS).abs(),
        "weight_format": codes().zero_(),
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def mxfp4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "experts.gate_up_proj_blocks": codes(1, ROWS, COLUMNS // 32, 16),
        "experts.gate_up_proj_scales": codes(1, ROWS, COLUMNS // 32) + 60,
    }
    return tensors, {"quant_method": "mxfp4"}


def gptq(*, in_order: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    groups = (torch.arange(COLUMNS) // GROUP).int()
    mixed = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    tensors = {
        "qweight": codes(COLUMNS // 8, ROWS, dtype=torch.int32),
        "qzeros": codes(COLUMNS // GROUP, ROWS // 8, dtype=torch.int32),
        "scales": random(COLUMNS // GROUP, ROWS).half(),
        "g_idx": groups if in_order else mixed,
    }
    return tensors, {"quant_method": "gptq", "bits": 4, "desc_act": not in_order}


def awq() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "qweight": codes(COLUMNS, ROWS // 8, dtype=torch.int32),
        "qzeros": codes(COLUMNS // GROUP, ROWS // 8, dtype=torch.int32),
        "scales": random(COLUMNS // GROUP, ROWS).half(),
    }
    return tensors, {"quant_method": "awq", "bits": 4, "version": "gemm"}


PARTS: dict[str, Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]]] = {
    "int8": int8,
    "fp8": fp8,
    "fp8, by channel": fp8_by_channel,
    "w4a16": partial(packed, 4),
    "w8a16": partial(packed, 8),
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "gptq": gptq,
    "gptq, act-order": partial(gptq, in_order=False),
    "awq": awq,
}


def nf4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    encoder = format_of(Recipe(quant_type="nf4", dtype="bfloat16")).encoder(torch.device("cpu"), kernels=True)
    rows = Rows("weight", 0, random(ROWS, COLUMNS).bfloat16(), None, EXACT, "BF16")
    encoded = encoder.encode(rows, Buffers(pinned=False))
    assert encoded.scales is not None  # noqa: S101  (4-bit codes have some)
    tensors = {
        "weight": encoded.pieces[0][2].view(-1, 1),
        **encoder.finish("weight", (ROWS, COLUMNS), [encoded.scales]),
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def save(folder: Path, name: str) -> Path:
    """A base of one weight."""
    tensors, quantization = (nf4 if name == "nf4" else PARTS[name])()
    folder.mkdir()
    save_file({f"w.{part}": tensor for part, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


class Reads:
    """Reads a weight from the file cache, and decodes it."""

    def __init__(self, base: Path) -> None:
        folder = LocalFolder(base)
        [weight] = sources_of(Checkpoint(folder)).by_name.values()
        assert is_stored(weight)  # noqa: S101  (`save` made it so)
        self.opened, self.buffers, self.rows = weight.open(folder), Buffers(pinned=False), weight.rows

    def __call__(self) -> None:
        self.opened.decode(0, self.rows, self.opened.read(0, self.rows, self.buffers), self.buffers)


if __name__ == "__main__":
    main()
