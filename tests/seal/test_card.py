"""The model card: its metadata as huggingface_hub reads it, its figures, and the user's own text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from converter import Recipe, convert
from tests.folders import change_json, copy
from tests.models import save_adapter, save_base


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("originals")
    base = save_base(folder / "base-7b", "llama")
    adapter = save_adapter(folder / "adapter", base, "llama")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base-7b")
    return base, adapter


@pytest.fixture
def inputs(originals: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return copy(originals[0], tmp_path / "base-7b"), copy(originals[1], tmp_path / "adapter")


def metadata(out: Path) -> dict[str, Any]:
    """As the Hub reads it."""
    return ModelCard.load(out / "README.md").data.to_dict()


def test_the_metadata_of_a_merged_model_names_base_licence_task_and_format(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    (inputs[0] / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# Base\n")
    (inputs[1] / "README.md").unlink()

    out = convert(*inputs, tmp_path / "out").out

    assert metadata(out) == {
        "license": "apache-2.0",
        "base_model": "maker/base-7b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bitsandbytes", "4-bit", "lora-merged"],
    }


def test_licences_that_differ_are_both_named(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (inputs[0] / "README.md").write_text("---\nlicense: other\nlicense_name: llama9\nlicense_link: LICENSE\n---\n")
    (inputs[1] / "README.md").write_text("---\nlanguage: en\nlicense:\n- mit\n---\n")

    out = convert(*inputs, tmp_path / "out").out

    found = metadata(out)
    assert (found["license"], found["license_name"]) == ("other", "llama9-and-mit")
    assert found["license_link"] == "README.md"
    assert "By their own cards: base: llama9, adapter: mit." in (out / "README.md").read_text()


def test_a_licence_of_its_own_name_is_kept_with_its_link(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    link = "https://example.org/licence"
    (inputs[0] / "README.md").write_text(f"---\nlicense: other\nlicense_name: llama9\nlicense_link: {link}\n---\n")

    found = metadata(convert(*inputs, tmp_path / "out").out)

    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "llama9", link)


@pytest.mark.parametrize(
    "card",
    [
        b"no metadata",
        b"---\nlicense: [a, b]\n---\n",
        b"---\nlicense: mit\n---\n\xff",
        b"---\nlicense: mit: x\ntags: y\n---\n",
        b"license: mit\n",
    ],
)
def test_a_card_that_makes_no_sense_states_no_licence_and_stops_nothing(
    card: bytes, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    (inputs[0] / "README.md").write_bytes(card)

    assert "license" not in metadata(convert(inputs[0], None, tmp_path / "out").out)


def test_error_and_survival_are_those_of_the_receipt(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = convert(*inputs, tmp_path / "out").out

    card = (out / "README.md").read_text()
    tensors = json.loads((out / "conversion.json").read_text())["tensors"].values()
    errors = [tensor["error"] for tensor in tensors if tensor["action"] == "quantize"]
    survivals = [tensor["survival"] for tensor in tensors if "survival" in tensor]
    for values, worst in ((errors, max(errors)), (survivals, min(survivals))):
        assert re.search(rf"\| {sum(values) / len(values):.4f} \| {worst:.4f} \|", card)


def test_it_says_how_each_server_loads_its_format(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    quantized = (convert(*inputs, tmp_path / "nf4").out / "README.md").read_text()
    merged = (convert(*inputs, tmp_path / "none", Recipe(quant_type="none")).out / "README.md").read_text()

    for card in (quantized, merged):
        assert "vllm serve PATH\n" in card
        assert "sglang.launch_server --model-path PATH" in card
        assert 'AutoModelForCausalLM.from_pretrained("PATH")' in card
    assert "--load-format bitsandbytes" in quantized
    assert "bitsandbytes" not in merged


def test_the_users_own_text_is_part_of_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = convert(*inputs, tmp_path / "out", card="Trained on my notes.\n").out

    assert "\n\nTrained on my notes.\n\n## How it was made\n" in (out / "README.md").read_text()


def test_a_base_without_a_name_on_the_hub_is_not_named(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    found = metadata(convert(inputs[0], None, tmp_path / "out").out)

    assert "base_model" not in found
    assert "base_model_relation" not in found
    assert found["tags"] == ["bitsandbytes", "4-bit"]
