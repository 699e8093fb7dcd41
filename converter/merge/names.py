"""The names that an adapter has for the base's tensors, which depend on what was trained, with what, and when.

A tensor has a name on disk and one in transformers 5; the model that was trained may have been the base without its
head, or its language part alone, and may have been wrapped. One rule must explain all names of an adapter, and no other
rule may give them another meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from converter.errors import AdapterMismatch
from converter.model.architecture import Architecture

AROUND = frozenset(["model", "base_model", "module", "language_model", "text_model", "transformer"])
"""What stands around the layers of a model, and may be missing where another class was trained."""
_MOST_AROUND = 4
Ask = Callable[[list[str]], Mapping[str, str]]
"""Names of tensors → the parameters that transformers 5 loads them into; of those that it loads nowhere, nothing."""


@dataclass(frozen=True)
class Table:
    """One set of names for the base's tensors."""

    tensors: Mapping[str, str]
    """Name → the checkpoint's tensor."""
    stacked: frozenset[str] = frozenset()
    """Parameters that several tensors become, such as experts."""

    @cached_property
    def modules(self) -> frozenset[str]:
        """All modules, those around others included."""
        found: set[str] = set()
        for name in (*self.tensors, *self.stacked):
            around = name.rpartition(".")[0]
            while around and around not in found:
                found.add(around)
                around = around.rpartition(".")[0]
        return frozenset(found)

    @cached_property
    def name_of(self) -> Mapping[str, str]:
        return {tensor: name for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Rule:
    """How an adapter's names become those of a table: what begins with `cut` begins with `put` instead."""

    table: Table
    cut: str = ""
    put: str = ""
    unwrap: bool = False
    """Whether `module` is left out wherever it stands: DistributedDataParallel puts it there."""
    known: Mapping[str, str] = field(default_factory=dict)
    """What transformers itself made of the adapter's names."""

    def name(self, name: str) -> str:
        """The table's name for what the adapter calls `name`; what does not begin with `cut` is taken as it is."""
        if name in self.known:
            return self.known[name]
        if self.unwrap:
            name = ".".join(word for word in name.split(".") if word != "module")
        return self.put + name.removeprefix(self.cut) if name.startswith(self.cut) else name

    def explains(self, module_or_tensor: str, *, module: bool) -> bool:
        name = self.name(module_or_tensor)
        return name in self.table.modules if module else name in self.table.tensors

    def spelling(self, name: str, *, embedding: bool) -> str | None:
        """What the model that was trained called the table's `name`; None where it had no such thing.

        An `embedding` stands outside of what is cut and put: a language model has its head beside it.
        """
        if not (self.cut or self.put):
            return name
        if name.startswith(self.put):
            return self.cut + name.removeprefix(self.put)
        return name if self.cut and embedding else None


class Names:
    """The base's tensors, by the names that one adapter has for them."""

    def __init__(self, architecture: Architecture, modules: Iterable[str], tensors: Iterable[str], ask: Ask) -> None:
        """`modules` and `tensors` are all names of the adapter. `ask` is asked what transformers would do, where
        nothing else explains them. Raises `AdapterMismatch` where two rules do, and differ."""
        self._architecture = architecture
        self._tables = _tables(architecture)
        self._by_expert = _by_expert(architecture, *self._tables)
        self._names = dict.fromkeys(sorted(modules), True) | dict.fromkeys(sorted(tensors), False)
        self._rule = self._find(ask)

    @property
    def left(self) -> list[str]:
        """Names of the adapter that have no place in the base, whatever rule is tried."""
        return [name for name, module in self._names.items() if not self._rule.explains(name, module=module)]

    def tensor(self, name: str) -> str | None:
        """The checkpoint's tensor that the adapter calls `name`; None if there is none, or several together."""
        return self._rule.table.tensors.get(self._rule.name(name))

    def parameter(self, name: str) -> str:
        """What the adapter calls `name`, by the names in which it was found: on disk, or in transformers 5."""
        return self._rule.name(name)

    def spellings(self, tensor: str) -> tuple[str, ...]:
        """The module that owns a tensor of the base: as the model that was trained called it; then by its other names,
        if that model was all of the base. Empty: that model had no such module."""
        embedding = tensor in self._architecture.embeddings
        name = self._rule.spelling(self._rule.table.name_of.get(tensor, tensor), embedding=embedding)
        found = [] if name is None else [name.rpartition(".")[0]]
        if not (self._rule.cut or self._rule.put):
            found += self._architecture.module_names(tensor) if tensor in self._architecture.roles else []
        return tuple(dict.fromkeys(found))

    @cached_property
    def of_experts(self) -> Mapping[str, str]:
        """Linear layers of single experts that the base has in one tensor, if the adapter has names for them: as
        `parameter` gives them → as the model that was trained called them."""
        if not self._architecture.slices.keys() & {self.parameter(name) for name in self._names}:
            return {}
        spelled = {name: self._rule.spelling(name, embedding=False) for name in self._architecture.slices}
        own = {self.parameter(name): name for name in self._names}
        return {name: own.get(name, module) for name, module in spelled.items() if module is not None}

    def nearest(self, name: str) -> str | None:
        """The base's module, or tensor, whose name is most like one of the adapter's."""
        module = self._names.get(name, True)
        numbers, alike = re.findall(r"\d+", name), _without_numbers(self._rule.name(name))
        forms: dict[str, str] = {}
        for table in self._tables:
            for found in (one.rpartition(".")[0] if module else one for one in table.tensors):
                form = _without_numbers(found)
                if form not in forms or re.findall(r"\d+", found) == numbers:
                    forms[form] = found
        close = difflib.get_close_matches(alike, forms, n=1, cutoff=0.6)
        return forms[close[0]] if close else None

    def _find(self, ask: Ask) -> Rule:
        tried: list[Rule] = []
        as_they_are = [Rule(table) for table in self._tables]
        alone = [] if self._by_expert is None else [Rule(self._by_expert)]
        for rules in (as_they_are, [Rule(_both(*self._tables))], alone, list(self._edits())):
            tried += rules
            fitting = self._distinct(rule for rule in rules if self._explains_all(rule))
            if len(fitting) > 1:
                self._refuse_as_ambiguous(fitting)
            if fitting:
                return fitting[0]
        tried.append(self._as_loaded(ask))
        return max(tried, key=lambda rule: sum(rule.explains(name, module=m) for name, m in self._names.items()))

    def _explains_all(self, rule: Rule) -> bool:
        return all(rule.explains(name, module=module) for name, module in self._names.items())

    def _edits(self) -> Iterator[Rule]:
        """Rules that put other words around the layers, or none."""
        wrapped = any("module" in name.split(".") for name in self._names)
        for unwrap in (False, True) if wrapped else (False,):
            for table in (*self._tables, *([] if self._by_expert is None else [self._by_expert])):
                puts = self._around(table)
                around = AROUND.union(*(put.split(".") for put in puts))
                for cut in self._beginnings(around, unwrap=unwrap):
                    yield from (Rule(table, cut, put, unwrap) for put in puts)

    def _around(self, table: Table) -> list[str]:
        """What stands before the layers of the base's language model: the beginnings of its embeddings' names."""
        found = {"": None}
        for tensor in sorted(self._architecture.embeddings):
            words = table.name_of.get(tensor, tensor).split(".")[:-2]
            found |= {_prefix(words[:count]): None for count in range(len(words) + 1)}
        return list(found)

    def _beginnings(self, around: frozenset[str], *, unwrap: bool) -> list[str]:
        """With what the adapter's names begin that stands around layers."""
        found: dict[str, None] = {}
        for name in self._names:
            words = [word for word in name.split(".") if not (unwrap and word == "module")]
            for count in range(min(len(words), _MOST_AROUND + 1)):
                if not set(words[:count]) <= around:
                    break
                found[_prefix(words[:count])] = None
        return list(found)

    def _as_loaded(self, ask: Ask) -> Rule:
        """The rule of transformers' own conversions, which understand the names of older versions."""
        weights = {(f"{name}.weight" if module else name): name for name, module in self._names.items()}
        table = self._by_expert or self._tables[-1]
        known = dict(ask(list(weights)))
        for weight, parameter in list(known.items()):
            name = weights.get(weight, weight)
            if name != weight:
                known[name] = parameter.removesuffix(".weight")
                expert = ".".join([parameter.rpartition(".")[0], *name.split(".")[-2:]])
                if parameter in table.tensors and expert in self._architecture.slices:
                    known[name] = expert
        return Rule(table, known=known)

    def _distinct(self, rules: Iterable[Rule]) -> list[Rule]:
        """Of rules that give all names the same meaning, the first."""
        by_meaning: dict[tuple[str, ...], Rule] = {}
        for rule in rules:
            asked = [f"{name}.weight" if module else name for name, module in self._names.items()]
            meaning = tuple(rule.table.tensors.get(rule.name(name), rule.name(name)) for name in asked)
            by_meaning.setdefault(meaning, rule)
        return list(by_meaning.values())

    def _refuse_as_ambiguous(self, rules: list[Rule]) -> None:
        name = next(name for name in self._names if rules[0].name(name) != rules[1].name(name))
        raise AdapterMismatch(
            f"{name}: in the base this may be {rules[0].name(name)} or {rules[1].name(name)}; give the adapter's "
            "tensors the names that they have there"
        )


def _tables(architecture: Architecture) -> tuple[Table, Table]:
    """The names on disk, and those of transformers 5."""
    tied = {name: name for name in architecture.tied}
    on_disk = {name: name for name in architecture.roles}
    found = {name: role.parameter for name, role in architecture.roles.items() if role.parameter is not None}
    in_model = {parameter: name for name, parameter in found.items() if architecture.tensor_of(parameter) == name}
    stacked = frozenset(found.values()) - in_model.keys()
    return Table(tied | on_disk), Table(tied | in_model, stacked)


def _by_expert(architecture: Architecture, *tables: Table) -> Table | None:
    """All names, and those of the experts' layers that the base has in one tensor; None where it has none."""
    both, found = _both(*tables), architecture.slices
    names = {f"{module}.weight": one.tensor for module, one in found.items()}
    return Table({**names, **both.tensors}, both.stacked) if names else None


def _both(first: Table, second: Table) -> Table:
    return Table({**second.tensors, **first.tensors}, first.stacked | second.stacked)


def _prefix(words: Iterable[str]) -> str:
    return "".join(f"{word}." for word in words)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
