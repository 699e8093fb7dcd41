"""A process that loads a model with transformers, and an adapter beside it with PEFT, and generates tokens.

It reads JSON lines and writes them: first what to load, then requests. No code of the checkpoint is run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converter.model.meta_model import class_of

Tell = Callable[[object], None]


def serve() -> None:
    """Answer what comes on stdin: {folder, adapter, dtype, device} with {ready} or {error}; then each {prompt,
    new_tokens} with a line for each token, then {end} or {error}. Ends with stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def tell(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        model, about = _load(**json.loads(sys.stdin.readline()))
        tell({"ready": about})
        for line in sys.stdin:
            _generate(model, tell, **json.loads(line))
            tell({"end": True})
    except Exception as exc:  # whatever foreign code raises
        tell({"error": f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"})


def _load(folder: str, adapter: str | None, dtype: str, device: str) -> tuple[Any, dict[str, str]]:
    """The model, and the versions that it has and the device that it is on."""
    import torch
    import transformers

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((Path(folder) / "config.json").read_text())
    kind = class_of(config)
    if kind is None:
        raise ValueError(f"transformers {transformers.__version__} has no class for {config.get('model_type')!r}")
    where: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}  # that asks for accelerate
    model: Any = getattr(transformers, kind).from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, **where
    )
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return model, {"version": transformers.__version__, "device": name}


def _generate(model: Any, tell: Tell, prompt: list[int], new_tokens: int) -> None:
    """Generate greedily, and tell each token's id."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Telling(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self._is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self._is_prompt:
                tell(int(value))
            self._is_prompt = False

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=Telling(),
        )
