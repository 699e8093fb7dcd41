"""Which tensor of the base each tensor of the adapter belongs to; refuses by name what belongs nowhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from converter.errors import AdapterMismatch, BadAdapter, Unsupported
from converter.merge.adapter import Adapter
from converter.merge.bias import LoraBias
from converter.merge.change import Change, read_stored
from converter.merge.embedding import EmbeddingLora
from converter.merge.experts import OneExpert, StackedExperts
from converter.merge.heads import advice_on, advice_on_lost_head
from converter.merge.kinds import Site, changes_of, changes_of_slices
from converter.merge.lora import Lora
from converter.merge.names import Ask, Names
from converter.merge.tokens import TokenRows
from converter.merge.tuners import Tuner
from converter.merge.tuners import check as check_bridged
from converter.model.architecture import Architecture, Shape
from converter.read.header import TensorHeader


@dataclass
class Match:
    """What the adapter does to the base, by checkpoint tensor name."""

    deltas: dict[str, Change] = field(default_factory=dict)
    replacements: dict[str, TensorHeader] = field(default_factory=dict)
    """Tensors of the adapter's file that take the place of the base's."""
    untied: dict[str, str] = field(default_factory=dict)
    """New tensor, which the base shares with another → the tensor of the base that it starts from."""
    one: set[str] = field(default_factory=set)
    """Tensors that the adapter trained as one with those that the base ties them to."""
    parted: bool = False
    """Whether two tensors of the base, which its config ties, are to differ."""
    vocabulary: int | None = None
    """Rows of the embeddings, where the adapter resized them."""
    notes: list[str] = field(default_factory=list)


def match(adapter: Adapter, architecture: Architecture, shapes: Mapping[str, Shape], ask: Ask = lambda _: {}) -> Match:
    """Give every tensor of the adapter its place. `shapes` are those of the base's tensors; `ask` is `ask.parameters`.

    Raises `AdapterMismatch` naming the first tensor without a place, or with one that it doesn't fit.
    """
    of_members = [note for member in adapter.members for note in match(member, architecture, shapes, ask).notes]
    names = Names(architecture, adapter.modules, adapter.replacements, ask)
    _refuse_left(adapter, architecture, names)
    adapter.options.learn(module for name in _changeable(architecture) for module in names.spellings(name))
    adapter.options.learn(names.of_experts.values())
    found = Match(notes=[*adapter.notes, *of_members])
    for name, tensor in adapter.replacements.items():
        target = names.tensor(name)
        assert target is not None  # noqa: S101  (it has a place)
        if target in found.replacements:
            raise BadAdapter(f"{name}: the adapter has two tensors for {target}")
        _check_replacement(adapter, architecture, target, name)
        found.replacements[target] = tensor
    now = {**shapes, **{name: tensor.shape for name, tensor in found.replacements.items()}}
    used = [module for module in adapter.modules if not _is_unused(adapter, architecture, names, module, found.notes)]
    sites = [Site(module, adapter.modules[module], adapter.options, names, architecture, now) for module in used]
    for target, change in _changes(adapter, sites):
        if target in found.deltas:
            raise BadAdapter(f"{change.module}: the adapter has two deltas for {target}")
        found.deltas[target] = change
    _note_layout_of_experts(adapter, found)
    check_bridged(found.deltas, adapter.folder.label)
    _check_saved_whole(adapter, architecture, names, found)
    _keep_ties(adapter, architecture, found)
    _untie(adapter, architecture, names, found)
    _check_shapes(architecture, found, shapes)
    _check_nothing_lost(adapter, architecture, names, found)
    factors = [tensor for parts in adapter.modules.values() for part, tensor in parts.items() if part.endswith("_B")]
    if factors and all(adapter.is_zero(factor) for factor in factors):
        found.notes.append("every lora_B of the adapter is zero: it was never trained, and changes nothing")
    return found


def scaled(found: Match, adapter: Adapter, scale: float) -> Match:
    """The same with all changes `scale` times as large. Raises `Unsupported` where one has no size of its own.

    What takes the place of a tensor or of its rows stays as it is, and so do DoRA's lengths: PEFT's `set_scale`.
    """
    deltas = {name: change.scaled(scale) for name, change in found.deltas.items()}
    if all(isinstance(change, TokenRows) for change in deltas.values()):
        raise Unsupported("`scale` has no meaning for this adapter: it only replaces tensors and rows")
    kept = []
    if found.replacements or any(isinstance(change, TokenRows) for change in deltas.values()):
        kept.append("the tensors and rows that it replaces")
    if adapter.options.variants.uses_dora:
        kept.append("the lengths that DoRA learned")
    notes = [f"`scale` {scale:g} multiplies the adapter's deltas, but not {' and '.join(kept)}"] if kept else []
    return replace(found, deltas=deltas, notes=[*found.notes, *notes])


def _changes(adapter: Adapter, sites: list[Site]) -> Iterator[tuple[str, Change]]:
    """Name of a tensor of the base → what is done to it; the same name twice if the adapter contradicts itself."""
    sliced = [site for site in sites if site.slice is not None]
    if sliced and adapter.options.is_bridged:
        raise Unsupported(
            f"{sliced[0].module}: only LoRA is merged into one expert of a tensor that holds all of them; give a base "
            "with a tensor for each expert"
        )
    read = Tuner.of(adapter.config, adapter.shared, sites).changes if adapter.options.is_bridged else changes_of
    for site in sites:
        if site.slice is None:
            yield from read(site).items()
        _check_targeted(site)
    yield from changes_of_slices(sliced).items()


def _note_layout_of_experts(adapter: Adapter, found: Match) -> None:
    """Whether lora_B of experts is grouped by expert, its values can't tell."""
    of_unsloth = str(adapter.base_name).startswith("unsloth/") and adapter.options.variants.grouped is None
    if of_unsloth and any(isinstance(change, StackedExperts | OneExpert) for change in found.deltas.values()):
        found.notes.append(
            "before September 2026, Unsloth grouped the columns of lora_B by expert, and adapter_config.json doesn't "
            'say whether it did: if so, add "lora_B_layout": "grouped_by_expert" to it'
        )


