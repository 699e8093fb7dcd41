"""The plan says what will happen, before anything does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import (
    Adapter,
    Checkpoint,
    ConversionRefused,
    Inputs,
    LocalFolder,
    Plan,
    Recipe,
    Resources,
    convert,
    make_plan,
)
from converter.errors import BadCheckpoint, BadRecipe, Unsupported
from converter.plan.layout import Limits
from converter.plan.plan import TensorPlan
from tests.folders import change_json, contents, copy
from tests.models import ARCHITECTURES, save_adapter, save_base
from tests.reference import tensors_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True)
    return base, save_adapter(folder / "adapter", base, "llama")


def plan_of(base: Path, adapter: Path | None, recipe: Recipe = Recipe(), **settings: Any) -> Plan:
    with Checkpoint(LocalFolder(base)) as checkpoint:
        return make_plan(checkpoint, Adapter(LocalFolder(adapter)) if adapter else None, recipe, **settings)


def tensor(plan: Plan, name: str) -> TensorPlan:
    return next(tensor for tensor in plan.tensors() if tensor.name == name)


# It comes true


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(double_quant=False), Recipe("fp4", block_size=4096), Recipe("int8"), Recipe("none")],
    ids=lambda recipe: f"{recipe.quant_type} {recipe.block_size} {recipe.double_quant}",
)
def test_what_is_written_has_the_size_that_was_planned(name: str, recipe: Recipe, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name)
    plan = plan_of(base, None, recipe)

    out = convert(base, None, tmp_path / "out", recipe).out

    states = sum(output.is_state for planned in plan.tensors() for output in planned.outputs)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    # Only the JSON of a quant state has no fixed length: the mean of absmax takes some digits less than the longest.
    assert 0 <= plan.output_bytes - written <= 24 * states
    assert recipe.double_quant or written == plan.output_bytes


SOME = ("llama", "gpt2", "mixtral", "gemma3")
"""A plain model, Conv1D, experts, and a tied head."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_what_is_written_is_what_was_planned(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(tmp_path / "adapter", base, name)
    plan = plan_of(base, adapter)

    out = convert(base, adapter, tmp_path / "out").out

    written = tensors_of(out)
    planned = {output.name: output for tensor in plan.tensors() for output in tensor.outputs}
    assert written.keys() == planned.keys()
    for key, output in planned.items():
        if not output.is_state:
            assert (written[key].nbytes, tuple(written[key].shape)) == (output.nbytes, output.shape), key
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted(shard.file for shard in plan.shards)
    assert json.loads((out / "config.json").read_text()) == plan.config
    assert {side.name for side in plan.side_files} <= contents(out).keys()
    assert plan.base_bytes == sum(value.nbytes for value in tensors_of(base).values())


class Counting(LocalFolder):
    """A folder that counts the bytes that are read of it."""

    read = 0

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.read += len(buffer)
        super().read_into(name, offset, buffer)


def test_making_a_plan_writes_nothing_and_reads_headers_only(base: Path, adapter: Path) -> None:
    before = contents(base), contents(adapter)
    folder = Counting(base)

    with Checkpoint(folder) as checkpoint:
        make_plan(checkpoint, Adapter(LocalFolder(adapter)))

    assert (contents(base), contents(adapter)) == before
    assert 0 < folder.read < 20_000


def test_a_plan_counts_what_happens_to_the_tensors(base: Path, adapter: Path) -> None:
    assert plan_of(base, adapter).counts() == {"quantize": 14, "keep": 7, "merged": 14, "replaced": 0}
    assert plan_of(base, None).counts() == {"quantize": 14, "keep": 7, "merged": 0, "replaced": 0}


def test_tensors_that_the_adapter_brings_count_as_replaced(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, "llama", modules_to_save=["lm_head"])

    plan = plan_of(base, adapter)

    assert plan.counts()["replaced"] == 1
    assert tensor(plan, "lm_head.weight").origin == "adapter"


def test_a_plan_is_json_and_comes_back_the_same(base: Path, adapter: Path) -> None:
    plan = plan_of(base, adapter, Recipe(keep=("o_proj",)))

    told = json.loads(json.dumps(plan.as_json(), allow_nan=False))

    assert told == plan.as_json()
    assert told["output_bytes"] == plan.output_bytes
    assert str(base.parent) not in json.dumps(told)
    entry = next(t for t in told["shards"][0]["tensors"] if t["name"] == "model.layers.1.mlp.down_proj.weight")
    assert entry["lora"] == {"module": "model.layers.1.mlp.down_proj", "rank": 8, "scaling": 2.0}
    assert entry["source"] == {"dtype": "BF16", "shape": [64, 128]}
    assert [output["name"].removeprefix(f"{entry['name']}.") for output in entry["outputs"][1:]] == [
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"),
    ]


