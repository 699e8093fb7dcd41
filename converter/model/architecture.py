"""What transformers makes of a checkpoint, as a value: what it quantizes, transposes, ties and keeps in float32.

Names are checkpoint names; transformers' own names for the same tensors (since version 5 they differ for some families)
are kept beside them and never written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

Kind = Literal["linear", "conv1d", "embedding", "convolution", "other"]
"""conv1d is GPT-2's turned linear layer; convolution, one without groups and dilation, as PEFT's LoRA has it."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """What one tensor of the checkpoint is to transformers."""

    parameter: str | None
    """Its name in the model; None if the model has no such parameter."""
    kind: Kind
    quantize: bool
    float32: bool = False
    """Kept in float32 whatever the model's dtype (`_keep_in_fp32_modules_strict`)."""
    integer: bool = False
    """No floating-point numbers in the model: positions, masks."""


class Slice(NamedTuple):
    """A linear layer of one expert, as a part of a tensor that holds those of all experts."""

    tensor: str
    expert: int
    first: int
    """The layer's first row in the expert's matrix, which is (out_features, in_features)."""
    shape: tuple[int, int]
    """(out_features, in_features) of the layer."""
    turned: bool
    """Whether the tensor has the matrix as (in_features, out_features)."""


_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What servers call the layers of experts that are published in one tensor, by its name."""


@dataclass(frozen=True)
class Stack:
    """A parameter that holds a matrix for each expert: (experts, rows, columns)."""

    parameter: str
    shape: Shape
    turned: bool
    """Whether the matrices are (in_features, out_features)."""
    pieces: Mapping[str, tuple[int | None, int, bool]]
    """The checkpoint's tensors that it is made of → the expert that each is of (None: it holds all of them), the row of
    the expert's matrix with which it begins, and whether it is turned on loading."""
    parts: tuple[str, ...] = ()
    """The linear layers whose matrices are one below the other in an expert's, by their names in checkpoints that have
    a tensor for each."""

    @property
    def apart(self) -> dict[str, tuple[str, ...]]:
        """Of a parameter that is one tensor of the checkpoint, and the parts of which servers know as tensors of their
        own: that tensor → the linear layers whose matrices are one below the other in an expert's, by servers' names.

        Each matrix is (out_features, in_features). Empty for any other parameter.
        """
        (name, piece), *others = self.pieces.items()
        parts = _PARTS.get(name.rpartition(".")[2], ())
        known = piece == (None, 0, False) and not others and not self.turned and self.parts in ((), parts)
        return {name: parts} if known and parts else {}

    @property
    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Of a parameter that is one tensor of the checkpoint: the linear layers of its experts, by the names that
        they have where each is a module."""
        if list(self.pieces.values()) != [(None, 0, False)]:
            return
        (tensor,), (owner, _, own) = self.pieces, self.parameter.rpartition(".")
        experts, *matrix = self.shape
        outputs, inputs = reversed(matrix) if self.turned else matrix
        for expert in range(experts):
            if self.turned:  # Unsloth takes such experts apart, into layers of its own
                yield f"{owner}.{own}s.{expert}", Slice(tensor, expert, 0, (outputs, inputs), turned=True)
            rows = outputs // max(1, len(self.parts))
            for number, part in enumerate(self.parts):
                yield f"{owner}.{expert}.{part}", Slice(tensor, expert, number * rows, (rows, inputs), turned=False)


@dataclass(frozen=True)
class Architecture:
    """What transformers makes of every tensor of one checkpoint."""

    class_name: str
    roles: Mapping[str, Role]
    skip_modules: tuple[str, ...] | None
    """For the config's `llm_int8_skip_modules`. None: every loader's default gives the same set."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Parameter that has no tensor of its own → the checkpoint tensor that it shares."""
    doubled: Mapping[str, str] = field(default_factory=dict)
    """Tensor that the config ties to another although the checkpoint has both → the other. transformers 5 ties the two
    if they are equal, earlier versions and vLLM in any case."""
    known: bool = True
    """Whether transformers has the class. If not, the user said which matrices are quantized."""
    stacks: tuple[Stack, ...] = ()
    """In the order in which the model has them."""
    embeddings: frozenset[str] = frozenset()
    """Checkpoint names of the input embedding and of the output head, one that shares the input's tensor included."""
    read_directly: frozenset[str] = frozenset()
    """Weights of linear layers that stay in 16 bits because the model computes with them itself."""

    def as_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes an equal one."""
        roles = {name: list(astuple(role)) for name, role in self.roles.items()}
        return {
            "class_name": self.class_name,
            "roles": roles,
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "tied": dict(self.tied),
            "doubled": dict(self.doubled),
            "known": self.known,
            "embeddings": sorted(self.embeddings),
            "stacks": [
                [one.parameter, one.shape, one.turned, list(one.pieces.items()), one.parts] for one in self.stacks
            ],
            "read_directly": sorted(self.read_directly),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        skip = value["skip_modules"]
        return cls(
            class_name=value["class_name"],
            roles={name: Role(*role) for name, role in value["roles"].items()},
            skip_modules=None if skip is None else tuple(skip),
            tied=value["tied"],
            doubled=value["doubled"],
            known=value["known"],
            embeddings=frozenset(value["embeddings"]),
            stacks=tuple(
                Stack(one, tuple(shape), turned, {name: (at[0], at[1], at[2]) for name, at in pieces}, tuple(parts))
                for one, shape, turned, pieces, parts in value["stacks"]
            ),
            read_directly=frozenset(value["read_directly"]),
        )

    def tensor_of(self, parameter: str) -> str | None:
        """The checkpoint name of a tensor, given that name or the model's; None if there is no such tensor."""
        if parameter in self.roles:
            return parameter
        return self._tensor_of_parameter.get(parameter)

    def module_names(self, tensor: str) -> tuple[str, ...]:
        """The module that owns a tensor: as the checkpoint names it, then as the model does, where that differs."""
        parameter = self.roles[tensor].parameter
        names = [tensor]
        if parameter is not None and self._tensor_of_parameter.get(parameter) == tensor:
            names.append(parameter)
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))

    @cached_property
    def slices(self) -> dict[str, Slice]:
        """The linear layers of experts that are parts of the checkpoint's tensors, by their modules."""
        return {module: one for stack in self.stacks for module, one in stack.slices}

    @cached_property
    def _tensor_of_parameter(self) -> dict[str, str]:
        """Parameters that several tensors become, such as stacked experts, are not among them."""
        counts = Counter(role.parameter for role in self.roles.values())
        return {
            role.parameter: name
            for name, role in self.roles.items()
            if role.parameter is not None and counts[role.parameter] == 1
        }