def _refuse_left(adapter: Adapter, architecture: Architecture, names: Names) -> None:
    """Refuse names that have no place; the base is not to blame, as far as names tell."""
    left = names.left
    if not left:
        return
    name, total = left[0], len(adapter.modules) + len(adapter.replacements)
    advice = advice_on(name, adapter.config, adapter.replacements.get(name), architecture.class_name)
    nearest = names.nearest(name)
    if advice is None:
        advice = f"the nearest name there is {nearest}" if nearest else "nothing there has a similar name"
    count = "" if len(left) == 1 else f" ({len(left):,} of the adapter's {total:,} names have no place)"
    kind = "tensor" if name in adapter.replacements else "module"
    raise AdapterMismatch(f"{name}: in the adapter, but the base has no such {kind}{count}; {advice}")


def _is_unused(adapter: Adapter, architecture: Architecture, names: Names, module: str, notes: list[str]) -> bool:
    """Whether a module is in the base's files alone, and not in the model: its adapter never got a gradient.

    Adds a note if so. Raises `Unsupported` if the adapter changes it all the same.
    """
    role = architecture.roles.get(names.tensor(f"{module}.weight") or "")
    if role is None or role.parameter is not None:
        return False
    factors = [tensor for part, tensor in adapter.modules[module].items() if part.endswith("_B")]
    if not factors or not all(adapter.is_zero(factor) for factor in factors):
        raise Unsupported(
            f"{module}: the adapter changes it, but {architecture.class_name} does not use it: nothing would change"
        )
    notes.append(f"{module}: {architecture.class_name} does not use it, and the adapter left it as it was")
    return True


def _changeable(architecture: Architecture) -> list[str]:
    return [*architecture.roles, *architecture.tied]


