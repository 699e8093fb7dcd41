"""How servers name the modules of a model, and which of them they make one of.

Both servers compare a config's list of kept modules with names of their own: a kept layer that the list has in another
spelling alone is taken for a quantized one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of one module that servers fuse into one layer. vLLM's `packed_modules_mapping`s; llm-compressor's
`DEFAULT_FUSED_MAPPINGS`."""
_NAMES_OF_FUSED = ("qkv_proj", "fused_qkv_a_proj", "gate_up_proj", "w13")


def groups(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Module → the modules that servers fuse with it, itself included, where there are several."""
    found: dict[tuple[str, int], list[str]] = {}
    for module in modules:
        around, _, last = module.rpartition(".")
        for number, parts in enumerate(FUSED):
            if last in parts:
                found.setdefault((around, number), []).append(module)
    return {module: tuple(group) for group in found.values() if len(group) > 1 for module in group}


def fused_name(module: str) -> str:
    """The layer that servers make of a module and of those that are fused with it."""
    around, dot, last = module.rpartition(".")
    name = next((name for name, parts in zip(_NAMES_OF_FUSED, FUSED, strict=True) if last in parts), last)
    return f"{around}{dot}{name}"


def spellings(names: Iterable[str]) -> set[str]:
    """What servers may call a module of these names; they are the checkpoint's, and transformers'.

    A model with more than a language model has its parts at the top, and the language model's own names below one of
    them: `hf_to_vllm_mapper` of vLLM's classes. SGLang has the language model's names at the top.
    """
    found = set(names)
    for name in tuple(found):
        inner = name.removeprefix("model.")
        if inner.startswith("language_model."):
            text = inner.removeprefix("language_model.").removeprefix("model.")
            found |= {f"language_model.model.{text}", f"model.{text}"}
        elif inner.partition(".")[0] in _BESIDE_TEXT:
            # SGLang's attention of images has a name of its own for what is one matrix in the checkpoint.
            found |= {inner, inner.replace(".attn.qkv", ".attn.qkv_proj")}
    return found


_BESIDE_TEXT = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "embed_vision",
                "embed_audio", "connector", "qformer", "language_projection")  # fmt: skip


def is_skipped(module: str, skip: Collection[str]) -> bool:
    """Whether a server leaves a module alone, by its own name: a part of its path is in the list, or its beginning.

    `is_layer_skipped_bnb`, which is the same in both servers.
    """
    parts = module.split(".")
    return any(part in skip for part in parts) or any(".".join(parts[: n + 1]) in skip for n in range(len(parts)))


def unskipped(
    kept: Collection[str], others: Collection[str], names: Mapping[str, Sequence[str]], skip: Collection[str]
) -> Iterator[str]:
    """Entries that a list of kept modules lacks, for servers to leave them alone; none for those that servers fuse with
    one of the `others`. `names`: module → the checkpoint's name and transformers'."""
    alone, group_of = set(kept), groups([*kept, *others])
    for module in kept:
        spelled = spellings(names[module])
        if module in group_of:
            spelled = {fused_name(name) for name in spelled}
        if alone.issuperset(group_of.get(module, ())):
            yield from sorted(name for name in spelled if not is_skipped(name, skip))
