"""Today's way to the same checkpoint: merge in memory, save, load in 4 bits, save.

    python benchmarks/reference_flow.py --base BASE --adapter ADAPTER --merged FOLDER --out OUT

Random models have no tokenizer; `fixtures/real/reference_flow.py` takes one along.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def merge(base: Path, adapter: Path, merged: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)


def quantize(merged: Path, out: Path) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("base", "adapter", "merged", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    merge(args.base, args.adapter, args.merged)
    gc.collect()  # so that the peak is that of the larger step, not of both
    quantize(args.merged, args.out)


if __name__ == "__main__":
    main()
