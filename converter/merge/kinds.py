"""Which kind of change the tensors of a module are.

A kind is a function in the table below, by the parts that it reads. It checks them against the config and the base's
weight, and gives the changes of one or several of the base's tensors.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from converter.errors import AdapterMismatch, BadAdapter, Unsupported
from converter.merge.bias import LoraBias
from converter.merge.blocks import BlockLora
from converter.merge.change import Change
from converter.merge.convolution import ConvolutionLora
from converter.merge.dora import Dora
from converter.merge.embedding import EmbeddingDora, EmbeddingLora
from converter.merge.experts import ExpertFactors, OneExpert, StackedExperts
from converter.merge.keys import Parts
from converter.merge.lora import Lora
from converter.merge.names import Names
from converter.merge.options import Options
from converter.merge.slices import ExpertSlices
from converter.merge.tokens import TokenRows
from converter.model.architecture import Architecture, Kind, Shape, Slice, Stack
from converter.read.header import TensorHeader


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

    @property
    def bias(self) -> str:
        """The checkpoint's bias beside the weight. Raises `AdapterMismatch` where the layer has none."""
        tensor = self.names.tensor(f"{self.module}.bias")
        if tensor is None:
            raise AdapterMismatch(f"{self.module}: has a lora_bias, but the base's layer has no bias")
        return tensor

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The parameters of the module that target_parameters names: experts' matrices, or its one matrix."""
        if not self.options.variants.parameters:
            return ()
        module = self.names.parameter(self.module)
        inside = [one for one in self.architecture.stacks if one.parameter.rpartition(".")[0] == module]
        tensor = self.names.tensor(f"{self.module}.weight")
        if not inside and tensor is not None and len(self.shapes.get(tensor, ())) == 2 and self.kind != "conv1d":
            inside = [Stack(f"{module}.weight", (1, *self.shapes[tensor]), turned=False, pieces={tensor: _ALL})]
        return tuple(one for one in inside if self.options.variants.names(self.path_of(one)))

    @property
    def slice(self) -> Slice | None:
        """The part of a weight of all experts that the module is, where the base has no tensor for it alone."""
        return self.architecture.slices.get(self.names.parameter(self.module))

    def path_of(self, stack: Stack) -> str:
        """The parameter's name in the model that was trained."""
        return f"{self.module}.{stack.parameter.rpartition('.')[2]}"

    def scaling(self) -> tuple[int, float]:
        """Rank and scaling by the config. Raises `BadAdapter` where the module's names differ in it."""
        others = () if self.slice is not None else self.names.spellings(self.weight)
        return self.options.scaling(self.module, others)


_ALL = (None, 0, False)
"""The piece of a parameter that is all of a tensor: see `Stack.pieces`."""


def changes_of_slices(sites: Iterable[Site]) -> dict[str, Change]:
    """The changes that LoRA on linear layers of single experts makes, of tensors that hold those of all experts.

    Each is merged as a layer of its own, as it was trained: rounded once, unlike PEFT's `ParamWrapper`.
    Raises what `changes_of` raises.
    """
    layers: dict[str, list[tuple[Slice, Lora]]] = defaultdict(list)
    shapes = {}
    for site in sites:
        at = site.slice
        assert at is not None  # noqa: S101  (the caller asked)
        _refuse_halves(site)
        if odd := sorted(site.parts.keys() - {"lora_A", "lora_B"}):
            raise Unsupported(f"{site.module}: {odd[0]}: not merged into a tensor that holds all experts")
        a, b = site.parts["lora_A"], site.parts["lora_B"]
        for factor in (a, b):
            if len(factor.shape) != 2:
                raise Unsupported(f"{factor.name}: {len(factor.shape)} dimensions; LoRA on this layer has 2")
        lora = Lora(site.module, a, b, _scaling(site, a, b))
        if lora.shape != at.shape:
            raise AdapterMismatch(
                f"{site.module}: lora_B·lora_A is {list(lora.shape)}, the base's layer {list(at.shape)}: "
                "was the adapter trained on another base?"
            )
        layers[at.tensor].append((at, lora))
        shapes[at.tensor] = site.shapes[at.tensor]
    found: dict[str, Change] = {}
    for tensor, some in layers.items():
        ordered = sorted(some, key=lambda one: one[0])
        for (at, one), (after, other) in itertools.pairwise(ordered):
            if at.expert == after.expert and at.first + at.shape[0] > after.first:
                raise BadAdapter(f"{other.module}: the adapter has two deltas for it, also as {one.module}")
        module = ordered[0][1].module.rsplit(".", 2)[0]
        found[tensor] = ExpertSlices(module, shapes[tensor], tuple(ordered))
    return found


