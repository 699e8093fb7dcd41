"""Several LoRA adapters as one, whose factors are made of theirs as PEFT's `add_weighted_adapter` makes them.

The factors are made once, one module after the other, and lie in a file without a name, as those of any adapter do in
theirs: all that follows sees one adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from converter.combination import Combination
from converter.errors import BadAdapter, BadRecipe, Unsupported
from converter.merge.adapter import Adapter
from converter.merge.change import read_float32
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.weighted import Pair, combined_factors, generator_of
from converter.read.folder import Folder
from converter.read.header import TensorHeader
from converter.read.made import MadeFile, MadeFolder, MadeTensor, weights_file
from converter.tensors import as_bytes
from converter.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from converter.model.architecture import Shape

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_SAME = ("fan_in_fan_out", "peft_version")


def combined(adapters: Sequence[Adapter], combination: Combination) -> Adapter:
    """One adapter of several. Each value of theirs is read once more, for NaN would spread.

    Raises `Unsupported` for adapters that are more than pairs of factors, `BadRecipe` for ranks that the combination
    can't have.
    """
    if len(adapters) != len(combination.weights):
        raise BadRecipe(f"{len(combination.weights)} `weight` for {len(adapters)} adapters: give one for each")
    for adapter in adapters:
        _refuse_more_than_pairs(adapter)
        adapter.check_finite()
    rank = _rank(adapters, combination)
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    with one_thread():
        places = [_Place.of(module, adapters, combination) for module in modules]
        weights = weights_file([*_base_embeddings(adapters), *_tensors(places, combination, rank)])
    config = _config(adapters, modules, rank)
    files = {CONFIG: MadeFile([json.dumps(config).encode()]), WEIGHTS: weights}
    first, *others = [adapter.folder for adapter in adapters]
    label = " + ".join(adapter.folder.label for adapter in adapters)
    return Adapter(MadeFolder(first, files, label=label, others=others), members=tuple(adapters))


def _config(adapters: Sequence[Adapter], modules: list[str], rank: int) -> dict[str, object]:
    """Of a plain LoRA, whose factors have their scaling in them."""
    bases = {adapter.base_name for adapter in adapters}
    config = {key: adapters[0].config[key] for key in _SAME if key in adapters[0].config}
    config |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    return config | {"base_model_name_or_path": bases.pop() if len(bases) == 1 else None}


def _refuse_more_than_pairs(adapter: Adapter) -> None:
    options, where = adapter.options, adapter.folder.label
    for what, there in (
        ("is merged by PEFT's own class", options.is_bridged),
        ("has DoRA's lengths", options.variants.uses_dora),
        ("has trained biases", options.variants.has_lora_bias),
        ("replaces whole tensors", any(_module_of(name) not in adapter.modules for name in adapter.replacements)),
        ("has experts (target_parameters)", bool(options.variants.parameters)),
        ("ties embedding and head", options.variants.keeps_ties),
    ):
        if there:
            raise Unsupported(f"{where}: {what}, which `combine` can't: only LoRA's pairs of factors are combined")
    for module, parts in adapter.modules.items():
        if tuple(sorted(parts)) not in _PAIRS or options.variants.diagonal(module) is not None:
            raise Unsupported(f"{where}: {module}: {', '.join(sorted(parts))}: only pairs of factors are combined")


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _base_embeddings(adapters: Sequence[Adapter]) -> list[MadeTensor]:
    """The base's own embeddings, which PEFT saves beside LoRA on them: the same in all adapters that have them."""
    found: dict[str, MadeTensor] = {}
    for adapter in adapters:
        for name, header in adapter.replacements.items():
            read = partial(_bytes_of, header, adapter.folder)
            if (other := found.get(name)) is not None and other.make() != read():
                raise BadAdapter(f"{name}: the adapters were trained on different embeddings of the base")
            key = f"{PREFIX}{_module_of(name)}.base_layer.{name.rpartition('.')[2]}"
            found[name] = MadeTensor(key, header.dtype, header.shape, header.nbytes, read)
    return list(found.values())


