"""Weights of an output as loaders restore them, from the bytes that were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.read.checkpoint import CONFIG, SINGLE_FILE, Checkpoint
from converter.read.made import MadeFile, MadeFolder, MadeTensor, weights_file
from converter.read.stored.rows import open_source
from converter.read.stored.schemes import sources_of
from converter.threads import Buffers

if TYPE_CHECKING:
    from torch import Tensor

    from converter.plan.plan import TensorPlan
    from converter.read.folder import Folder


def restored(tensor: TensorPlan, written: Mapping[str, bytes], config: Mapping[str, Any], beside: Folder) -> Tensor:
    """A quantized weight, in the shape that the base has it in and the dtype that a loader gives it.

    `written`: its bytes by output name. `config`: the output's. `beside`: any folder of this machine.
    """
    outputs = {output.name: output for output in tensor.outputs}
    parts = [
        MadeTensor(
            name,
            outputs[name].dtype,
            (len(raw),) if outputs[name].is_state else outputs[name].shape,
            len(raw),
            lambda raw=raw: raw,  # type: ignore[misc]
        )
        for name, raw in written.items()
    ]
    made = {CONFIG: MadeFile([json.dumps(config).encode()]), SINGLE_FILE: weights_file(parts)}
    checkpoint = Checkpoint(MadeFolder(beside, made))
    source = sources_of(checkpoint).by_name[tensor.name]
    rows, buffers = source.shape[0], Buffers(pinned=False)
    opened = open_source(source, checkpoint.folder, rows)
    values = opened.decode(0, rows, opened.read(0, rows, buffers), buffers).clone()
    return values.T.contiguous() if tensor.transpose else values