def changes_of_experts(site: Site) -> dict[str, Change]:
    """Of a module of experts: PEFT wraps one parameter after the other, the first one innermost.

    `peft.tuners.lora.layer.ParamWrapper`
    """
    found: dict[str, Change] = {}
    around = ["base_layer." * number for number in reversed(range(len(site.stacks)))]
    if odd := sorted(site.parts.keys() - {f"{wraps}{half}" for wraps in around for half in ("lora_A", "lora_B")}):
        named = ", ".join(stack.parameter for stack in site.stacks)
        raise BadAdapter(f"{site.module}: the file has {odd[0]}, but target_parameters names {named} alone")
    for wraps, stack in zip(around, site.stacks, strict=True):
        pair = [site.parts.get(f"{wraps}{half}") for half in ("lora_A", "lora_B")]
        if pair[0] is None or pair[1] is None:
            raise BadAdapter(f"{site.module}: the file lacks LoRA for {stack.parameter}, which target_parameters names")
        factors = _expert_factors(site, stack, pair[0], pair[1])
        for tensor, (expert, first, turned) in stack.pieces.items():
            if expert is None:
                found[tensor] = StackedExperts(site.module, replace(factors, turned=factors.turned != turned))
            else:
                found[tensor] = OneExpert(site.module, factors, expert, first, site.shapes[tensor][0])
    return found


def _expert_factors(site: Site, stack: Stack, a: TensorHeader, b: TensorHeader) -> ExpertFactors:
    experts, rows, columns = stack.shape
    rank, scaling = site.options.scaling(site.path_of(stack))
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == experts * rank:
        raise BadAdapter(
            f"{site.module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, expected rank {rank} for each of "
            f"{experts} experts of {stack.parameter}"
        )
    matrix = b.shape[0], a.shape[1]
    fits = {turned for turned, shape in ((False, (rows, columns)), (True, (columns, rows))) if matrix == shape}
    if not fits:
        raise AdapterMismatch(
            f"{site.module}: lora_B·lora_A of an expert is {list(matrix)}, the base's matrix "
            f"{[rows, columns]}: was the adapter trained on another base?"
        )
    turned = fits.pop() if len(fits) == 1 else _is_turned(site, stack)
    return ExpertFactors(a, b, scaling, experts, bool(site.options.variants.grouped), turned)


def _is_turned(site: Site, stack: Stack) -> bool:
    """Of square matrices: PEFT before 0.19 took all of them for (in_features, out_features)."""
    version = site.options.variants.peft_version
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        raise Unsupported(
            f"{site.module}: the matrices of {stack.parameter} are square, and adapter_config.json has no peft_version "
            "that says which way they were trained"
        )
    return stack.turned or (int(numbers[1]), int(numbers[2])) < (0, 19)


def changes_of(site: Site) -> dict[str, Change]:
    """The changes to the base's tensors, by their names there, that the parts of one module are.

    Raises `BadAdapter` for parts that contradict each other or the config, `Unsupported` for a kind that is not merged,
    `AdapterMismatch` for one that the base's layer has no place for.
    """
    _refuse_halves(site)
    if site.stacks:
        return changes_of_experts(site)
    parts = {part for part in site.parts if not part.startswith(_OF_TRAINING)}
    reader = _KINDS.get(frozenset(parts - _BESIDE))
    if reader is None:
        odd = sorted(parts - {"lora_A", "lora_B"})
        raise Unsupported(f"{site.module}: {odd[0] if odd else 'nothing'}: this kind of tensor is not merged")
    _check_flag(site, "use_dora", site.options.variants.uses_dora, "lora_magnitude_vector")
    _check_flag(site, "lora_bias", site.options.variants.has_lora_bias and "lora_A" in parts, "lora_B.bias")
    return reader(site)


def _matrix(site: Site) -> dict[str, Change]:
    """LoRA on a linear layer, a Conv1D or a convolution."""
    a, b = site.parts["lora_A"], site.parts["lora_B"]
    diagonal = site.options.variants.diagonal(site.module)
    blocks = diagonal.blocks if diagonal is not None and diagonal.factor == "B" else 1
    # PEFT saw a linear layer when it was trained: routers of experts have since become modules of their own.
    router = site.kind == "other" and len(site.shape) == 2
    if site.kind not in ("linear", "conv1d", "convolution") and not router:
        raise Unsupported(
            f"{site.module}: LoRA on a module of kind {site.kind!r}; this tool merges linear layers, Conv1D and "
            "convolutions without groups or dilation"
        )
    dimensions = len(site.shape) if site.kind == "convolution" else 2
    for factor in (a, b):
        if len(factor.shape) != dimensions:
            raise Unsupported(f"{factor.name}: {len(factor.shape)} dimensions; LoRA on this layer has {dimensions}")
    scaling = _scaling(site, a, b, blocks)
    found = {site.weight: _on_matrix(site, a, b, scaling)}
    bias = site.parts.get("lora_B.bias")
    if bias is not None:
        _check_shape(site, bias, "lora_B.bias", b.shape[:1])
        found[site.bias] = LoraBias(site.module, bias, scaling)
    return found


