"""What compressed-tensors makes of a weight, and of a model: the reference for its schemes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.model_compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from safetensors.torch import load_file, save_file

from converter.quantize.schemes import Scheme
from tests.models import load
from tests.reference import reference_flow


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    """The library's preset, with our group size."""
    preset = preset_name_to_scheme(scheme.preset, ["Linear"])
    if scheme.kind == "int":
        preset.weights.group_size = scheme.group
    return preset


def scales_of(
    weight: torch.Tensor, scheme: QuantizationScheme, largest: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The scales of one linear layer, by their names in it: from the smallest and largest values, as llm-compressor's
    data-free path takes them.

    `largest`, [1] in the weight's dtype: the largest absolute value of all weights that share a global scale.
    """
    settings = scheme.weights
    if settings.group_size is not None:
        together = weight.unflatten(-1, (-1, settings.group_size))
    elif settings.block_structure is not None:
        height, width = settings.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, settings.block_structure)
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        together = blocks.transpose(1, 2).flatten(2)
    else:
        together = weight.unsqueeze(-2)
    scales = {}
    global_scale = None
    if settings.strategy == "tensor_group":
        largest = weight.abs().max().reshape(1) if largest is None else largest
        global_scale = scales["weight_global_scale"] = generate_gparam(-largest, largest)
    scale, _ = calculate_qparams(together.amin(-1), together.amax(-1), settings, global_scale=global_scale)
    return scales | {"weight_scale": scale.to(weight.dtype)}  # the parameter that it is copied into has that dtype


def compress(
    weight: torch.Tensor, scheme: QuantizationScheme, largest: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer, by their names in it."""
    layout = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    compressed: dict[str, torch.Tensor] = compressor.compress(
        {"weight": weight} | scales_of(weight, scheme, largest), scheme
    )
    return compressed


def compress_experts(file: Path, scheme: QuantizationScheme) -> None:
    """Compress the experts of a shard, as llm-compressor does without data: transformers wrote them as they were."""
    tensors = load_file(file)
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    for name, weight in experts.items():
        module = name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        fused = next((names for names in FUSED if last in names), (last,))
        largest = torch.stack([experts[f"{parent}.{part}.weight"].abs().max() for part in fused]).max().reshape(1)
        del tensors[name]
        for part, value in compress(weight, scheme, largest).items():
            tensors[f"{module}.{part}"] = value
    save_file(tensors, file, metadata={"format": "pt"})


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of one module that servers fuse."""


def compressed_flow(
    base: Path, adapter: Path | None, work: Path, scheme: Scheme, dtype: torch.dtype, keep: tuple[str, ...] = ()
) -> Path:
    """The folder that PEFT, transformers and compressed-tensors leave behind: load, merge, save, load, compress, save.

    Kept are the head, gates with one output, and modules that `keep` names.
    """
    merged, out = reference_flow(base, adapter, work, None, dtype), work / "compressed"
    model: Any = load(merged, dtype=dtype)
    theirs = library_scheme(scheme)
    ignore = ["lm_head", "embed_out", "re:.*shared_expert_gate$", *keep]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": theirs}, ignore=ignore))
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if hasattr(child, "quantization_scheme")}
        for name, child in children.items():
            fused = next(([children[n] for n in names if n in children] for names in FUSED if name in names), [child])
            largest = torch.stack([one.weight.abs().max() for one in fused]).max().reshape(1)
            for scale, value in scales_of(child.weight.data, theirs, largest).items():
                getattr(child, scale).data.copy_(value)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        compress_experts(file, theirs)
    compressor.update_config(str(out))
    return out
