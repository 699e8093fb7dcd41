"""What goes into an output, by contents."""

from __future__ import annotations

from pathlib import Path

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
