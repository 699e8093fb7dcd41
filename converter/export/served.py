"""A finished output as servers see it: its kind of weights, and which servers take it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.errors import BadRecipe, Unsupported
from converter.model.ask import check_loaders
from converter.quantize.format import Found
from converter.quantize.formats import all_formats
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from converter.seal.receipt import read_receipt

Kind = Literal["bitsandbytes", "compressed-tensors", "16 bits"]


@dataclass(frozen=True)
class Served:
    """A finished output."""

    name: str
    """As clients call it: letters, digits, '-' and '.'."""
    kind: Kind
    problems: Mapping[str, list[str]]
    """vLLM, SGLang → why they don't take it, by their rules."""
    receipt: Mapping[str, Any] | None
    """None if this tool didn't make it."""

    @classmethod
    def of(cls, out: Path) -> Served:
        """`ConversionRefused` if it is no checkpoint, `Unsupported` if its weights are of another kind."""
        folder = LocalFolder(out.expanduser())
        name = re.sub(r"[^a-z0-9.-]+", "-", folder.path.resolve().name.lower()).strip("-.")[:50] or "model"
        with Checkpoint(folder) as written:
            found = Found()
            for one in (kind.find(written) for kind in all_formats()):
                found.weights |= one.weights
                found.parts |= one.parts
                found.uneven |= one.uneven
            shapes = {name: tensor.shape for name, tensor in written.tensors.items() if name not in found.parts}
            problems = check_loaders(written.config, shapes | found.weights, found.weights, found.uneven)
            stated = written.config.get("quantization_config")
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        kinds: dict[object, Kind] = {None: "16 bits"}
        kinds |= {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}
        if method not in kinds:
            raise Unsupported(f"{out}: its weights are in {method!s:.40}; only what this tool writes is exported")
        return cls(name, kinds[method], problems, read_receipt(folder.path))

    def refuse_for(self, loader: str) -> None:
        """`Unsupported` if the rules of vLLM or SGLang say that it doesn't take this output."""
        if problems := self.problems.get(loader):
            more = f" ({len(problems)} problems in all)" if len(problems) > 1 else ""
            raise Unsupported(
                f"{loader} does not take it: {problems[0]}{more}; convert with `quant_type` w4a16 or none"
            )


@dataclass(frozen=True)
class Serving:
    """How an output is to be served. `BadRecipe` for what can't be."""

    model: str = ""
    """Where the server finds it: a path on its machine, or an id on the Hub. Empty: /models/NAME."""
    gpus: int = 1
    """Among which the weights are split."""
    image: str | None = None
    """The server's container image; None: the one that is known to take it."""
    converter_image: str = "nf4-converter:0.1.0"

    def __post_init__(self) -> None:
        for said, text in (("model", self.model), ("image", self.image), ("converter_image", self.converter_image)):
            if text and (not text.isprintable() or " " in text or text.startswith("-")):
                raise BadRecipe(f"`{said}` {text!r:.60}: expected a text without spaces")

    def refuse_to_split(self, served: Served, server: str) -> None:
        """`Unsupported` if the server can't split these weights."""
        if self.gpus > 1 and served.kind == "bitsandbytes":
            raise Unsupported(
                f"{server} splits no bitsandbytes weights among GPUs: take `gpus` 1, or convert with `quant_type` w4a16"
            )

    @property
    def is_path(self) -> bool:
        """Whether nothing is to be downloaded."""
        return self.model.startswith("/")

    @property
    def environment(self) -> dict[str, str]:
        """Variables for every server. With a local model, they keep the server from asking the Hub."""
        return {"HF_HUB_OFFLINE": "1"} if self.is_path else {}
