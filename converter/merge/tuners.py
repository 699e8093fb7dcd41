"""The tuners that PEFT's own classes merge, and what of an adapter each of their modules needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import BadAdapter, Unsupported
from converter.merge.bridge import Bridged, Layer, problem_with
from converter.merge.change import Change
from converter.merge.kinds import Site
from converter.read.header import TensorHeader

_LAYERS: dict[str, Layer] = {
    "linear": "linear",
    "conv1d": "conv1d",
    "embedding": "embedding",
    "convolution": "convolution",
}
_OWN_ENDING = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
"""LoRA's parts, by the names that PEFT gives them."""
_CHANGE_BIASES = ("IA3", "ROAD", "BEFT")


@dataclass(frozen=True)
class Tuner:
    """One adapter that PEFT merges."""

    config: Mapping[str, Any]
    shared: Mapping[str, TensorHeader]
    """What all modules share, by PEFT's name."""
    sizes: tuple[int, int]
    """The largest out_features and in_features of the adapter's modules."""

    @property
    def name(self) -> str:
        return str(self.config["peft_type"])

    @classmethod
    def of(cls, config: Mapping[str, Any], shared: Mapping[str, TensorHeader], sites: list[Site]) -> Tuner:
        shapes = [site.shape for site in sites]
        return cls(config, shared, (max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)))

    def changes(self, site: Site) -> dict[str, Change]:
        """What becomes of a module's weight and bias. Raises `Unsupported`."""
        layer = _LAYERS.get(site.kind)
        if layer is None:
            raise Unsupported(f"{site.module}: {self.name} on a module of kind {site.kind!r}, which is not merged")
        bias = site.names.tensor(f"{site.module}.bias")
        if self.name == "GLORA" and bias is not None:
            raise Unsupported(f"{site.module}: GLORA on a layer with a bias, which needs weight and bias at a time")
        targets = {} if self.name == "BEFT" else {site.weight: "weight"}
        if bias is not None and (self.name in _CHANGE_BIASES or self.config.get("lora_bias")):
            targets[bias] = "bias"
        if not targets or (self.config.get("lora_bias") and bias is None):
            raise BadAdapter(f"{site.module}: the adapter changes its bias, but the base's layer has none")
        ending = _OWN_ENDING if self.name == "LORA" else {}
        own = {f"base_model.model.{site.module}.{ending.get(part, part)}": head for part, head in site.parts.items()}
        parts = own | dict(self.shared)
        weight = site.shape[::-1] if site.kind == "conv1d" else site.shape
        return {
            target: Bridged(
                module=site.module,
                parameter="weight" if parameter == "weight" else "bias",
                layer=layer,
                weight=weight,
                pairs=tuple(parts.items()),
                config=json.dumps(self.config, sort_keys=True),
                bias=bias is not None,
                sizes=self.sizes,
            )
            for target, parameter in targets.items()
        }


def check(changes: Mapping[str, Change], where: str) -> None:
    """Let PEFT take the tensors of one module of each shape, before anything is written.

    `where` names the adapter's folder. Raises `BadAdapter` or `Unsupported` with what PEFT said.
    """
    seen: set[object] = set()
    for change in changes.values():
        if not isinstance(change, Bridged):
            continue
        own = tuple((key.removeprefix(f"base_model.model.{change.module}"), part.shape) for key, part in change.pairs)
        alike = (change.layer, change.weight, change.bias, own)
        if alike in seen:
            continue
        seen.add(alike)
        if (problem := problem_with(change)) is not None:
            raise BadAdapter(f"{where}: {change.module}: {problem}")
