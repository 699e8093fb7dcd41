"""vLLM: its command, its packages, a container file, and manifests for Kubernetes.

Since 0.28 bitsandbytes is a plugin, which splits nothing among GPUs. compressed-tensors are in vLLM itself.
"""

from __future__ import annotations

from converter.export.kubernetes import manifests
from converter.export.served import Served, Serving
from converter.export.shell import lines, script
from converter.model.loaders import VLLM_

VERSION, PLUGIN = "0.32.0", "0.0.3"
"""Of vLLM and its bitsandbytes plugin: those whose rules were read, and with which outputs were served on a CPU."""


def arguments(served: Served, serving: Serving) -> list[str]:
    """Of `vllm serve`, after the model."""
    split = ["--tensor-parallel-size", str(serving.gpus)] if serving.gpus > 1 else []
    return ["--served-model-name", served.name, *split]


def plugins(served: Served) -> list[str]:
    """What pip installs beside vLLM."""
    return [f"vllm-bnb-plugin=={PLUGIN}"] if served.kind == "bitsandbytes" else []


def environment(serving: Serving) -> dict[str, str]:
    """Nothing is downloaded where the model is a path, and nobody is told of its use."""
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"} | serving.environment


def container_file(served: Served) -> str:
    """The server's image, with what it lacks."""
    plugin = plugins(served)
    install = [f"RUN pip install --no-cache-dir --no-deps {' '.join(plugin)}"] if plugin else []
    return lines([f"FROM vllm/vllm-openai:v{VERSION}", *install, "ENV HOME=/tmp", "USER 1000:1000"])


def files(served: Served, serving: Serving) -> dict[str, str]:
    """Name → text."""
    served.refuse_for(VLLM_)
    serving.refuse_to_split(served, "vLLM")
    words = ["vllm", "serve", serving.model, *arguments(served, serving)]
    return {
        "serve.sh": script(f"Serve {served.name} with vLLM {VERSION}.", words, environment(serving)),
        "requirements.txt": lines([f"vllm=={VERSION}", *plugins(served)]),
        "Containerfile": container_file(served),
        **manifests(served, serving, words[2:], environment(serving), f"{served.name}-vllm:{VERSION}"),
    }
