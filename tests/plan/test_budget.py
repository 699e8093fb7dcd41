from __future__ import annotations

from pathlib import Path

import pytest

from converter import Inputs, Recipe, Resources, convert, make_plan
from converter.errors import BadRecipe
from converter.plan.budget import cut_into_tiles
from converter.resources import DEFAULT_MEMORY
from tests.models import save_adapter, save_base
from tests.reference import differences


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kernels", [True, False])
def test_neither_threads_nor_kernels_change_a_byte_of_the_tensors(threads: int, kernels: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", hidden_size=192, intermediate_size=448)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    usual = convert(base, adapter, tmp_path / "usual", resources=Resources(threads=2)).out

    out = convert(base, adapter, tmp_path / "out", resources=Resources(threads=threads, kernels=kernels)).out

    assert differences(out, usual) == []
    assert (usual / "conversion.json").read_bytes() == (out / "conversion.json").read_bytes()


def test_neither_does_the_size_of_tiles(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", hidden_size=192, intermediate_size=448)
    adapter = save_adapter(tmp_path / "adapter", base, "llama")
    usual = convert(base, adapter, tmp_path / "usual").out

    report = convert(base, adapter, tmp_path / "out", resources=Resources(tile_weights=(1, 3_000)))

    assert max(len(tensor.tiles) for tensor in report.plan.tensors()) > 4
    assert differences(report.out, usual) == []
    assert (usual / "conversion.json").read_bytes() == (report.out / "conversion.json").read_bytes()


def test_the_default_budget_holds_for_large_matrices_that_can_be_cut(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", hidden_size=1024, intermediate_size=4096)

    with Inputs(base, None) as inputs:
        plan = make_plan(inputs.base)

    assert plan.memory <= DEFAULT_MEMORY


def test_a_budget_that_was_asked_for_is_kept_or_refused_with_what_is_needed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", n_embd=512)

    with (
        Inputs(base, None) as inputs,
        pytest.raises(BadRecipe, match=r"`memory` 70,000,000: [\d,]+ bytes are needed, because of "),
    ):
        make_plan(inputs.base, None, Recipe(), Resources(memory=70_000_000))


def test_the_default_gives_way_to_a_tensor_that_can_not_be_cut_and_says_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", n_embd=2048, n_layer=1)

    with Inputs(base, None) as inputs:
        plan = make_plan(inputs.base, resources=Resources(threads=2, kernels=False))

    assert plan.memory > DEFAULT_MEMORY
    assert any("memory: " in note and "is needed whole" in note for note in plan.notes)


def test_the_objects_of_very_many_tensors_are_counted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    with Inputs(base, None) as inputs:
        plan = make_plan(inputs.base)
    few, many = list(plan.tensors()), list(plan.tensors()) * 3_000

    tensors, memory, notes = cut_into_tiles(many, plan.recipe, Resources(threads=2))

    assert memory - cut_into_tiles(few, plan.recipe, Resources(threads=2))[1] > 500_000_000
    assert notes == [f"memory: {memory:,} bytes instead of 512,000,000: the base has 63,000 tensors"]
    assert [tensor.tiles for tensor in tensors] == [tensor.tiles for tensor in few] * 3_000
    with pytest.raises(
        BadRecipe, match=r"because of .* threads, and [\d,]+ for 63,000 tensors; give that much, or fewer `threads`$"
    ):
        cut_into_tiles(many, plan.recipe, Resources(memory=512_000_000, threads=2))
