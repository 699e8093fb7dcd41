"""`target`: experts in 16 bits for transformers, or in NF4, each by itself, for vLLM."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file, save_file

from converter import Recipe, convert, convert_batch, plan_conversion, verify
from converter.batch.job_file import read_jobs
from converter.errors import BadRecipe, Unsupported
from tests.architectures import save_tiny
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)
from tests.merge.merges import save_gpt_oss, save_tuned
from tests.merge.test_experts import save_stacked
from tests.merge.test_kinds import EXPERTS, lora
from tests.models import save_base
from tests.reference import tensors_of

VLLM = Recipe(target="vllm")
OF_ONE = ("gate_proj", "up_proj", "down_proj")


def experts_of(base: Path) -> dict[str, torch.Tensor]:
    """The matrices of the experts, by the names that they have one by one."""
    found = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("experts.gate_up_proj"):
            owner = name.removesuffix(".gate_up_proj")
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                found |= {f"{owner}.{expert}.gate_proj.weight": gate, f"{owner}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            owner = name.removesuffix(".down_proj")
            found |= {f"{owner}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        elif ".experts." in name:
            found[name] = tensor
    return found


def packed_by_bitsandbytes(matrix: torch.Tensor, block: int = 64) -> dict[str, torch.Tensor]:
    codes, state = functional.quantize_4bit(
        matrix.contiguous(), blocksize=block, compress_statistics=True, quant_type="nf4"
    )
    return {"": codes, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.fixture(scope="module", params=["one by one", "stacked"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the experts in tensors of their own, or all in one."""
    folder = tmp_path_factory.mktemp("qwen")
    base = save_base(folder / "base", "qwen2_moe")
    return save_stacked(base, folder / "stacked", torch.bfloat16) if request.param == "stacked" else base


def test_each_expert_is_quantized_by_itself_to_the_bytes_of_bitsandbytes(qwen: Path, tmp_path: Path) -> None:
    written = load_file(convert(qwen, None, tmp_path / "out", VLLM).out / "model.safetensors")

    experts = experts_of(qwen)
    assert len(experts) == 2 * 4 * 3
    for name, matrix in experts.items():
        for part, expected in packed_by_bitsandbytes(matrix).items():
            assert torch.equal(written[f"{name}{part}"].cpu(), expected.cpu()), f"{name}{part}"
    assert {name for name in written if name.endswith(("gate_up_proj", "experts.down_proj"))} == set()


