"""What outputs of one base have in common, and in which shards it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import BatchOptions, Inputs, Job, Plan, Recipe, convert, convert_batch, make_plan
from converter.batch.earlier import reusable_shards
from converter.batch.sharing import lay_out, same_in_both, untouched
from converter.errors import BadOutput
from converter.seal.link import How
from converter.seal.receipt import read_receipt
from converter.verification import verify
from tests.folders import change_json, change_tensor, copy
from tests.models import save_adapter, save_base

SMALL = Recipe(max_shard_size=1_000_000)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("sharing") / "base", "llama", num_hidden_layers=1, vocab_size=9000)


@pytest.fixture(scope="module")
def inputs(base: Path) -> Iterator[list[Inputs]]:
    """Of two adapters of different modules."""
    some = [
        Inputs(base, save_adapter(base.parent / name, base, "llama", target_modules=[name]))
        for name in ("q_proj", "down_proj")
    ]
    yield some
    for one in some:
        one.close()


@pytest.fixture(scope="module")
def plans(inputs: list[Inputs]) -> list[Plan]:
    return [make_plan(one.base, one.adapter, SMALL) for one in inputs]


def names(plan: Plan) -> set[str]:
    return {tensor.name for tensor in plan.tensors()}


def test_in_common_is_what_neither_adapter_touches_and_both_make_alike(plans: list[Plan]) -> None:
    touched = {tensor.name for plan in plans for tensor in plan.tensors() if tensor.is_touched}
    assert {name.split(".")[-2] for name in touched} == {"q_proj", "down_proj"}
    assert same_in_both(*map(untouched, plans)).keys() == names(plans[0]) - touched


def test_nothing_is_in_common_by_recipes_that_give_other_bytes(base: Path) -> None:
    with Inputs(base, None) as alone:
        one, other = (untouched(make_plan(alone.base, None, Recipe(quant_type=kind))) for kind in ("nf4", "int8"))
    assert not any("q_proj" in name for name in same_in_both(one, other))


def test_every_tensor_is_laid_out_once_and_what_is_in_common_comes_first_and_alike(plans: list[Plan]) -> None:
    shared = same_in_both(*map(untouched, plans))
    layouts = [lay_out(plan, [], shared) for plan in plans]

    for layout, before in zip(layouts, plans, strict=True):
        assert layout.reused == {}
        assert layout.shared
        assert sorted(tensor.name for tensor in layout.plan.tensors()) == sorted(names(before))
        assert names(layout.plan_of_shared()) == shared.keys()
        assert [shard.file for shard in layout.plan.shards if shard.file in layout.shared] == [
            shard.file for shard in layout.plan.shards[: len(layout.shared)]
        ]
        assert layout.plan.content == before.content
        assert layout.plan.digest != before.digest
    one, other = ([shard.layout for shard in layout.shared_shards()] for layout in layouts)
    assert one == other


def test_an_earlier_output_gives_its_shards_of_the_base_alone_and_no_other(
    base: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(base, base.parent / "q_proj", tmp_path / "out", SMALL).out
    receipt = read_receipt(out)
    assert receipt is not None

    given = reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")

    assert given
    assert {one.shard.path.name for one in given} <= receipt["of_the_base_alone"].keys()
    assert not any("_proj" in name for one in given for name in one.names)


def test_a_receipt_that_makes_no_sense_gives_nothing_and_says_so(
    base: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(base, base.parent / "q_proj", tmp_path / "out", SMALL).out
    for nonsense in (dict.fromkeys((read_receipt(out) or {})["of_the_base_alone"], 4), {}):
        change_json(out / "conversion.json", of_the_base_alone=nonsense)
        if nonsense:
            with pytest.raises(BadOutput, match="can't be understood"):
                reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")
        else:
            assert reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu") == []


@pytest.mark.parametrize("error", ["nan", float("inf"), pytest.param(10**400, id="1e400"), None, "x", [1]])
def test_a_figure_that_no_receipt_could_have_gives_nothing(
    error: object, base: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(base, base.parent / "q_proj", tmp_path / "out", SMALL).out
    tensors = (read_receipt(out) or {})["tensors"]
    change_json(out / "conversion.json", tensors={name: entry | {"error": error} for name, entry in tensors.items()})
    with pytest.raises(BadOutput, match="can't be understood"):
        reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")


@pytest.mark.parametrize("how", ["hard", "copy"])
def test_of_an_output_in_the_cache_of_the_hub_the_files_are_linked_to_and_not_its_links(
    how: How, base: Path, tmp_path: Path
) -> None:
    convert_batch([Job(tmp_path / "out", base.parent / "q_proj", base, SMALL)])
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "out").iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")

    (outcome,) = convert_batch(
        [Job(tmp_path / "later", base.parent / "down_proj", base, SMALL)], BatchOptions(against=snapshot, link=how)
    )

    assert (outcome.status, outcome.link, outcome.message) == ("made", how, "")
    assert not any(file.is_symlink() for file in (tmp_path / "later").iterdir())
    assert verify(tmp_path / "later", base, base.parent / "down_proj").problems == []


def test_a_head_that_was_untied_is_told_from_one_of_another_embedding(tmp_path: Path) -> None:
    """Its values are the embedding's, of which the base has no tensor by its name."""
    base = save_base(tmp_path / "base", "qwen3")  # ties its head
    other = copy(base, tmp_path / "other")
    (shard,) = other.glob("*.safetensors")
    change_tensor(shard, "model.embed_tokens.weight", lambda value: value.mul_(2))
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    one, two = (save_adapter(tmp_path / name, base, "qwen3", **whole) for name in ("one", "two"))
    convert_batch([Job(tmp_path / "out" / "one", one, base)])

    (outcome,) = convert_batch([Job(tmp_path / "later", two, other)], BatchOptions(against=tmp_path / "out" / "one"))

    assert outcome.status == "refused"
    assert "another base" in outcome.message
    (outcome,) = convert_batch([Job(tmp_path / "later", two, base)], BatchOptions(against=tmp_path / "out" / "one"))
    assert (outcome.status, outcome.link) == ("made", "hard")
    assert verify(tmp_path / "later", base, two).problems == []
