"""Outputs of compressed-tensors are like all others: tiles, resuming, batches, verifying, kept layers."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Job, Recipe, Resources, convert, convert_batch, plan_conversion, verify
from converter.errors import BadRecipe, Interrupted, NotFinite
from converter.quantize import formulas
from converter.quantize.schemes import SCHEMES
from tests.compressed import compress, compressed_flow, library_scheme
from tests.folders import contents
from tests.models import load, save_adapter, save_base
from tests.reference import differences, tensors_of

BF16 = torch.bfloat16
NAMES = ["w4a16", "fp8"]
WIDE = {"hidden_size": 256, "intermediate_size": 1024}
"""Large enough for several tiles."""
SMALL_TILES = (1 << 14, 1 << 14)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", sharded=True, **WIDE)
    return base, save_adapter(folder / "adapter", base, "llama", target_modules=["q_proj", "gate_proj", "down_proj"])


@pytest.mark.parametrize("name", [*NAMES, "fp8-block", "nvfp4a16", "mxfp4a16"])
def test_tiles_threads_and_kernels_change_no_byte(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe(quant_type=name)
    expected = contents(convert(*inputs, tmp_path / "out", recipe).out)

    for number, resources in enumerate(
        [
            Resources(threads=1, tile_weights=SMALL_TILES),
            Resources(threads=3, tile_weights=SMALL_TILES),
            Resources(kernels=False, tile_weights=SMALL_TILES),
            Resources(memory=80_000_000),
        ]
    ):
        found = contents(convert(*inputs, tmp_path / str(number), recipe, resources).out)
        different = {file for file in expected if found[file] != expected[file]}
        # The sums behind the figures are taken otherwise without kernels, which may move their last digit.
        assert different <= ({"conversion.json", "SHA256SUMS"} if not resources.kernels else set())


@pytest.mark.parametrize("name", [*NAMES, "nvfp4a16"])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe(quant_type=name, max_shard_size=1_000_000)
    expected = contents(convert(*inputs, tmp_path / "whole", recipe).out)

    tiles = itertools.count()
    with pytest.raises(Interrupted):
        convert(*inputs, tmp_path / "out", recipe, stop=lambda: signal.SIGTERM if next(tiles) == 12 else None)
    seen: list[str] = []
    out = convert(*inputs, tmp_path / "out", recipe, progress=lambda progress: seen.append(progress.stage)).out

    assert contents(out) == expected
    assert "converting" in seen


def test_what_servers_fuse_has_one_global_scale_also_where_it_lies_in_different_shards(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", hidden_size=256, intermediate_size=4096)
    adapter = save_adapter(tmp_path / "adapter", base, "llama", target_modules=["k_proj", "up_proj"])
    out = convert(base, adapter, tmp_path / "out", Recipe(quant_type="nvfp4a16", max_shard_size=1_000_000)).out
    tensors = tensors_of(out)
    shards = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]

    def scales(parent: str, *parts: str) -> list[float]:
        return [float(tensors[f"model.layers.0.{parent}.{part}.weight_global_scale"]) for part in parts]

    gate, up = (f"model.layers.0.mlp.{part}.weight_packed" for part in ("gate_proj", "up_proj"))
    assert shards[gate] != shards[up]
    for fused in (scales("self_attn", "q_proj", "k_proj", "v_proj"), scales("mlp", "gate_proj", "up_proj")):
        assert len(set(fused)) == 1
    assert scales("mlp", "down_proj") != scales("mlp", "up_proj")


@pytest.mark.parametrize("name", [*NAMES, "nvfp4a16"])
def test_a_batch_makes_what_single_conversions_make(name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter changes q alone: k and v, which share its scale in NVFP4, are no longer the same in both outputs."""
    recipe = Recipe(quant_type=name)
    other = save_adapter(tmp_path / "other", inputs[0], "llama", scale=0.1, target_modules=["q_proj"])
    adapters = [inputs[1], other]

    convert_batch([Job(tmp_path / f"batch{n}", adapter, inputs[0], recipe) for n, adapter in enumerate(adapters)])

    for number, adapter in enumerate(adapters):
        alone = convert(inputs[0], adapter, tmp_path / f"alone{number}", recipe).out
        assert differences(tmp_path / f"batch{number}", alone) == []


@pytest.mark.parametrize("name", [*NAMES, "nvfp4a16", "mxfp4a16"])
def test_verify_makes_an_output_again_and_finds_what_was_changed(
    name: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", Recipe(quant_type=name)).out
    assert verify(out).problems == []
    assert verify(out, *inputs).problems == []

    (file,) = out.glob("*.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    changed = f"{module}.weight" if name == "fp8" else f"{module}.weight_packed"
    tensors = load_file(file)
    tensors[changed].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})

    problems = verify(out, *inputs).problems
    assert f"{changed}: differs from what base and adapter give" in problems
    assert any(problem.startswith("model.safetensors: ") for problem in problems)


