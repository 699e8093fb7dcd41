"""What goes into an output, by contents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from converter import convert
from converter.seal.receipt import read_receipt
from tests.folders import change_tensor, copy
from tests.models import save_adapter, save_base

EMBEDDING = "model.embed_tokens.weight"


def test_what_an_untied_head_was_read_from_is_told_from_another(tmp_path: Path) -> None:
    """The base has no tensor by the head's name, and the adapter has an embedding in the place of the base's."""
    base = save_base(tmp_path / "base", "qwen3")  # ties its head
    other = copy(base, tmp_path / "other")
    change_tensor(next(other.glob("*.safetensors")), EMBEDDING, lambda value: value.mul_(2))
    adapter = save_adapter(
        tmp_path / "adapter", base, "qwen3", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    out = tmp_path / "out"

    first = convert(base, adapter, out)
    receipt = read_receipt(out)
    assert receipt is not None
    assert "lm_head.weight" in receipt["origin"]["base"]
    assert EMBEDDING not in receipt["origin"]["base"]
    assert convert(base, adapter, out).nothing_to_do

    again = convert(other, adapter, out, overwrite=True)
    assert not again.nothing_to_do
    assert again.fingerprint != first.fingerprint


def test_a_receipt_begins_with_a_summary_of_its_tensors(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    out = convert(base, save_adapter(tmp_path / "adapter", base, "llama"), tmp_path / "out").out

    receipt = json.loads((out / "conversion.json").read_text())

    assert next(iter(receipt)) == "summary"
    assert list(receipt)[1:] == sorted(list(receipt)[1:])
    summary, tensors = receipt["summary"], receipt["tensors"]
    assert summary["tensors"] == {"merged": 14, "quantized": 14, "kept": 7, "replaced": 0}
    errors = {name: tensor["error"] for name, tensor in tensors.items() if tensor["action"] == "quantize"}
    survivals = {name: tensor["survival"] for name, tensor in tensors.items() if "survival" in tensor}
    for found, figures, worst in (("relative_error", errors, max), ("survival", survivals, min)):
        assert summary[found]["mean"] == pytest.approx(sum(figures.values()) / len(figures))
        assert summary[found]["worst"] == worst(figures.values()) == figures[summary[found]["worst_tensor"]]
    assert summary["bytes"] == {
        "base": sum(value.nbytes for value in load_file(base / "model.safetensors").values()),
        "output": (out / "model.safetensors").stat().st_size,
    }
