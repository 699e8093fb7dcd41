"""A model run a layer at a time says what the whole model says, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from converter import Inputs, Recipe, convert, make_plan
from converter.errors import BadCheckpoint, Unsupported
from converter.layers.activations import Activations
from converter.layers.layered import LayeredModel
from converter.layers.weights import Weights
from converter.model.skeleton import Skeleton
from converter.tensors import torch_device
from tests.architectures import KINDS, save_tiny, save_tiny_adapter
from tests.layers.models import (
    FIRST,
    REST,
    SIXTEEN_BIT,
    equal,
    layered_logits,
    token_windows,
    whole_logits,
    whole_model,
)
from tests.models import SIZES, save_adapter, save_base

# Of experts that are one tensor, which "all-linear" doesn't reach.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:target_parameters=:RuntimeWarning"),
]

SLIDING = ("mistral", "gemma2", "gemma3_text", "phi3", "starcoder2", "cohere2", "exaone4", "gpt_oss")
"""With a window of 8 tokens, of windows that have 33 and 40."""
CHANGES: dict[str, dict[str, Any]] = {name: {"sliding_window": 8} for name in SLIDING}
ALWAYS = (
    *("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gptj", "opt", "bloom", "cohere2"),
    *("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "mamba2", "lfm2"),
)
"""Those that are tried on each commit; `make slow` tries all."""
DECODERS = [*KINDS["decoders"], *KINDS["mixtures of experts"], *KINDS["state spaces and hybrids"]]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in DECODERS]
)
def test_the_logits_are_the_whole_models(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name, **CHANGES.get(name, {}))

    assert equal(layered_logits(base), whole_logits(whole_model(base)))
    assert equal(layered_logits(base, tiles=[FIRST, REST], budget=0), whole_logits(whole_model(base)))
    assert equal(layered_logits(base, dtype="bfloat16"), whole_logits(whole_model(base, torch.bfloat16)))


@pytest.mark.parametrize("name", ["gemma3_text", "mistral"])
def test_a_sliding_window_counts(name: str, tmp_path: Path) -> None:
    wide, narrow = (save_tiny(tmp_path / str(size), name, sliding_window=size) for size in (64, 8))

    assert not equal(layered_logits(narrow), layered_logits(wide))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "gpt_oss"])
def test_an_adapter_is_merged_while_it_runs(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name)
    adapter = save_tiny_adapter(tmp_path / "adapter", base, name)
    made = convert(base, adapter, tmp_path / "made", SIXTEEN_BIT).out

    found = layered_logits(base, adapter)

    assert equal(found, whole_logits(whole_model(made)))
    assert not equal(found, layered_logits(base))


def test_with_the_references_precision_it_is_what_peft_merges(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    merged = PeftModel.from_pretrained(whole_model(base, torch.bfloat16), adapter).merge_and_unload()

    found = layered_logits(base, adapter, recipe=Recipe(quant_type="none", merge_precision="reference"))

    assert equal(found, whole_logits(merged.float()))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_quantized_checkpoint_is_run_as_its_codes_say(name: str, quant_type: Any, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name)
    out = convert(base, None, tmp_path / "out", Recipe(quant_type=quant_type)).out
    loaded: Any = whole_model(out, torch.bfloat16)

    expected = whole_logits(loaded.dequantize().float())

    assert equal(layered_logits(out), expected)


@pytest.mark.parametrize("quant_type", ["int8", "w4a16", "fp8", "mxfp4a16"])
def test_other_formats_are_run_as_the_16_bit_model_that_they_stand_for(quant_type: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    out = convert(base, None, tmp_path / "out", Recipe(quant_type=quant_type)).out
    opened = convert(out, None, tmp_path / "opened", SIXTEEN_BIT).out

    found = layered_logits(out)

    assert equal(found, whole_logits(whole_model(opened)))
    assert not equal(found, layered_logits(base))


def test_one_layer_at_a_time_has_weights_and_the_head_only_its_tile(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", num_hidden_layers=3)
    with Inputs(base, None) as inputs, Activations(10**9) as activations:
        weights = Weights(make_plan(inputs.base, None, SIXTEEN_BIT), inputs.base.folder, None)
        shapes = {name: tensor.shape for name, tensor in weights.by_name.items()}
        skeleton = Skeleton(weights.plan.config, shapes, "float32", torch_device("cpu"))
        layers, seen = skeleton.layers[1], []

        def filled() -> list[int]:
            return [n for n, layer in enumerate(layers) if not all(p.is_meta for p in layer.parameters())]

        model = LayeredModel(skeleton, weights, token_windows(), activations)
        for number, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: seen.append((number, filled())))  # type: ignore[misc]
        model.run()
        assert filled() == []
        with model.head(5, 15):
            assert model.logits(2).shape == (1, 33, 10)
            assert skeleton.head[1].weight.shape == (10, 64)
        assert skeleton.head[1].weight.is_meta

    assert seen == [(number, [number]) for number in range(3) for _ in token_windows()]


def test_the_embedding_has_only_the_rows_that_occur(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    windows = [torch.tensor([[7, 9, 7, 200]])]
    with Inputs(base, None) as inputs, Activations(10**9) as activations:
        weights = Weights(make_plan(inputs.base, None, SIXTEEN_BIT), inputs.base.folder, None)
        shapes = {name: tensor.shape for name, tensor in weights.by_name.items()}
        skeleton = Skeleton(weights.plan.config, shapes, "float32", torch_device("cpu"))
        LayeredModel(skeleton, weights, windows, activations).run()

        rows = skeleton.embedding[1].weight

    assert torch.equal(rows, whole_model(base).get_input_embeddings().weight[[7, 9, 200]])


# What can't be run so


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("t5", {}, "T5ForConditionalGeneration can't be run a layer at a time: it isn't a decoder alone"),
        ("bert", {}, "BertForMaskedLM can't be run a layer at a time: it isn't a decoder alone that predicts"),
    ],
)
def test_a_model_that_is_no_decoder_is_refused(name: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name, **changes)

    with pytest.raises(Unsupported, match=why):
        layered_logits(base)


@pytest.mark.parametrize("shared", [0, 1])
def test_layers_that_share_keys_and_values_are_refused(shared: int, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 3, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    kinds = ["full_attention"] * 3
    config = transformers.Gemma4TextConfig(**sizes, num_kv_shared_layers=shared, layer_types=kinds)
    model = transformers.Gemma4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")

    if shared:
        with pytest.raises(Unsupported, match="some of its layers take keys and values of others"):
            layered_logits(tmp_path / "base")
    else:
        assert equal(layered_logits(tmp_path / "base"), whole_logits(whole_model(tmp_path / "base")))


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with Inputs(base, None) as inputs, Activations(0) as activations:
        weights = Weights(make_plan(inputs.base, None, SIXTEEN_BIT), inputs.base.folder, None)

        with pytest.raises(BadCheckpoint, match=r"embed_tokens.weight: 256 rows, but the text has a token 256$"):
            LayeredModel.of(weights, [torch.tensor([[1, 256]])], activations)
