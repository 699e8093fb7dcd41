"""How several adapters become one: the kinds that PEFT's `add_weighted_adapter` has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from converter.errors import BadRecipe

Kind = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]

OPTIONS = {
    "combine": "kind",
    "weight": "weights",
    "weights": "weights",
    "density": "density",
    "majority_sign": "majority_sign",
    "svd_rank": "rank",
    "seed": "seed",
}
"""Options of the command line, which a file has by the same names → what they are here."""


@dataclass(frozen=True)
class Combination:
    """What is made of several adapters before they are merged. Raises `BadRecipe` for contradictions."""

    kind: Kind = "cat"
    """cat: the weighted sum of the deltas, exactly. linear: of the factors, so that each A meets each B. svd: the sum,
    cut down to a rank. ties, dare_…, magnitude_prune: of factors that are pruned before; with _svd: of deltas."""
    weights: tuple[float, ...] = ()
    """One for each adapter."""
    density: float | None = None
    """The share of values that pruning leaves."""
    majority_sign: MajoritySign = "total"
    """ties: which sign wins: that of the sum, or that of most values."""
    rank: int | None = None
    """svd: the rank of the result. None: the largest of the adapters."""
    seed: int = 0
    """dare: of the values that are dropped by chance."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BadRecipe(f"`combine` {self.kind}: expected one of {', '.join(get_args(Kind))}")
        if self.majority_sign not in get_args(MajoritySign):
            raise BadRecipe(f"`majority_sign` {self.majority_sign}: expected total or frequency")
        if len(self.weights) < 2:
            raise BadRecipe("`combine` takes two adapters or more, and one `weight` for each")
        for weight in self.weights:
            if not (_is_number(weight) and math.isfinite(weight) and weight):
                raise BadRecipe(f"`weight` {weight}: expected a number that is not 0")
        if self.is_pruned and self.density is None:
            raise BadRecipe(f"`combine` {self.kind} prunes: give `density`, the share of values that it leaves")
        if self.density is not None and not (_is_number(self.density) and 0 < self.density <= 1):
            raise BadRecipe(f"`density` {self.density}: expected a share above 0, at most 1")
        self._refuse_without_meaning()
        if self.rank is not None and (type(self.rank) is not int or not 1 <= self.rank < 1 << 31):
            raise BadRecipe(f"`svd_rank` {self.rank}: expected a positive number")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise BadRecipe(f"`seed` {self.seed}: expected a number from 0")

    def _refuse_without_meaning(self) -> None:
        for option, given, has_meaning in (
            ("density", self.density is not None, self.is_pruned),
            ("majority_sign", self.majority_sign != "total", self.elects),
            ("svd_rank", self.rank is not None, self.is_cut),
            ("seed", self.seed != 0, self.is_random),
        ):
            if given and not has_meaning:
                raise BadRecipe(f"`{option}` has no meaning with `combine` {self.kind}")

    @property
    def is_cut(self) -> bool:
        """Whether the deltas are combined, and their sum is cut down to a rank."""
        return self.kind.endswith("svd")

    @property
    def is_random(self) -> bool:
        return self.kind.startswith("dare")

    @property
    def is_pruned(self) -> bool:
        return self.is_random or self.elects or self.kind.startswith("magnitude_prune")

    @property
    def elects(self) -> bool:
        """Whether only values of the sign that wins are summed up."""
        return "ties" in self.kind

    def as_json(self) -> dict[str, Any]:
        """JSON values, without what has no meaning for the kind."""
        stated = asdict(self) | {"weights": list(self.weights)}
        unsaid = {"density": None, "majority_sign": "total", "rank": None, "seed": 0}
        return {key: value for key, value in stated.items() if key not in unsaid or value != unsaid[key]}

    @classmethod
    def from_options(cls, stated: Mapping[str, Any]) -> Combination | None:
        """The combination that a file's options, named as in `OPTIONS`, ask for; None if it has none of them.

        `combine` may be a kind, beside the others, or a table of all, as `as_json` gives it. `BadRecipe` for
        contradictions."""
        kind = stated.get("combine")
        if isinstance(kind, dict):
            if odd := sorted(stated.keys() - {"combine"}):
                raise BadRecipe(f"{odd[0]} stands beside combine, which is a table: put it there")
            return cls.from_json(kind)
        if kind is None:
            if odd := sorted(stated.keys() - {"combine"}):
                raise BadRecipe(f"`{odd[0]}` has no meaning without `combine`")
            return None
        if {"weight", "weights"} <= stated.keys():
            raise BadRecipe("has both weight and weights, which mean the same")
        return cls.from_json({OPTIONS[key]: value for key, value in stated.items()})

    @classmethod
    def from_json(cls, stated: object) -> Combination:
        """From what `as_json` gives. `BadRecipe` for anything else."""
        if not isinstance(stated, dict) or not stated.keys() <= {field.name for field in fields(cls)}:
            raise BadRecipe("combine is not a table of a combination's names and values")
        weights = stated.get("weights")
        if not isinstance(weights, list) or not isinstance(stated.get("kind"), str):
            raise BadRecipe("combine has no kind, or no list of weights")
        if not isinstance(stated.get("majority_sign", "total"), str):
            raise BadRecipe("combine's majority_sign is not a text")
        return cls(**stated | {"weights": tuple(weights)})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
