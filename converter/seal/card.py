"""The model card: what the output is, what it was made of, how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.quantize.formats import format_of

if TYPE_CHECKING:
    from converter.plan.plan import Plan
    from converter.seal.receipt import Origin

_SERVING = (
    "transformers needs `pip install compressed-tensors` to load it; vLLM needs nothing else:",
    "",
    "```sh",
    "vllm serve PATH",
    "```",
    "",
)


def model_card(plan: Plan, origin: Origin) -> bytes:
    """README.md, with the metadata that the Hub reads."""
    recipe, kind = plan.recipe, format_of(plan.recipe)
    tags = list(kind.tags)
    tags += ["lora-merged"] if origin.adapter is not None else []
    front = ["library_name: transformers"]
    if origin.base_name is not None and "/" in origin.base_name:
        front.insert(0, f"base_model: {origin.base_name}")
        front.insert(1, f"base_model_relation: {'quantized' if recipe.quant_type != 'none' else 'finetune'}")
    if tags:
        front += ["tags:", *(f"- {tag}" for tag in tags)]
    base = origin.base_name or "a local base"
    made_of = f"{base}" + (f" at {origin.base_commit}" if origin.base_commit else "")
    if origin.adapter is not None:
        adapter = origin.adapter_name or "a local adapter"
        made_of += (
            f", with {adapter}" + (f" at {origin.adapter_commit}" if origin.adapter_commit else "") + " merged in"
        )
    lines = ["---", *front, "---", "", "# Model card", "", f"{kind.description}: {made_of}.", ""]
    settings: dict[str, str] = {
        "quant type": recipe.quant_type,
        "dtype": recipe.dtype,
        "merge precision": recipe.merge_precision,
    }
    settings |= kind.settings
    if recipe.keep:
        settings["kept in 16 bits"] = ", ".join(recipe.keep)
    lines += ["| recipe | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in settings.items()), ""]
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        *(_SERVING if kind.library == "compressed-tensors" else ()),
        "`conversion.json` says what went in, by digests, and how far each tensor is from the exact sum.",
    ]
    return ("\n".join(lines) + "\n").encode()