def test_tensors_lie_in_shards_one_after_the_other_without_holes(base: Path, adapter: Path) -> None:
    plan = plan_of(base, adapter)

    for shard in plan.shards:
        outputs = {output.name: output for tensor in shard.tensors for output in tensor.outputs}
        end = 8 + shard.layout.header_bytes
        for name, offset in sorted(shard.layout.offsets.items(), key=lambda item: item[1]):
            assert offset == end, name
            end += outputs[name].nbytes
        assert end == shard.layout.states_offset


# Its digest


def test_the_digest_is_the_same_for_any_place_budget_and_number_of_threads(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    plan = plan_of(base, adapter)

    moved = plan_of(copy(base, tmp_path / "other"), copy(adapter, tmp_path / "another"))
    small = plan_of(base, adapter, resources=Resources(memory=66_000_000, threads=1, kernels=False))

    assert plan.digest == moved.digest == small.digest


def test_the_digest_does_not_depend_on_how_tensors_are_cut(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", vocab_size=8192, hidden_size=128, intermediate_size=8192)
    whole = plan_of(base, None)

    cut = plan_of(base, None, resources=Resources(memory=90_000_000, threads=1, kernels=False))

    name = "model.layers.0.mlp.up_proj.weight"
    assert len(tensor(cut, name).tiles) > len(tensor(whole, name).tiles)
    assert cut.memory <= 90_000_000
    assert cut.digest == whole.digest


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("fp4"),
        Recipe("int8"),
        Recipe("none"),
        Recipe(double_quant=False),
        Recipe(block_size=128),
        Recipe(dtype="float16"),
        Recipe(merge_precision="reference"),
        Recipe(keep=("q_proj",)),
        Recipe(max_shard_size=1_000_000),
    ],
    ids=str,
)
def test_the_digest_depends_on_every_choice_of_the_recipe(base: Path, adapter: Path, recipe: Recipe) -> None:
    assert plan_of(base, adapter, recipe).digest != plan_of(base, adapter).digest