def _on_matrix(site: Site, a: TensorHeader, b: TensorHeader, scaling: float) -> Change:
    magnitude = site.parts.get("lora_magnitude_vector")
    diagonal = site.options.variants.diagonal(site.module)
    if site.kind == "convolution":
        _check_shape(site, b, "lora_B", (*b.shape[:2], *[1] * (len(b.shape) - 2)))
        _check_shape(site, magnitude, "lora_magnitude_vector", (1, b.shape[0], *[1] * (len(b.shape) - 2)))
        return ConvolutionLora(site.module, a, b, scaling, magnitude)
    if diagonal is not None:
        return BlockLora(site.module, a, b, scaling, *diagonal)
    _check_shape(site, magnitude, "lora_magnitude_vector", b.shape[:1])
    lora = (site.module, a, b, scaling)
    return Lora(*lora) if magnitude is None else Dora(*lora, magnitude)


def _embedding(site: Site) -> dict[str, Change]:
    a, b = site.parts["lora_embedding_A"], site.parts["lora_embedding_B"]
    if site.kind != "embedding":
        raise Unsupported(f"{site.module}: LoRA for an embedding, on a module of kind {site.kind!r}")
    for factor in (a, b):
        if len(factor.shape) != 2:
            raise Unsupported(f"{factor.name}: {len(factor.shape)} dimensions; LoRA on an embedding has 2")
    lora = (site.module, a, b, _scaling(site, a, b))
    magnitude = site.parts.get("lora_magnitude_vector")
    _check_shape(site, magnitude, "lora_magnitude_vector", b.shape[:1])
    return {site.weight: EmbeddingLora(*lora) if magnitude is None else EmbeddingDora(*lora, magnitude)}


def _token_rows(site: Site) -> dict[str, Change]:
    rows, tokens = site.parts["trainable_tokens_delta"], site.options.variants.tokens(site.module)
    if len(rows.shape) != 2 or rows.shape[0] != len(tokens):
        raise BadAdapter(
            f"{site.module}: trainable_tokens_delta is {list(rows.shape)}, for {len(tokens)} tokens in "
            "trainable_token_indices"
        )
    if site.kind not in ("embedding", "linear"):
        raise Unsupported(f"{site.module}: trained tokens on a module of kind {site.kind!r}")
    if max(tokens) >= site.shape[0]:
        raise AdapterMismatch(
            f"{site.module}: trainable_token_indices names token {max(tokens):,}, the base has {site.shape[0]:,}"
        )
    return {site.weight: TokenRows(site.module, rows, tokens, site.shape[0])}


_KINDS: Mapping[frozenset[str], Callable[[Site], dict[str, Change]]] = {
    frozenset({"lora_A", "lora_B"}): _matrix,
    frozenset({"lora_embedding_A", "lora_embedding_B"}): _embedding,
    frozenset({"trainable_tokens_delta"}): _token_rows,
}
"""By the parts that a module must have."""
_BESIDE = frozenset({"lora_B.bias", "lora_magnitude_vector"})
"""Parts that a module may have besides, if the config says so."""
_OF_TRAINING = ("lora_monteclora_sampler.", "lora_velora_")
"""Parts that the merge has no use for."""

_HALVES = {"lora_A": "lora_B", "lora_B": "lora_A"}
_HALVES |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}


def _refuse_halves(site: Site) -> None:
    for part in site.parts:
        last = part.rpartition(".")[2]
        if last in _HALVES and part.removesuffix(last) + _HALVES[last] not in site.parts:
            raise BadAdapter(f"{site.module}: has {part}, but no {_HALVES[last]}: half of a pair is lost")


def _check_flag(site: Site, option: str, value: bool, part: str) -> None:
    """Whether the part is there if, and only if, the config says so."""
    if (part in site.parts) != value and "trainable_tokens_delta" not in site.parts:
        there = "has" if part in site.parts else "lacks"
        raise BadAdapter(f"{site.module}: {option} is {str(value).lower()}, but the file {there} {part}")


def _check_shape(site: Site, part: TensorHeader | None, name: str, expected: Shape) -> None:
    if part is not None and part.shape != expected:
        raise BadAdapter(f"{site.module}: {name} is {list(part.shape)}, expected {list(expected)}")


def _scaling(site: Site, a: TensorHeader, b: TensorHeader, blocks: int = 1) -> float:
    """By the config, whose rank must be the factors'; `blocks`: how many of them each row of B has a part of."""
    rank, scaling = site.scaling()
    if a.shape[0] != b.shape[1] * blocks:
        raise BadAdapter(f"{site.module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}: their ranks differ")
    if a.shape[0] != rank:
        raise BadAdapter(f"{site.module}: rank {a.shape[0]} in the file, {rank} in adapter_config.json")
    return scaling
