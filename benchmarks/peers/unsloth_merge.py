"""Merge with what unsloth-zoo saves in 16 bits, without a GPU. Runs in unsloth-zoo's environment.

python benchmarks/peers/unsloth_merge.py BASE ADAPTER OUT

It starts from a model in memory, as after training. `unsloth` itself can't be imported without a GPU; its switch for
processes that only download lets the package with the saving be imported alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"UNSLOTH_ZOO_DISABLE_GPU_INIT": "1", "UNSLOTH_IS_PRESENT": "1"}
os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(sys.argv[-1]).with_name("compiled"))

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from unsloth_zoo.saving_utils import merge_and_overwrite_lora


def main(base: str, adapter: str, out: str) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)

    def itself(name: str, *, load_in_4bit: bool = False) -> str:
        del load_in_4bit
        return name

    merge_and_overwrite_lora(itself, model, None, out, save_method="merged_16bit", output_dtype=torch.bfloat16)


if __name__ == "__main__":
    main(*sys.argv[1:])
