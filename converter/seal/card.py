"""The model card: what the output is, what it was made of, how right it is, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import ConverterError
from converter.model.loaders import SGLANG_, TRANSFORMERS, VLLM_
from converter.quantize.formats import format_of
from converter.quantize.measure import Fidelity
from converter.read.folder import read_bytes
from converter.read.hub.folder import is_repo_id
from converter.seal.receipt import CARD

if TYPE_CHECKING:
    from converter.plan.plan import Plan
    from converter.read.folder import Folder
    from converter.seal.receipt import Origin

_MOST_BYTES = 1_000_000
_VALUES = {
    "license": r"[A-Za-z0-9][\w.+-]{0,80}",
    "license_name": r"[A-Za-z0-9][\w.+-]{0,80}",
    "license_link": r"(?:https://)?[A-Za-z0-9][\w./@+~-]{0,200}",
    "pipeline_tag": r"[a-z0-9-]{1,40}",
}
"""What is read of another card's metadata: values that are plain text in YAML, and are written again as they are."""


@dataclass(frozen=True)
class CardOf:
    """What the cards of base and adapter say, and the text that the user adds."""

    base: Mapping[str, str]
    adapter: Mapping[str, str]
    text: str = ""


def metadata_of(folder: Folder | None) -> dict[str, str]:
    """Licence and task, as the model card of a base or an adapter states them; empty without a card."""
    if folder is None or CARD not in folder.names():
        return {}
    try:
        text = read_bytes(folder, CARD, limit=_MOST_BYTES).decode()
    except (ConverterError, UnicodeDecodeError):
        return {}  # a card that can't be read is no reason to convert nothing
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    front = match[1] if match else ""
    found = {}
    for key, value in _VALUES.items():
        # One value on its line, or the first of a list.
        stated = re.search(rf"^{key}:(?:[ ]*\r?\n)?[ -]*[\"']?({value})[\"']?[ ]*\r?$", front, re.MULTILINE)
        if stated is not None:
            found[key] = stated[1]
    return found


def model_card(plan: Plan, origin: Origin, fidelity: Mapping[str, Fidelity], card: CardOf) -> bytes:
    """README.md, with the metadata that the Hub reads."""
    kind = format_of(plan.recipe)
    front = [*_licence(origin, card), *_made_from(plan, origin), "library_name: transformers"]
    if task := card.base.get("pipeline_tag") or _task(plan.class_name):
        front.append(f"pipeline_tag: {task}")
    if tags := [*kind.tags, *(["lora-merged"] if origin.adapter is not None else [])]:
        front += ["tags:", *(f"- {tag}" for tag in tags)]
    lines = ["---", *front, "---", "", "# Model card", "", f"{kind.description}: {_ingredients(origin)}.", ""]
    if card.text:
        lines += [card.text.strip(), ""]
    lines += ["## How it was made", "", "| recipe | |", "| --- | --- |", *_recipe(plan), ""]
    lines += [*_figures(plan, fidelity), "## How to load it", "", *_how_to_load(plan), ""]
    lines += _licences_in_words(card)
    lines.append("`conversion.json` says what went in, by digests, and how far each tensor is from the exact sum.")
    return ("\n".join(lines) + "\n").encode()


def _licence(origin: Origin, card: CardOf) -> list[str]:
    """The output is under the licence of its base, and under that of its adapter if that has one."""
    base, adapter = card.base, card.adapter if origin.adapter is not None else {}
    if not base.get("license") or adapter.get("license", base["license"]) == base["license"]:
        stated = base if base.get("license") else adapter
        return [f"{key}: {stated[key]}" for key in ("license", "license_name", "license_link") if key in stated]
    names = [stated.get("license_name", stated["license"]) for stated in (base, adapter)]
    return ["license: other", f"license_name: {'-and-'.join(names)}", f"license_link: {CARD}"]


def _licences_in_words(card: CardOf) -> list[str]:
    said = {"base": card.base, "adapter": card.adapter}
    names = [f"{who}: {of.get('license_name', of['license'])}" for who, of in said.items() if of.get("license")]
    return ["## Licence", "", f"By their own cards: {', '.join(names)}.", ""] if names else []


