"""Which kind of change the tensors of a module are.

A kind is a function in the table below, by the parts that it reads. It checks them against the config and the base's
weight, and gives the changes of one or several of the base's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converter.errors import BadAdapter, Unsupported
from converter.merge.change import Change
from converter.merge.keys import Parts
from converter.merge.lora import Lora
from converter.merge.names import Names
from converter.merge.options import Options
from converter.model.architecture import Architecture, Kind, Shape


@dataclass(frozen=True)
class Site:
    """A module that an adapter changes, and all that is known of it."""

    module: str
    """As the adapter's file names it."""
    parts: Parts
    options: Options
    names: Names
    architecture: Architecture
    shapes: Mapping[str, Shape]
    """Of the base's tensors, and of those that take their place, as they are on disk."""

    @property
    def weight(self) -> str:
        """The checkpoint's tensor that is changed. Raises `Unsupported` for a module that has none of its own."""
        tensor = self.names.tensor(f"{self.module}.weight")
        if tensor is None:
            raise Unsupported(f"{self.module}: has no weight of its own in the base, to which this could be added")
        return tensor

    @property
    def kind(self) -> Kind:
        role = self.architecture.roles.get(self.weight)
        return "linear" if role is None else role.kind  # a tied head

    @property
    def shape(self) -> Shape:
        """Of the weight: (out_features, in_features, …); turned where the base has it the other way round."""
        shape = self.shapes[self.architecture.tied.get(self.weight, self.weight)]
        return shape[::-1] if self.kind == "conv1d" else shape

    def scaling(self) -> tuple[int, float]:
        """Rank and scaling by the config. Raises `BadAdapter` where the module's names differ in it."""
        return self.options.scaling(self.module, self.names.spellings(self.weight))


def changes_of(site: Site) -> dict[str, Change]:
    """The changes to the base's tensors, by their names there, that the parts of one module are.

    Raises `BadAdapter` for parts that contradict each other or the config, `Unsupported` for a kind that is not merged.
    """
    _refuse_halves(site)
    reader = _KINDS.get(frozenset(site.parts))
    if reader is None:
        odd = sorted(site.parts.keys() - {"lora_A", "lora_B"})
        raise Unsupported(f"{site.module}: {odd[0]}: this kind of tensor is not merged; LoRA on linear layers is")
    return reader(site)


def _lora(site: Site) -> dict[str, Change]:
    a, b = site.parts["lora_A"], site.parts["lora_B"]
    rank, scaling = site.scaling()
    for factor in (a, b):
        if len(factor.shape) != 2:
            raise Unsupported(f"{factor.name}: {len(factor.shape)} dimensions; LoRA on linear layers has 2")
    if a.shape[0] != b.shape[1]:
        raise BadAdapter(f"{site.module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: their ranks differ")
    if a.shape[0] != rank:
        raise BadAdapter(f"{site.module}: rank {a.shape[0]} in the file, {rank} in adapter_config.json")
    # PEFT saw a linear layer when it was trained: routers of experts have since become modules of their own.
    router = site.kind == "other" and len(site.shape) == 2
    if site.kind not in ("linear", "conv1d") and not router:
        raise Unsupported(
            f"{site.module}: LoRA on a module of kind {site.kind!r}; this tool merges linear layers and Conv1D"
        )
    return {site.weight: Lora(site.module, a, b, scaling)}


_KINDS: Mapping[frozenset[str], Callable[[Site], dict[str, Change]]] = {
    frozenset({"lora_A", "lora_B"}): _lora,
}
"""By the parts that a module has."""

_HALVES = {"lora_A": "lora_B", "lora_B": "lora_A"}
_HALVES |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}


def _refuse_halves(site: Site) -> None:
    for part in site.parts:
        last = part.rpartition(".")[2]
        if last in _HALVES and part.removesuffix(last) + _HALVES[last] not in site.parts:
            raise BadAdapter(f"{site.module}: has {part}, but no {_HALVES[last]}: half of a pair is lost")