def test_verify_names_a_part_of_a_weight_that_is_missing_or_has_another_shape(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", Recipe(quant_type="w4a16")).out
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    del tensors[f"{down}.weight_packed"]
    tensors[f"{up}.weight_scale"] = tensors[f"{up}.weight_scale"][:, :1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})

    problems = verify(out).problems

    assert f"{down}.weight: {down}.weight_packed is missing" in problems
    assert f"{up}.weight: {up}.weight_scale is BF16 [1024, 1], expected BF16 [1024, 2]" in problems


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head", "embed_tokens", "up_proj"]},
    ],
    ids=["replaced", "merged"],
)
def test_embeddings_and_heads_stay_in_sixteen_bits_with_what_the_adapter_changes(
    name: str, settings: dict[str, list[str]], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama", **settings)
    scheme = SCHEMES[name] if name == "fp8" else replace(SCHEMES[name], group=64)
    reference = compressed_flow(base, adapter, tmp_path, scheme, BF16)

    out = convert(base, adapter, tmp_path / "out", Recipe(quant_type=name, merge_precision="reference")).out

    assert differences(out, reference) == []
    assert tensors_of(out)["lm_head.weight"].dtype is BF16


@pytest.mark.parametrize("name", [*NAMES, "fp8-block", "nvfp4a16", "mxfp4a16"])
def test_by_default_the_exact_sum_is_quantized_and_the_rest_as_the_library_does_it(
    name: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", Recipe(quant_type=name)).out

    weights, factors, written = tensors_of(inputs[0]), tensors_of(inputs[1]), tensors_of(out)
    scheme, layer = SCHEMES[name], "model.layers.0.mlp"
    a, b = (factors[f"base_model.model.{layer}.gate_proj.lora_{half}.weight"] for half in "AB")
    exact, up = weights[f"{layer}.gate_proj.weight"].float() + (b @ a) * 2.0, weights[f"{layer}.up_proj.weight"]
    largest = max(float(exact.abs().max()), float(up.abs().max()))
    untouched = compress(up, library_scheme(scheme), torch.tensor([largest], dtype=BF16))
    for part, value in untouched.items():
        found = written[f"{layer}.up_proj.{part}"]
        assert torch.equal(value.view(torch.uint8), found.view(torch.uint8))
    shared = formulas.global_scale_of(largest, BF16) if scheme.has_global_scale else None
    expected = formulas.quantize(exact, scheme, BF16, shared)
    codes = written.get(f"{layer}.gate_proj.weight_packed", written.get(f"{layer}.gate_proj.weight"))
    assert codes is not None
    assert torch.equal(codes.view(torch.uint8), expected.packed.view(torch.uint8))


def test_the_group_size_is_the_largest_that_all_weights_allow_and_the_receipt_names_it(tmp_path: Path) -> None:
    for hidden, expected in ((128, 128), (64, 64), (96, 32)):
        base = save_base(tmp_path / f"base{hidden}", "llama", hidden_size=hidden)
        out = convert(base, None, tmp_path / f"out{hidden}", Recipe(quant_type="w4a16")).out
        assert json.loads((out / "conversion.json").read_text())["recipe"]["group_size"] == expected
        assert verify(out, base).problems == []


def test_a_weight_that_no_group_divides_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", intermediate_size=100)

    for name, groups in {"w4a16": "128 or 64 or 32", "fp8-block": "128", "nvfp4a16": "16", "mxfp4a16": "32"}.items():
        with pytest.raises(BadRecipe, match=rf"weight: its \d+ inputs are not divided by groups of {groups} "):
            convert(base, None, tmp_path / "out", Recipe(quant_type=name))
        assert not (tmp_path / "out").exists()

    out = convert(base, None, tmp_path / "out", Recipe(quant_type="w4a16", keep=("down_proj",))).out
    assert verify(out, base).problems == []
    assert load(out) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 48, "quant_type": "w4a16"}, "`group_size` 48: expected one of 32, 64, 128"),
        ({"group_size": 64, "quant_type": "nf4"}, "`group_size` has no meaning with nf4"),
        ({"group_size": 64, "quant_type": "fp8"}, "`group_size` has no meaning with fp8"),
    ],
)
def test_a_group_size_without_meaning_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        Recipe(**settings)  # type: ignore[arg-type]


def test_a_recipe_without_a_group_size_says_nothing_of_it() -> None:
    assert "group_size" not in Recipe().as_json()
    assert Recipe.from_json(Recipe(quant_type="w4a16", group_size=64).as_json()).group_size == 64


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_are_compiled_before_there_are_threads(
    name: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    from converter.quantize import scheme_kernels

    seen: set[int] = set()
    recipe = Recipe(quant_type=name)
    convert(*inputs, tmp_path / "out", recipe, progress=lambda _: seen.add(scheme_kernels.compiled()))

    assert seen == {scheme_kernels.compiled()}


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_estimates_the_time_and_names_what_servers_have_no_kernel_for(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", hidden_size=64)

    dry = plan_conversion(base, None, recipe=Recipe(quant_type=name))

    assert dry.estimate.compute > 0
    assert (
        "experts are quantized one by one, as vLLM serves them; transformers restores them as it loads"
        in dry.plan.notes
    )
    assert any("vLLM has only slower kernels for it" in note for note in dry.plan.notes) == (name == "w4a16")


def test_the_model_card_says_how_to_serve_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    card = (convert(*inputs, tmp_path / "out", Recipe(quant_type="w4a16")).out / "README.md").read_text()

    assert "vllm serve PATH" in card
    assert "- compressed-tensors" in card
    assert "4-bit weights of compressed-tensors (W4A16)" in card
    assert "| group size | 128 |" in card


@pytest.mark.parametrize("name", [*NAMES, "nvfp4a16", "mxfp4a16"])
def test_a_value_too_large_for_the_dtype_is_refused_by_name(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float16)
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(NotFinite, match=r"model.layers.1.mlp.up_proj.weight: holds a NaN or an infinity"):
        convert(base, None, tmp_path / "out", Recipe(quant_type=name))
