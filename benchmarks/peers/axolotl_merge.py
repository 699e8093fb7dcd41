"""axolotl's memory-efficient merge, called as `axolotl merge-lora` calls it: run in its own environment.

python benchmarks/peers/axolotl_merge.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

if __name__ == "__main__":
    merge_lora_sharded_efficient(*sys.argv[1:], device="cpu")
