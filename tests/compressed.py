"""What compressed-tensors makes of one weight: the reference for its schemes."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)

from converter.quantize.schemes import Scheme


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    """The library's preset, with our group size."""
    preset = preset_name_to_scheme(scheme.preset, ["Linear"])
    if scheme.kind == "int":
        preset.weights.group_size = scheme.group
    return preset


def compress(
    weight: torch.Tensor, scheme: QuantizationScheme, largest: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer, by their names in it: scales from the smallest and largest values, as
    llm-compressor's data-free path takes them.

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
    state = {"weight": weight}
    global_scale = None
    if settings.strategy == "tensor_group":
        largest = weight.abs().max().reshape(1) if largest is None else largest
        global_scale = state["weight_global_scale"] = generate_gparam(-largest, largest)
    scale, _ = calculate_qparams(together.amin(-1), together.amax(-1), settings, global_scale=global_scale)
    state["weight_scale"] = scale.to(weight.dtype)  # the parameter that it is copied into has that dtype
    layout = infer_module_format(torch.nn.Linear, scheme)
    compressed: dict[str, torch.Tensor] = BaseCompressor.get_value_from_registry(layout.value).compress(state, scheme)
    return compressed