def test_what_is_written_restores_to_each_expert_within_the_error_of_nf4(qwen: Path, tmp_path: Path) -> None:
    written = load_file(convert(qwen, None, tmp_path / "out", VLLM).out / "model.safetensors")

    for name, matrix in experts_of(qwen).items():
        parts = {key: value for key, value in written.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        restored = functional.dequantize_4bit(written[name], state).float()
        assert restored.shape == matrix.shape
        assert float((restored - matrix).norm() / matrix.norm()) < 0.11


def test_the_router_and_the_gate_of_shared_experts_stay_in_16_bits(qwen: Path, tmp_path: Path) -> None:
    plan = plan_conversion(qwen, None, recipe=VLLM).plan

    kept = {tensor.name.removeprefix("model.layers.0.") for tensor in plan.tensors() if not tensor.is_quantized}
    assert {"mlp.gate.weight", "mlp.shared_expert_gate.weight"} <= kept
    skip = plan.config["quantization_config"]["llm_int8_skip_modules"]
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"} <= set(skip)
    assert not any("experts" in entry for entry in skip)


def test_the_plan_says_that_vllm_and_version_4_take_it_and_version_5_does_not(qwen: Path) -> None:
    loaders = plan_conversion(qwen, None, recipe=VLLM).plan.loaders

    assert loaders["vLLM"] == loaders["transformers 4.57"] == []
    assert loaders["transformers 5"] != []


def test_an_adapter_gives_the_same_bytes_however_the_base_has_its_experts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe")
    stacked = save_stacked(base, tmp_path / "stacked", torch.bfloat16)
    save_tuned(tmp_path / "adapter", base, lora(target_modules=["q_proj"], target_parameters=EXPERTS))

    one, other = (
        tensors_of(convert(at, tmp_path / "adapter", tmp_path / f"{at.name}-out", VLLM).out) for at in (base, stacked)
    )

    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    bare = tensors_of(convert(base, None, tmp_path / "bare", VLLM).out)
    changed = {name for name in one if name in bare and not torch.equal(one[name], bare[name])}
    assert {name for name in experts_of(base) if name in changed} == set(experts_of(base))


def test_verify_takes_it_and_makes_it_again(qwen: Path, tmp_path: Path) -> None:
    out = convert(qwen, None, tmp_path / "out", VLLM).out

    found = verify(out, qwen)

    assert (found.problems, found.loaders["vLLM"]) == ([], [])
    assert found.recomputed == len(list(plan_conversion(qwen, None, recipe=VLLM).plan.tensors()))


def test_a_lost_expert_is_found_by_the_rules_of_the_loader_that_it_is_for(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe")
    out = convert(base, None, tmp_path / "out", VLLM).out
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (out / "config.json").write_text(json.dumps(config))

    problems = verify(out).problems

    assert any(problem.endswith("it reads experts as NF4, whatever they are in") for problem in problems)


def test_a_second_run_has_nothing_to_do(qwen: Path, tmp_path: Path) -> None:
    first = convert(qwen, None, tmp_path / "out", VLLM)

    assert convert(qwen, None, tmp_path / "out", VLLM).nothing_to_do
    other = convert(qwen, None, tmp_path / "other")
    assert other.fingerprint != first.fingerprint


def test_a_batch_takes_it(tmp_path: Path) -> None:
    base = save_stacked(save_base(tmp_path / "base", "qwen2_moe"), tmp_path / "stacked", torch.bfloat16)
    for number in range(2):
        settings = lora(target_modules=["q_proj"], target_parameters=EXPERTS[: number + 1])
        save_tuned(tmp_path / f"a{number}", base, settings)
    file = tmp_path / "jobs.toml"
    file.write_text(
        'base = "stacked"\nout = "outs"\n[recipe]\ntarget = "vllm"\n'
        '[[jobs]]\nadapter = "./a0"\n[[jobs]]\nadapter = "./a1"\n'
    )

    outcomes = convert_batch(read_jobs(file))

    assert [outcome.status for outcome in outcomes] == ["made", "made"]
    for number in range(2):
        alone = convert(base, tmp_path / f"a{number}", tmp_path / f"alone{number}", VLLM).out
        expected, found = tensors_of(alone), tensors_of(tmp_path / "outs" / f"a{number}")
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


# The default


def test_before_it_starts_the_plan_says_what_stays_unquantized_and_how_large_the_result_is(qwen: Path) -> None:
    usual, other = (plan_conversion(qwen, None, recipe=recipe).plan for recipe in (Recipe(), VLLM))

    plain = sum(math.prod(tensor.shape) for tensor in usual.tensors() if not tensor.is_quantized)
    whole = sum(math.prod(tensor.shape) for tensor in usual.tensors())
    sizes = [sum(tensor.nbytes for tensor in plan.tensors()) / 1e6 for plan in (usual, other)]
    assert usual.beforehand == (
        f"experts stay in 16 bits, since transformers 5 loads no others: {plain / whole:.0%} of the weights are not "
        f"quantized, and the output takes {sizes[0]:.1f} MB; with `target` vllm, {sizes[1]:.1f} MB"
    )
    assert usual.beforehand in usual.notes
    assert other.beforehand == ""


def test_the_command_says_it_before_it_starts(run: Run, qwen: Path, tmp_path: Path) -> None:  # noqa: F811
    ran = run("--base", qwen, "--out", tmp_path / "out")

    assert ran.code == 0
    assert ran.err.startswith("note: experts stay in 16 bits, since transformers 5 loads no others: ")
    assert "with --target vllm, " in ran.err


def test_a_model_without_experts_is_the_same_for_both(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")

    usual, other = (convert(base, None, tmp_path / r.target, r).out for r in (Recipe(), VLLM))

    assert plan_conversion(base, None).plan.beforehand == ""
    assert (usual / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_recipe_without_a_target_is_stated_as_before() -> None:
    assert "target" not in Recipe().as_json()
    assert Recipe.from_json(VLLM.as_json()) == VLLM


# Refusals


@pytest.mark.parametrize("quant_type", ["fp4", "int8", "none", "w4a16"])
def test_a_format_that_does_not_depend_on_the_loader_is_refused(quant_type: Any) -> None:
    with pytest.raises(BadRecipe, match=f"`target` vllm has no meaning with {quant_type}: only nf4 depends on who"):
        Recipe(quant_type, target="vllm")


def test_experts_that_lie_turned_in_one_tensor_are_refused_by_name(tmp_path: Path) -> None:
    base = save_gpt_oss(tmp_path / "base", torch.bfloat16)

    with pytest.raises(
        Unsupported, match=r"would not load in vLLM: .*experts\.gate_up_proj: it takes a tensor for each"
    ):
        plan_conversion(base, None, recipe=VLLM)
    assert "with `target` vllm" not in plan_conversion(base, None).plan.beforehand


def test_experts_that_servers_know_by_no_name_are_refused_by_name(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "granitemoe")

    with pytest.raises(Unsupported, match=r"input_linear\.weight: it takes a tensor for each expert, in NF4"):
        plan_conversion(base, None, recipe=VLLM)


def test_experts_that_are_to_be_kept_are_refused(qwen: Path) -> None:
    with pytest.raises(Unsupported, match=r"would not load in vLLM: .*it (makes 4 bits of all experts|takes a tensor)"):
        plan_conversion(qwen, None, recipe=Recipe(keep=("*experts*",), target="vllm"))


def test_a_class_that_vllm_lacks_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "t5")

    with pytest.raises(Unsupported, match=r"would not load in vLLM: version 0\.32 has no T5ForConditionalGeneration"):
        plan_conversion(base, None, recipe=VLLM)


def test_blocks_that_go_from_one_expert_to_the_next_are_refused(qwen: Path) -> None:
    with pytest.raises(BadRecipe, match="not whole blocks of 4096, and vLLM joins the scales of experts"):
        plan_conversion(save_odd(qwen), None, recipe=Recipe(target="vllm", block_size=4096))


@pytest.mark.parametrize("block", [64, 4096])
def test_verify_finds_such_blocks_in_what_another_tool_made(block: int, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2_moe", moe_intermediate_size=96)
    out = convert(base, None, tmp_path / "out", VLLM).out
    tensors = tensors_of(out)
    for name, matrix in experts_of(base).items():
        tensors |= {f"{name}{part}": tensor for part, tensor in packed_by_bitsandbytes(matrix, block).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("conversion.json", "SHA256SUMS"):
        (out / name).unlink()

    found = verify(out).loaders["vLLM"]

    joins = "its last block is not whole, it joins the scales of experts (24 layers of experts)"
    assert found == ([] if block == 64 else [f"model.layers.0.mlp.experts.0.down_proj: {joins}"])


def save_odd(base: Path) -> Path:
    """A base whose experts have 96 rows."""
    return save_base(base.parent / f"{base.name}-odd", "qwen2_moe", moe_intermediate_size=96)
