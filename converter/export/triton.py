"""Triton: a model repository for its vLLM backend, which does nothing but start vLLM."""

from __future__ import annotations

import json

from converter.export import vllm
from converter.export.served import Served, Serving
from converter.export.shell import lines, script
from converter.model.loaders import VLLM_

CONFIG = """\
backend: "vllm"

# vLLM itself chooses the devices.
instance_group [
  {
    count: 1
    kind: KIND_MODEL
  }
]
"""


def files(served: Served, serving: Serving) -> dict[str, str]:
    """Name → text."""
    served.refuse_for(VLLM_)
    serving.refuse_to_split(served, "vLLM")
    engine = {"model": serving.model, "tensor_parallel_size": serving.gpus, "gpu_memory_utilization": 0.9}
    repository = "model_repository"
    words = ["tritonserver", f"--model-repository={repository}"]
    plugin = vllm.plugins(served)  # Triton's image has a vLLM of its own
    return {
        f"{repository}/{served.name}/config.pbtxt": CONFIG,
        f"{repository}/{served.name}/1/model.json": json.dumps(engine, indent=2) + "\n",
        "serve.sh": script(
            f"Serve {served.name} with Triton's vLLM backend, in an image tritonserver:YY.MM-vllm-python-py3.",
            words,
            vllm.environment(serving),
        ),
        **({"requirements.txt": lines(plugin)} if plugin else {}),
    }
