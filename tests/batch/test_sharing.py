"""What outputs of one base share, and in which shards it lies."""

from __future__ import annotations

from pathlib import Path

from converter import Inputs, Plan, Recipe, make_plan
from converter.batch.sharing import EarlierShard, lay_out, same_in_both, untouched
from converter.quantize.measure import Fidelity
from converter.seal.link import ReusableShard
from converter.seal.production import Made


def names(plan: Plan) -> set[str]:
    return {tensor.name for tensor in plan.tensors()}


def test_shared_is_what_neither_adapter_touches_and_both_make_alike(plans: list[Plan]) -> None:
    touched = {tensor.name for plan in plans for tensor in plan.tensors() if tensor.is_touched}
    assert {name.split(".")[-2] for name in touched} == {"q_proj", "down_proj"}
    assert same_in_both(*map(untouched, plans)).keys() == names(plans[0]) - touched


def test_nothing_is_shared_by_recipes_that_give_other_bytes(large: Path) -> None:
    with Inputs(large, None) as alone:
        one, other = (untouched(make_plan(alone.base, None, Recipe(quant_type=kind))) for kind in ("nf4", "int8"))
    assert not any("q_proj" in name for name in same_in_both(one, other))


def test_every_tensor_is_laid_out_once_and_what_is_shared_comes_first_and_alike(plans: list[Plan]) -> None:
    shared = same_in_both(*map(untouched, plans))
    layouts = [lay_out(plan, [], shared) for plan in plans]

    for layout, before in zip(layouts, plans, strict=True):
        assert layout.reused == {}
        assert layout.shared
        assert sorted(tensor.name for tensor in layout.plan.tensors()) == sorted(names(before))
        assert names(layout.plan_of_shared()) == shared.keys()
        assert {shard.file for shard in layout.plan.shards[: len(layout.shared)]} == layout.shared
        assert layout.plan.content == before.content
        assert layout.plan.digest != before.digest
    one, other = ([shard.layout for shard in layout.shared_shards()] for layout in layouts)
    assert one == other


def test_each_shard_is_reused_shared_or_own(plans: list[Plan]) -> None:
    shared = untouched(plans[0])
    first = list(shared)[:2]
    made = tuple(Made(name, Fidelity(0.0, None), "digest", shared[name].source.nbytes) for name in first)
    earlier = EarlierShard(ReusableShard(Path("model.safetensors"), "sha256", (1, 2, 3)), made)

    layout = lay_out(plans[0], [earlier], shared)

    by_file = {shard.file: {tensor.name for tensor in shard.tensors} for shard in layout.plan.shards}
    own = by_file.keys() - layout.reused.keys() - layout.shared
    assert [(by_file[file], one) for file, one in layout.reused.items()] == [(set(first), earlier)]
    assert set().union(*(by_file[file] for file in layout.shared)) == shared.keys() - set(first)
    assert set().union(*(by_file[file] for file in own)) == names(plans[0]) - shared.keys()
    assert set(layout.not_own) == by_file.keys() - own
    assert names(layout.plan_of_shared()) == shared.keys() - set(first)