def test_the_digest_depends_on_the_adapters_scaling_and_on_what_is_copied(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = copy(inputs[0], tmp_path / "base"), copy(inputs[1], tmp_path / "adapter")
    digest = plan_of(base, adapter).digest

    change_json(adapter / "adapter_config.json", lora_alpha=17)
    assert plan_of(base, adapter).digest != digest

    (base / "LICENSE").write_text("")
    assert plan_of(base, None).digest != plan_of(inputs[0], None).digest


def test_an_automatic_dtype_and_the_one_that_it_becomes_are_the_same_plan(base: Path, adapter: Path) -> None:
    assert plan_of(base, adapter).digest == plan_of(base, adapter, Recipe(dtype="bfloat16")).digest


# dtypes


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "bfloat16")],
    ids=str,
)
@pytest.mark.parametrize("merge_precision", ["float32", "reference"])
def test_the_dtype_is_the_bases_and_bfloat16_for_a_float32_base(
    dtype: torch.dtype, chosen: str, merge_precision: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama", dtype)

    plan = plan_of(base, None, Recipe(merge_precision=merge_precision))

    assert plan.recipe.dtype == chosen
    assert plan.config["dtype"] == plan.config["torch_dtype"] == chosen
    assert plan.config["quantization_config"]["bnb_4bit_compute_dtype"] == chosen
    assert tensor(plan, "model.norm.weight").dtype == {"bfloat16": "BF16", "float16": "F16"}[chosen]


def test_the_dtype_is_that_of_most_of_the_weights_where_they_differ(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((inputs[0] / "config.json").read_bytes())
    tensors = {name: value.half() for name, value in tensors_of(inputs[0]).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, base / "model.safetensors")

    plan = plan_of(base, None)

    assert plan.recipe.dtype == "float16"
    assert tensor(plan, "model.norm.weight").dtype == "F16"


# What is refused


def test_our_own_output_may_be_a_base_and_is_copied(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = convert(inputs[0], None, tmp_path / "out").out

    plan = plan_of(out, None)

    assert {tensor.action for tensor in plan.tensors()} == {"copy", "keep"}
    assert any("the base is quantized (bitsandbytes nf4)" in note for note in plan.notes)


def test_a_base_of_whose_layers_none_would_be_quantized_is_refused(base: Path) -> None:
    with pytest.raises(ConversionRefused, match="would quantize none of its layers; use `quant_type` none"):
        plan_of(base, None, Recipe(keep=("*",)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_a_weight_of_a_dtype_that_is_not_understood_is_refused_by_name(
    inputs: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((inputs[0] / "config.json").read_bytes())
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors = tensors_of(inputs[0])
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, base / "model.safetensors")

    with pytest.raises(ConversionRefused, match=rf"^{name}: dtype "):
        plan_of(base, None)


def with_tensors(base: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A base of other tensors, in one file."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    change_json(folder / "config.json", **config)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_in_the_place_of_a_weight_that_is_kept_are_refused_by_name(
    base: Path, tmp_path: Path, name: str, dtype: torch.dtype, quant_type: Any
) -> None:
    tensors = tensors_of(base)
    changed = with_tensors(base, tmp_path / "base", tensors | {name: tensors[name].to(dtype)})

    with pytest.raises(BadCheckpoint, match=rf"^{name}: dtype \w+, expected F32, F16 or BF16$"):
        plan_of(changed, None, Recipe(quant_type))


@pytest.mark.parametrize(
    ("leaf", "recipe"),
    [
        (".weight.absmax", Recipe()),
        (".weight.quant_map", Recipe("fp4")),
        (".weight.nested_absmax", Recipe(double_quant=False)),  # a loader would take it for a part of the quant state
        (".weight.quant_state.bitsandbytes__fp4", Recipe()),
        (".SCB", Recipe("int8")),
        (".weight_format", Recipe("int8")),
    ],
)
def test_a_tensor_that_is_named_like_a_part_of_a_quantized_weight_is_refused_by_name(
    base: Path, tmp_path: Path, leaf: str, recipe: Recipe
) -> None:
    name = f"model.layers.1.self_attn.v_proj{leaf}"
    changed = with_tensors(base, tmp_path / "base", tensors_of(base) | {name: torch.ones(32, dtype=torch.uint8)})

    with pytest.raises(BadCheckpoint, match=f"^{name}: in the base, but in the output it would be a part of"):
        plan_of(changed, None, recipe)
    assert plan_of(changed, None, Recipe("none")).counts()["keep"] == 22


def test_weights_without_elements_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    cut = {"gate_proj": slice(0), "up_proj": slice(0), "down_proj": (slice(None), slice(0))}
    tensors = {name: value[cut.get(name.split(".")[-2], ...)].contiguous() for name, value in tensors_of(base).items()}
    changed = with_tensors(base, tmp_path / "base", tensors, intermediate_size=0)

    with pytest.raises(BadCheckpoint, match=r"mlp\.\w+\.weight: shape \[\d+, \d+\], a weight without elements$"):
        plan_of(changed, None)


def test_more_tensors_than_a_checkpoint_may_have_are_refused_before_they_are_made(
    base: Path,
) -> None:
    few = Limits(tensors=90)

    with pytest.raises(Unsupported, match=r"^the output would have 91 tensors, expected at most 90, whose names"):
        plan_of(base, None, limits=few)
    assert plan_of(base, None, Recipe("none"), limits=few)


def test_names_that_no_index_can_hold_are_refused_before_anything_is_made(
    base: Path,
) -> None:
    with pytest.raises(Unsupported, match=r"^the output would have 91 tensors, .* take at most 10,000 bytes$"):
        plan_of(base, None, limits=Limits(json_bytes=10_000))


def test_a_header_that_would_be_longer_than_one_may_be_is_divided_among_shards(base: Path, adapter: Path) -> None:
    whole = plan_of(base, adapter)

    divided = plan_of(base, adapter, limits=Limits(header_bytes=5_000))

    assert len(divided.shards) > 2
    assert all(shard.layout.header_bytes <= 5_100 for shard in divided.shards)
    assert list(divided.tensors()) == list(whole.tensors())


def test_a_memory_that_is_too_small_is_refused_with_what_is_needed(base: Path) -> None:
    with pytest.raises(BadRecipe, match=r"`memory` 1,000,000: [\d,]+ bytes are needed, because of .*\.weight"):
        plan_of(base, None, resources=Resources(memory=1_000_000))


# --keep


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("0.mlp.up_proj", {"model.layers.0.mlp.up_proj"}),
        ("model.layers.1.self_attn.*", {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}),
    ],
)
def test_kept_modules_stay_in_sixteen_bits_and_are_named_in_the_config(
    base: Path, adapter: Path, pattern: str, kept: set[str]
) -> None:
    plan = plan_of(base, adapter, Recipe(keep=(pattern,)))

    usual = {t.name for t in plan_of(base, adapter).tensors() if t.action == "keep"}
    assert {t.name for t in plan.tensors() if t.action == "keep"} == usual | {f"{module}.weight" for module in kept}
    assert kept <= set(plan.config["quantization_config"]["llm_int8_skip_modules"])
    for module in kept:
        assert tensor(plan, f"{module}.weight").is_merged  # merged all the same


@pytest.mark.parametrize(("pattern", "parts"), [("k_proj", "q_proj, v_proj"), ("up_proj", "gate_proj")])
def test_keeping_a_part_of_what_a_server_fuses_is_said(base: Path, pattern: str, parts: str) -> None:
    plan = plan_of(base, None, Recipe(keep=(pattern,)))

    assert f"fused with {parts} and taken for 4 bits" in plan.loaders["vLLM"][0]
    assert plan.loaders["transformers 5"] == plan.loaders["transformers 4.57"] == []


@pytest.mark.parametrize("patterns", [(), ("o_proj",), ("q_proj", "k_proj", "v_proj"), ("*.mlp.*",)], ids=str)
def test_keeping_all_or_nothing_of_what_a_server_fuses_needs_no_note(base: Path, patterns: tuple[str, ...]) -> None:
    assert plan_of(base, None, Recipe(keep=patterns)).notes == ()


def test_an_adapter_beside_the_base_is_not_merged_and_noted(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    (base / "adapter_config.json").write_text("{}")

    assert plan_of(base, None).notes == (
        "the base's folder has an adapter (adapter_config.json), which is not merged: give it with `adapter`",
    )


@pytest.mark.parametrize("name", ["spm.model", "source.spm", "sentencepiece.bpe.model", "normalizer.json"])
def test_tokenizer_files_of_less_usual_names_are_copied(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    (base / name).write_bytes(b"{}")

    assert name in {side.name for side in plan_of(base, None).side_files}


def test_a_tensor_that_the_model_does_not_have_is_copied_and_noted(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = copy(inputs[0], tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = base / index["weight_map"]["model.norm.weight"]
    extra = torch.arange(8, dtype=torch.float32) / 0  # nobody computes with it, so nobody minds
    save_file(load_file(shard) | {"model.extra": extra}, shard)
    index["weight_map"]["model.extra"] = shard.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    report = convert(base, None, tmp_path / "out")

    assert report.plan.notes == ("1 tensors of the base are not part of LlamaForCausalLM: they are copied as they are",)
    assert torch.equal(tensors_of(report.out)["model.extra"].view(torch.int32), extra.view(torch.int32))


# What may be used


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bitsandbytes"])
@pytest.mark.parametrize("memory", [None, 100_000_000, 300_000_000])
def test_the_predicted_memory_is_within_the_budget(
    base: Path, adapter: Path, threads: int, kernels: bool, memory: int | None
) -> None:
    plan = plan_of(base, adapter, resources=Resources(memory, threads, kernels))

    assert plan.memory <= (memory or 512_000_000)


def test_a_device_that_is_not_there_is_refused_by_name(base: Path) -> None:
    with pytest.raises(ConversionRefused, match=r"^`device` abacus: "):
        plan_of(base, None, device="abacus")


def test_a_conv1d_is_transposed_to_be_quantized_and_kept_as_it_is_otherwise(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"

    quantized, kept = tensor(plan_of(base, None), name), tensor(plan_of(base, None, Recipe("none")), name)

    assert quantized.source.shape == (64, 256)
    assert quantized.shape == (256, 64)
    assert quantized.whole == "its rows are not together on disk"
    assert kept.is_copy
    assert kept.shape == (64, 256)
    assert not kept.transpose


def test_an_adapter_of_a_base_with_another_name_gets_a_note(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    renamed = base.rename(tmp_path / "another")

    with Inputs(renamed, adapter) as inputs:
        plan = make_plan(inputs.base, inputs.adapter)

    assert any("trained on" in note and "another name" in note for note in plan.notes)
