"""Experts in compressed-tensors: each linear layer by itself, however the base has them; and what servers take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converter import Recipe, convert, plan_conversion, verify
from converter.errors import Unsupported
from converter.quantize.schemes import SCHEMES
from tests.architectures import save_tiny
from tests.compressed import FUSED, compress, library_scheme
from tests.folders import contents
from tests.merge.merges import save_gpt_oss, save_tuned
from tests.merge.test_experts import save_stacked
from tests.merge.test_kinds import EXPERTS, lora
from tests.models import save_base
from tests.reference import differences, logits, tensors_of
from tests.test_target import experts_of

NAMES = ["w4a16", "w8a16", "fp8", "nvfp4a16", "mxfp4a16"]
MODELS = ["qwen3_moe", "qwen2_moe", "olmoe"]


def save_both(folder: Path, model: str) -> tuple[Path, Path]:
    """A base with a tensor for each linear layer of each expert, and the same with all experts in one."""
    apart = save_base(folder / "apart", model) if model == "qwen2_moe" else save_tiny(folder / "apart", model)
    return apart, save_stacked(apart, folder / "stacked", torch.bfloat16)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_both(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


@pytest.mark.parametrize("name", NAMES)
def test_of_experts_in_one_tensor_each_layer_equals_the_librarys_of_that_matrix(
    name: str, qwen: tuple[Path, Path], tmp_path: Path
) -> None:
    scheme = SCHEMES[name] if SCHEMES[name].kind == "float" else replace(SCHEMES[name], group=32)
    group_size = 32 if scheme.kind == "int" else None

    written = load_file(convert(qwen[1], None, tmp_path / "out", Recipe(name, group_size=group_size)).out / SHARD)  # type: ignore[arg-type]

    experts = experts_of(qwen[1])
    assert len(experts) == 2 * 4 * 3
    for weight, matrix in experts.items():
        module = weight.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        fused = next((parts for parts in FUSED if last in parts), (last,))
        largest = torch.stack([experts[f"{parent}.{part}.weight"].abs().max() for part in fused]).max().reshape(1)
        expected = compress(matrix.contiguous(), library_scheme(scheme), largest)
        found = {
            key.removeprefix(f"{module}."): value for key, value in written.items() if key.startswith(f"{module}.")
        }
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[part], value) for part, value in expected.items()), module
    assert not any(key.endswith(("gate_up_proj", "experts.down_proj")) for key in written)


SHARD = "model.safetensors"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_both_bases_give_the_same_tensors_and_config_and_transformers_the_same_logits(
    model: str, name: str, tmp_path: Path
) -> None:
    apart, stacked = save_both(tmp_path, model)
    save_tuned(tmp_path / "adapter", apart, lora(target_modules=["q_proj"], target_parameters=EXPERTS))
    recipe = Recipe(name)  # type: ignore[arg-type]

    one, other = (convert(at, tmp_path / "adapter", at.with_suffix(".out"), recipe).out for at in (apart, stacked))

    assert differences(one, other) == []
    bare = tensors_of(convert(apart, None, tmp_path / "bare", recipe).out)
    experts = {key for key in bare if ".experts." in key and key.endswith(("weight_packed", "proj.weight"))}
    tuned = tensors_of(one)
    assert len(experts) == 2 * 4 * 3
    assert all(not torch.equal(bare[key], tuned[key]) for key in experts)
    assert torch.equal(logits(one), logits(other))


def test_the_plan_says_that_servers_take_them_and_verify_makes_them_again(
    qwen: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_conversion(qwen[1], None, recipe=Recipe("w4a16")).plan

    assert plan.loaders == {"transformers 5": [], "vLLM": [], "SGLang": []}
    assert "experts are quantized one by one, as vLLM serves them; transformers restores them as it loads" in plan.notes
    assert not any("16 bits" in note for note in plan.notes)
    out = convert(qwen[1], None, tmp_path / "out", Recipe("w4a16")).out
    found = verify(out, qwen[1])
    assert (found.problems, found.recomputed) == ([], len(list(plan.tensors())))
    before = contents(out)
    assert contents(convert(qwen[1], None, out, Recipe("w4a16")).out) == before


def test_experts_that_no_loader_knows_parts_of_stay_in_16_bits_and_the_plan_says_who_takes_them(tmp_path: Path) -> None:
    base = save_gpt_oss(tmp_path / "base", torch.bfloat16)

    plan = plan_conversion(base, None, recipe=Recipe("w4a16")).plan

    assert plan.loaders["transformers 5"] == []
    for server in ("vLLM", "SGLang"):
        assert "gate_up_proj: in 16 bits, it expects experts to be quantized" in plan.loaders[server][0]
    assert plan.beforehand.startswith("experts stay in 16 bits, all of a layer in one tensor: ")
    assert plan.beforehand.endswith("; vLLM and SGLang don't take it")
    assert plan.beforehand in plan.notes


def test_experts_that_are_to_be_kept_are_refused_if_transformers_expects_them_quantized(
    qwen: tuple[Path, Path],
) -> None:
    apart, stacked = qwen
    recipe = Recipe("w4a16", keep=("*experts*",))

    with pytest.raises(Unsupported, match=r"would not load: .*experts.*not quantized here, but by transformers"):
        plan_conversion(apart, None, recipe=recipe)
    plan = plan_conversion(stacked, None, recipe=recipe).plan
    assert plan.loaders["transformers 5"] == []
    assert "expects experts to be quantized" in plan.loaders["vLLM"][0]
    assert plan.beforehand.startswith("experts stay in 16 bits, all of a layer in one tensor: ")
