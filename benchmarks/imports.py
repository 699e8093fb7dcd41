"""What a conversion imports, and nothing done with it: the floor of its time and memory.

With `peft` as its argument, also what an adapter needs that PEFT's own classes merge.
Loads the compiled kernels, too, by calling each once on one block.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch

from converter import recipe
from converter.cli import show  # noqa: F401
from converter.quantize import formats, jit, kernels

BLOCK = 64


def main() -> None:
    torch.set_num_threads(1)
    source = jit.Source(np.zeros(BLOCK, np.uint16), BLOCK, change=np.zeros(BLOCK, np.float32), how=jit.ADDED)
    packed, absmax, sums = np.empty(BLOCK // 2, np.uint8), np.empty(1, np.float32), np.empty((1, jit.SUMS))
    kernels.quantize_rows(
        source,
        quant_type="nf4",
        block=BLOCK,
        packed=packed,
        absmax=absmax,
        sums=sums,
    )
    encoder = formats.format_of(recipe.Recipe().resolved("bfloat16")).encoder(torch.device("cpu"), kernels=True)
    encoder.finish("w.weight", (128, 128), [torch.zeros(256)])
    if "peft" in sys.argv:
        import peft  # noqa: F401


if __name__ == "__main__":
    main()
    os._exit(0)  # as the command line ends
