"""Merge with axolotl's memory-efficient merge, as `axolotl merge-lora` does. Runs in axolotl's environment.

python benchmarks/peers/axolotl_merge.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

if __name__ == "__main__":
    merge_lora_sharded_efficient(*sys.argv[1:], device="cpu")
