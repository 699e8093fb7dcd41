"""Load every output below a folder with the transformers that is here, and save what each model says.

Run by `make loaders` in environments of their own: imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS = torch.tensor([[3, 7, 11, 19, 23, 5, 9, 2]])


def said(folder: Path) -> torch.Tensor:
    """The logits of a model, for fixed tokens; of an encoder-decoder, for some of them as its output."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class: Any = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for module in model.modules():  # bitsandbytes' fast path for some CPUs takes only weights of certain sizes
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    inputs = {"decoder_input_ids": TOKENS[:, :4]} if config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS, **inputs)[0]
    return result.float()


def main(root: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for config in sorted(root.glob("*/*/config.json")):
        name = str(config.parent.relative_to(root))
        try:
            found[name] = said(config.parent).flatten().tolist()
        except Exception as exc:  # whatever a loader raises is what it says of this output
            found[name] = f"{type(exc).__name__}: {' '.join(str(exc).split())[:160]}"
    (root / f"said-{transformers.__version__}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