def _check_replacement(adapter: Adapter, architecture: Architecture, target: str, name: str) -> None:
    module, _, leaf = name.rpartition(".")
    embedding = target in architecture.embeddings
    if adapter.options.is_saved_whole(module) or embedding:
        return
    if leaf == "bias" and adapter.options.trains_biases:
        return
    raise AdapterMismatch(
        f"{name}: in the adapter's file, but neither modules_to_save nor bias says that it replaces the base's"
    )


def _check_targeted(site: Site) -> None:
    if "trainable_tokens_delta" in site.parts or site.stacks:
        return  # these are named by their own option, which was read
    if site.options.variants.keeps_ties and site.weight in {**site.architecture.tied, **site.architecture.doubled}:
        return  # PEFT takes the head's name from target_modules
    spellings = {site.module, *site.names.spellings(site.weight)}
    if site.options.names_targets and not any(site.options.targets(name) for name in spellings):
        raise AdapterMismatch(f"{site.module}: the adapter has a delta for it, but its target_modules don't name it")


def _keep_ties(adapter: Adapter, architecture: Architecture, found: Match) -> None:
    """Where the adapter trained embedding and head as one, leave them one: what is done to both is done once."""
    keeps = adapter.options.variants.keeps_ties
    for target, source in {**architecture.tied, **architecture.doubled}.items():
        own, shared = found.deltas.get(target), found.deltas.get(source)
        if keeps and own is not None and shared is not None:
            if not _is_the_same(adapter, own, shared):
                raise BadAdapter(
                    f"{own.module}: ensure_weight_tying is true, but its tensors are not {shared.module}'s"
                )
        elif own is not None or not (keeps or isinstance(shared, TokenRows)):
            continue
        found.deltas.pop(target, None)
        if target in architecture.doubled:
            found.deltas |= {} if shared is None else {target: shared}
            if source in found.replacements:
                found.replacements.setdefault(target, found.replacements[source])
        found.one.add(target)


def _is_the_same(adapter: Adapter, head: Change, embedding: Change) -> bool:
    """Whether LoRA on a head is that on the embedding, turned: A is Bᵀ, and B is Aᵀ."""
    if not isinstance(head, Lora) or not isinstance(embedding, EmbeddingLora) or head.scaling != embedding.scaling:
        return False
    pairs = ((head.a, embedding.b), (head.b, embedding.a))
    return all(
        one.shape == other.shape[::-1] and read_stored(one, adapter.folder).equal(read_stored(other, adapter.folder).T)
        for one, other in pairs
    )


def _untie(adapter: Adapter, architecture: Architecture, names: Names, found: Match) -> None:
    """Give a tensor that the base shares one of its own, where the adapter makes the two differ."""
    for target, source in architecture.tied.items():
        own, shared = found.replacements.get(target), found.replacements.get(source)
        if own is not None and shared is not None and target not in found.deltas and adapter.same_bytes(own, shared):
            del found.replacements[target]
            continue
        if target in found.one and own is None:
            continue
        # An embedding that is saved because it was resized is still both; one that was trained on its own is not.
        trained = shared is not None and any(
            adapter.options.is_saved_whole(module) for module in names.spellings(source)
        )
        if target in found.deltas or own is not None or trained or source in found.deltas:
            # The two part where one of them was trained: the other stays what the base has.
            found.untied[target] = source
            found.notes.append(f"{target} gets a tensor of its own: the base shares {source}, the adapter differs")
    changed = found.deltas.keys() | found.replacements.keys()
    for target, source in architecture.doubled.items():
        own, shared = found.replacements.get(target), found.replacements.get(source)
        equal = own is not None and shared is not None and adapter.same_bytes(own, shared)
        if target in found.one and (own is None or equal):
            continue
        if {target, source} & (found.deltas.keys() if equal else changed):
            found.parted = True
            found.notes.append(
                f"{target} and {source}, which the base's config ties, are not tied any more: they differ"
            )


