"""Quantize with AutoRound's model-free way to 4-bit integers in groups of 128. Runs in AutoRound's environment.

python benchmarks/peers/auto_round_model_free.py MERGED OUT
"""

from __future__ import annotations

import sys

from auto_round import AutoRound

if __name__ == "__main__":  # it starts processes that import this file
    rounder = AutoRound(sys.argv[1], scheme="W4A16", model_free=True, device_map="cpu")
    rounder.quantize_and_save(sys.argv[2], format="auto_round:auto_gptq")
