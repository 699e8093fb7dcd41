"""SGLang: its command and its package."""

from __future__ import annotations

from converter.export.served import Served, Serving
from converter.export.shell import lines, script
from converter.model.loaders import SGLANG_

VERSION = "0.5.23"
"""The one whose rules were read."""


def files(served: Served, serving: Serving) -> dict[str, str]:
    """Name → text."""
    served.refuse_for(SGLANG_)
    serving.refuse_to_split(served, "SGLang")
    words = ["python", "-m", "sglang.launch_server", "--model-path", serving.model, "--served-model-name", served.name]
    words += ["--load-format", "bitsandbytes"] if served.kind == "bitsandbytes" else []
    words += ["--tp-size", str(serving.gpus)] if serving.gpus > 1 else []
    packages = [f"sglang=={VERSION}", *(["bitsandbytes>=0.50"] if served.kind == "bitsandbytes" else [])]
    return {
        "serve.sh": script(f"Serve {served.name} with SGLang {VERSION}.", words, serving.environment),
        "requirements.txt": lines(packages),
    }
