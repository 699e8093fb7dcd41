"""Text Generation Inference: its command, for a model in 16 bits. It quantizes to NF4 by itself, while it loads."""

from __future__ import annotations

from converter.errors import Unsupported
from converter.export.served import Served, Serving
from converter.export.shell import script


def files(served: Served, serving: Serving) -> dict[str, str]:
    """Name → text. `Unsupported` unless the output is in 16 bits."""
    if served.kind != "16 bits":
        why = (
            "loads no weights that bitsandbytes has quantized"
            if served.kind == "bitsandbytes"
            else ("documents no weights of compressed-tensors")
        )
        raise Unsupported(
            f"TGI {why}, and only gets minor fixes now: convert with `quant_type` none, and let it quantize with "
            "--quantize bitsandbytes-nf4; or export for vllm"
        )
    words = ["text-generation-launcher", "--model-id", serving.model]
    words += ["--sharded", "true", "--num-shard", str(serving.gpus)] if serving.gpus > 1 else []
    environment = serving.environment | {"USAGE_STATS": "off"}
    return {"serve.sh": script(f"Serve {served.name} with Text Generation Inference.", words, environment)}