def _bytes_of(header: TensorHeader, folder: Folder) -> bytes:
    return b"".join(piece.tobytes() for piece in header.pieces(folder))


def _rank(adapters: Sequence[Adapter], combination: Combination) -> int:
    """That of all factors of the result: `peft.tuners.lora.model.LoraModel._check_add_weighted_adapter`."""
    ranks = [max(_a(adapter, module).shape[0] for module in adapter.modules) for adapter in adapters]
    if combination.kind == "cat":
        return sum(ranks)
    if combination.is_cut:
        return combination.rank or max(ranks)
    if len({_a(adapter, module).shape[0] for adapter in adapters for module in adapter.modules}) > 1:
        raise BadRecipe(f"`combine` {combination.kind} needs adapters of one rank; cat and svd take any")
    return ranks[0]


def _a(adapter: Adapter, module: str) -> TensorHeader:
    return next(part for name, part in adapter.modules[module].items() if name.endswith("_A"))


class _Place(NamedTuple):
    """A module of the result, and the adapters that have it."""

    module: str
    names: tuple[str, str]
    """PEFT's for the two factors."""
    having: tuple[tuple[Adapter, float], ...]
    """With their weights."""

    @classmethod
    def of(cls, module: str, adapters: Sequence[Adapter], combination: Combination) -> _Place:
        pairs = zip(adapters, combination.weights, strict=True)
        having = tuple((adapter, weight) for adapter, weight in pairs if module in adapter.modules)
        kinds = {tuple(sorted(adapter.modules[module])) for adapter, _ in having}
        if len(kinds) > 1:
            raise BadAdapter(f"{module}: has LoRA for an embedding in one adapter, and for a layer in another")
        [(first, second)] = kinds
        return cls(module, (first, second), having)

    def parts(self) -> list[tuple[TensorHeader, TensorHeader]]:
        return [
            (adapter.modules[self.module][self.names[0]], adapter.modules[self.module][self.names[1]])
            for adapter, _ in self.having
        ]

    def shapes(self, combination: Combination, rank: int) -> tuple[Shape, Shape]:
        """Of the two factors of the result."""
        pairs = self.parts()
        if len({(a.shape[1:], b.shape[:1], b.shape[2:]) for a, b in pairs}) > 1:
            raise BadAdapter(f"{self.module}: the adapters' shapes differ: were they trained on different bases?")
        a, b = pairs[0]
        if combination.is_cut and len(a.shape) != 2:
            raise Unsupported(f"{self.module}: `combine` {combination.kind} on a convolution; cat takes it")
        if combination.is_cut and rank > min(a.shape[1], b.shape[0]):
            raise BadRecipe(f"`svd_rank` {rank}: {self.module} has at most {min(a.shape[1], b.shape[0])}")
        return (rank, *a.shape[1:]), (b.shape[0], rank, *b.shape[2:])

    def factors(self, combination: Combination, rank: int) -> tuple[Tensor, Tensor]:
        """Those of the result, in float32."""
        found = [
            Pair(
                read_float32(a, adapter.folder),
                read_float32(b, adapter.folder),
                adapter.options.scaling(self.module)[1],
                weight,
            )
            for (adapter, weight), (a, b) in zip(self.having, self.parts(), strict=True)
        ]
        generator = generator_of(combination.seed, self.module)
        return combined_factors(found, combination, rank, generator, turned=self.names[0] == "lora_embedding_A")


def _tensors(places: Sequence[_Place], combination: Combination, rank: int) -> list[MadeTensor]:
    """The two factors of each module, which are made together when the first is asked for."""
    factors = lru_cache(maxsize=1)(lambda place: place.factors(combination, rank))
    made = []
    for place in places:
        ending = ".weight" if place.names[0] == "lora_A" else ""
        for number, shape in enumerate(place.shapes(combination, rank)):
            name = f"{PREFIX}{place.module}.{place.names[number]}{ending}"
            make = partial(lambda place, number: as_bytes(factors(place)[number]), place, number)
            made.append(MadeTensor(name, "F32", shape, 4 * math.prod(shape), make))
    return made