def _made_from(plan: Plan, origin: Origin) -> list[str]:
    """A merged model is no mere quantization of its base: it is one of the base alone, else a merge or a finetune."""
    names = [name for name in (origin.base_name, origin.adapter_name) if name is not None and is_repo_id(name)]
    if origin.base_name is None or not names:
        return []
    if origin.adapter is None:
        relation = [] if plan.recipe.quant_type == "none" else ["base_model_relation: quantized"]
    else:
        relation = [f"base_model_relation: {'merge' if len(names) > 1 else 'finetune'}"]
    if len(names) == 1:
        return [f"base_model: {names[0]}", *relation]
    return ["base_model:", *(f"- {name}" for name in names), *relation]


def _task(class_name: str) -> str | None:
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    return "image-text-to-text" if class_name.endswith("ForConditionalGeneration") else None


def _ingredients(origin: Origin) -> str:
    made_of = (origin.base_name or "a local base") + (f" at {origin.base_commit}" if origin.base_commit else "")
    if origin.adapter is None:
        return made_of
    adapter = origin.adapter_name or "a local adapter"
    return (
        f"{made_of}, with {adapter}" + (f" at {origin.adapter_commit}" if origin.adapter_commit else "") + " merged in"
    )


def _recipe(plan: Plan) -> list[str]:
    recipe = plan.recipe
    settings: dict[str, Any] = {
        "quant type": recipe.quant_type,
        "dtype": recipe.dtype,
        "merge precision": recipe.merge_precision,
    }
    settings |= format_of(recipe).settings
    if recipe.keep:
        settings["kept in 16 bits"] = ", ".join(recipe.keep)
    if recipe.scale != 1.0:
        settings["scale of the adapter"] = f"{recipe.scale:g}"
    if (by := recipe.calibration) is not None:
        text = "that the merged model wrote" if by.is_self else f"of a text whose sha256 begins with {by.text[:12]}"
        settings["calibrated by"] = f"{by.tokens} tokens {text}"
    if recipe.combine is not None:
        weights = ", ".join(f"{weight:g}" for weight in recipe.combine.weights)
        settings["adapters combined"] = f"{recipe.combine.kind}, weights {weights}"
    return [f"| {key} | {value} |" for key, value in settings.items()]


def _figures(plan: Plan, fidelity: Mapping[str, Fidelity]) -> list[str]:
    """Relative error of what is quantized, and the survival of the delta."""
    quantized = {tensor.name for tensor in plan.tensors() if tensor.action == "quantize"}
    errors = [of.error for name, of in fidelity.items() if name in quantized]
    survivals = [of.survival for of in fidelity.values() if of.survival is not None]
    rows = []
    if errors:
        mean = sum(errors) / len(errors)
        rows.append(f"| relative error of the quantized weights, ‖Q(S) − S‖ / ‖S‖ | {mean:.4f} | {max(errors):.4f} |")
    if survivals:
        mean = sum(survivals) / len(survivals)
        rows.append(
            f"| survival: the share of the adapter's change that the output keeps | {mean:.4f} | {min(survivals):.4f} |"
        )
    return ["| figure | mean | worst |", "| --- | --- | --- |", *rows, ""] if rows else []


def _how_to_load(plan: Plan) -> list[str]:
    """With each loader that takes this format, less those whose rules say that they don't."""
    lines = (
        []
        if plan.loaders.get(TRANSFORMERS)
        else [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            "```",
            "",
        ]
    )
    library = format_of(plan.recipe).library
    if library == "compressed-tensors":
        lines += ["transformers needs `pip install compressed-tensors` to load it; vLLM needs nothing else.", ""]
    by_bitsandbytes = library == "bitsandbytes" and plan.recipe.quant_type != "none"
    commands = []
    if not plan.loaders.get(VLLM_):
        if by_bitsandbytes:
            commands.append("pip install vllm-bnb-plugin  # with vLLM 0.28 or newer; without it up to 0.27")
        commands.append("vllm serve PATH")
    if not plan.loaders.get(SGLANG_):
        option = " --load-format bitsandbytes" if by_bitsandbytes else ""
        commands.append(f"python -m sglang.launch_server --model-path PATH{option}")
    return [*lines, "```", *commands, "```"] if commands else lines