def _check_shapes(architecture: Architecture, found: Match, shapes: Mapping[str, Shape]) -> None:
    rows: dict[str, int] = {}
    for name, tensor in found.replacements.items():
        expected = shapes[found.untied.get(name, name)]
        resized = name in architecture.embeddings and tensor.shape[1:] == expected[1:]
        if tensor.shape != expected and not resized:
            raise AdapterMismatch(f"{name}: {list(tensor.shape)} in the adapter, {list(expected)} in the base")
        if name in architecture.embeddings:
            rows[name] = tensor.shape[0]
    for name in architecture.embeddings:
        if name in shapes and name not in rows:
            rows[name] = shapes[name][0]
    for name, source in found.untied.items():
        rows.setdefault(name, rows.get(source, shapes[source][0]))
    if any(count != shapes[found.untied.get(name, name)][0] for name, count in rows.items()):
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{name} {count:,}" for name, count in sorted(rows.items()))
            raise AdapterMismatch(f"the adapter resizes the vocabulary of one embedding only: rows are {listed}")
        found.vocabulary = next(iter(rows.values()))
    for name, pair in found.deltas.items():
        base = found.untied.get(name, name)
        shape = found.replacements[name].shape if name in found.replacements else shapes[base]
        if name in architecture.roles and architecture.roles[name].kind == "conv1d":
            shape = shape[::-1]
        if pair.shape != shape:
            raise AdapterMismatch(
                f"{pair.module}: {_what_has_its_shape(pair)} is {list(pair.shape)}, the base's weight {list(shape)}: "
                "was the adapter trained on another base?"
            )


def _what_has_its_shape(change: Change) -> str:
    if isinstance(change, TokenRows):
        return "trainable_tokens_delta's embedding"
    return "lora_B.bias" if isinstance(change, LoraBias) else "lora_B·lora_A"


def _check_saved_whole(adapter: Adapter, architecture: Architecture, names: Names, found: Match) -> None:
    """Refuse an adapter that lacks a tensor of a module which its config saves whole."""
    for name in _changeable(architecture):
        whole = any(adapter.options.is_saved_whole(module) for module in names.spellings(name))
        if whole and name not in found.replacements:
            raise BadAdapter(f"{name}: {adapter.options.replaces_by} names it, but the adapter's file doesn't have it")
    saved = adapter.options.saved
    if saved and not any(adapter.options.is_saved_whole(name.rpartition(".")[0]) for name in adapter.replacements):
        raise BadAdapter(
            f"{adapter.folder.label}: modules_to_save names {', '.join(saved)}, but neither the adapter's file nor the "
            f"base has such a module{advice_on_lost_head(adapter.config, architecture.class_name)}"
        )


def _check_nothing_lost(adapter: Adapter, architecture: Architecture, names: Names, found: Match) -> None:
    """Refuse an adapter that lost tensors: some layers of a kind have theirs and others don't."""
    touched: dict[str, set[str]] = defaultdict(set)
    expected: dict[str, set[str]] = defaultdict(set)
    for name, role in architecture.roles.items():
        modules = names.spellings(name)
        if not modules:
            continue
        kind = re.sub(r"\d+", "*", modules[0])
        if name in found.deltas:
            touched[kind].add(modules[0])
        targeted = adapter.options.names_targets and any(adapter.options.targets(module) for module in modules)
        if targeted and role.kind in ("linear", "conv1d", "convolution", "embedding"):
            expected[kind].add(modules[0])
    changed = {names.parameter(module) for module in adapter.modules}
    for name, module in names.of_experts.items():
        kind = re.sub(r"\d+", "*", name)
        if name in changed:
            touched[kind].add(module)
        if adapter.options.names_targets and adapter.options.targets(module):
            expected[kind].add(module)
    for kind, modules_touched in touched.items():
        # Names that match but have no tensors at all are normal: a vision tower that wasn't trained.
        lost = sorted(expected[kind] - modules_touched)
        if lost:
            raise BadAdapter(f"{lost[0]}: target_modules names it, but the adapter's file has no tensors for it")
