"""Outputs of compressed-tensors: equality with what the library makes of the merged model, and that they load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converter import Recipe, convert
from converter.errors import Unsupported
from converter.quantize.schemes import SCHEMES
from tests.compressed import compressed_flow
from tests.folders import change_json
from tests.models import ARCHITECTURES, save_adapter, save_base
from tests.reference import differences, logits

BF16 = torch.bfloat16
QUANTIZABLE = [name for name in ARCHITECTURES if name != "gpt2"]


RENAMED = {"gpt_neox": ["lm_head"]}
"""Architecture → the kept linear layers that transformers names otherwise than the checkpoint. compressed-tensors lists
only the checkpoint's name, embed_out, and then transformers takes the layer for a quantized one when it loads."""


def quantization_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def same_json(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


EVERY = [(name, architecture) for name in ("w4a16", "fp8", "nvfp4a16") for architecture in QUANTIZABLE]
EVERY += [(name, architecture) for name in ("w8a16", "fp8-block", "mxfp4a16") for architecture in ("llama", "mixtral")]


def is_quick(name: str, architecture: str, dtype: torch.dtype) -> bool:
    """Each architecture in one format, each format for a dense model and one of experts, each dtype in each format; and
    where q, k and v are one tensor, the format in which they share a scale."""
    if dtype is torch.float16:
        return architecture == "llama"
    return name == "w4a16" or architecture in ("llama", "mixtral") or (name, architecture) == ("nvfp4a16", "phi3")


CASES = [
    pytest.param(*case, dtype, marks=() if is_quick(*case, dtype) else pytest.mark.slow)
    for dtype in (BF16, torch.float16)
    for case in EVERY
]


@pytest.mark.parametrize(("name", "architecture", "dtype"), CASES)
def test_the_output_equals_the_librarys_for_every_architecture_and_base_dtype(
    name: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    wide = {"hidden_size": 128, "moe_intermediate_size": 128} if name == "fp8-block" else {}
    base = save_base(tmp_path / "base", architecture, dtype, sharded=dtype is BF16, **wide)
    adapter = save_adapter(tmp_path / "adapter", base, architecture)
    scheme = SCHEMES[name] if SCHEMES[name].kind == "float" else replace(SCHEMES[name], group=64)
    reference = compressed_flow(base, adapter, tmp_path, scheme, dtype)

    out = convert(base, adapter, tmp_path / "out", Recipe(quant_type=name, merge_precision="reference")).out

    assert differences(out, reference) == []
    expected = quantization_of(reference)
    expected["ignore"] += RENAMED.get(architecture, [])
    assert same_json(expected, quantization_of(out))
    if architecture in RENAMED:
        change_json(reference / "config.json", quantization_config=expected)
    # In 4-bit floats the library restores weights in bfloat16, which the rest of a model in float16 can't run with.
    if not (name.endswith("fp4a16") and dtype is torch.float16):
        assert torch.equal(logits(out), logits(reference))


def test_a_model_of_conv1d_is_refused_for_compressed_tensors_quantizes_none(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")

    with pytest.raises(Unsupported, match="GPT2LMHeadModel: compressed-tensors would quantize none of its layers"):
        convert(base, None, tmp_path / "out", Recipe(quant_type="w4a16"))
