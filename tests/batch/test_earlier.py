"""Shards of earlier outputs: which can be linked to, and what happens to those outputs meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from converter import BatchOptions, Inputs, Job, Plan, Recipe, convert, convert_batch
from converter.api import verify
from converter.batch.batch import convert_jobs
from converter.batch.earlier import reusable_shards
from converter.batch.run import Access
from converter.batch.sharing import untouched
from converter.errors import BadOutput
from converter.seal.destination import Destination
from converter.seal.link import How
from converter.seal.receipt import read_receipt
from converter.seal.staging import Staging
from tests.batch.scenes import SMALL_SHARDS, Reads, inodes, jobs_for, once, shards, statuses
from tests.folders import change_json, change_tensor, contents, copy
from tests.models import save_adapter, save_base
from tests.reference import differences


def test_the_next_night_only_what_is_new_is_made_and_it_links_to_what_is_there(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for([three[0], three[2]], base, tmp_path / "out"))
    before = contents(tmp_path / "out" / "a2")

    outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    assert statuses(outcomes) == ["nothing to do", "made", "nothing to do"]
    assert contents(tmp_path / "out" / "a2") == before
    assert inodes(tmp_path / "out" / "a1") == inodes(tmp_path / "out" / "a2") != set()
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


def test_a_later_conversion_links_to_an_earlier_output_instead_of_quantizing_again(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for(three[:2], base, tmp_path / "out"))
    reads = Reads()
    job = Job(tmp_path / "later", three[0], base)
    (outcome,) = convert_jobs([job], BatchOptions(against=tmp_path / "out" / "a1"), access=reads.access)

    assert (outcome.status, outcome.link) == ("made", "hard")
    assert reads.rows
    assert all("q_proj" in name or "v_proj" in name for name in reads.rows)
    assert differences(tmp_path / "later", tmp_path / "out" / "a0") == []
    assert verify(tmp_path / "later", base, three[0]).problems == []


def test_against_refuses_what_it_can_not_link_to(base: Path, three: list[Path], tmp_path: Path) -> None:
    convert_batch(jobs_for(three[:2], base, tmp_path / "out"))

    def message(against: Path, recipe: Recipe = Recipe()) -> str:
        (outcome,) = convert_batch([Job(tmp_path / "later", three[0], base, recipe)], BatchOptions(against=against))
        assert outcome.status == "refused"
        assert not (tmp_path / "later").exists()
        return outcome.message

    assert "another base, by another recipe" in message(tmp_path / "out" / "a1", Recipe(quant_type="fp4"))
    assert "no receipt" in message(base)
    changed = copy(tmp_path / "out" / "a1", tmp_path / "changed")
    for shard in shards(changed):
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
    assert "has changed" in message(changed)


def test_against_a_conversion_alone_whose_every_shard_has_something_of_its_adapter_is_refused_saying_so(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert(base, three[0], tmp_path / "alone")

    (outcome,) = convert_batch([Job(tmp_path / "later", three[1], base)], BatchOptions(against=tmp_path / "alone"))

    assert outcome.status == "refused"
    assert "each of its shards has something of its adapter" in outcome.message
    assert not (tmp_path / "later").exists()


def test_against_an_output_of_another_base_of_the_same_shapes_is_refused(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    other = copy(base, tmp_path / "other")
    for shard in shards(other):
        tensors = {name: tensor + 1 for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    convert_batch(jobs_for(three[:1], base, tmp_path / "out"))

    (outcome,) = convert_batch(
        [Job(tmp_path / "later", three[1], other)], BatchOptions(against=tmp_path / "out" / "a0")
    )

    assert outcome.status == "refused"
    assert "another base" in outcome.message


def test_against_an_output_of_a_base_alone_links_to_it(base: Path, three: list[Path], tmp_path: Path) -> None:
    convert(base, None, tmp_path / "plain", Recipe(max_shard_size=1_000_000))

    outcomes = convert_batch(
        [Job(tmp_path / "again", None, base, Recipe(max_shard_size=1_000_000))],
        BatchOptions(against=tmp_path / "plain", link="copy"),
    )

    assert statuses(outcomes) == ["made"]
    assert differences(tmp_path / "again", tmp_path / "plain") == []


def test_a_shard_that_rotted_in_an_earlier_output_is_not_handed_on(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for([three[0], three[2]], base, tmp_path / "out"), BatchOptions(link="copy"))
    for out in ("a0", "a2"):
        for file in read_receipt(tmp_path / "out" / out)["of_the_base_alone"]:  # type: ignore[index]
            with (tmp_path / "out" / out / file).open("r+b") as shard:
                shard.seek(-1, 2)
                shard.write(b"!")

    outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    assert statuses(outcomes) == ["nothing to do", "made", "nothing to do"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


def test_an_output_that_is_being_linked_to_may_be_deleted_meanwhile(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for([three[0]], base, tmp_path / "out"))

    outcomes = convert_batch(
        jobs_for(three[:2], base, tmp_path / "out"), progress=once(lambda: shutil.rmtree(tmp_path / "out" / "a0"))
    )

    assert statuses(outcomes) == ["nothing to do", "made"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


@pytest.mark.parametrize("how", ["deleted", "written to", "replaced"])
def test_an_output_that_would_be_linked_to_may_go_or_change_before_a_later_pass(
    how: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    """Copies, lest one output be the other's file."""
    earlier = tmp_path / "out" / "earlier"
    convert_batch([Job(earlier, three[2], base)], BatchOptions(link="copy"))

    def act() -> None:
        for shard in shards(earlier):
            if how == "written to":
                shard.write_bytes(bytes(shard.stat().st_size))
            else:
                shard.unlink()
            if how == "replaced":
                shard.write_bytes(b"nothing")

    jobs = [Job(earlier, three[2], base), *jobs_for(three, base, tmp_path / "out")]
    outcomes = convert_batch(jobs, BatchOptions(link="copy", outputs_per_pass=1), progress=once(act))

    assert statuses(outcomes) == ["nothing to do", "made", "made", "made"]
    assert [any("made again" in note for note in outcome.notes) for outcome in outcomes[1:]] == [False, True, True]
    for adapter in three:
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []


def test_an_output_that_goes_in_the_very_instant_before_it_is_linked_to_fails_what_wanted_it_until_the_next_run(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for([three[2]], base, tmp_path / "out"))
    jobs = jobs_for(three, base, tmp_path / "out")

    def going(destination: Destination, job: Any, shards: Any, *, resume: bool) -> Staging:
        if destination.out.name == "a1":
            shutil.rmtree(tmp_path / "out" / "a2")
        return Staging(destination, job, shards, resume=resume)

    outcomes = convert_jobs(jobs, BatchOptions(link="hard"), access=Access(staging=going))
    assert statuses(outcomes) == ["made", "failed", "nothing to do"]
    assert "gone or changed since it was looked at" in outcomes[1].message

    assert [outcome.message for outcome in convert_batch(jobs) if not outcome.is_good] == []
    for adapter in three:
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []


def test_an_earlier_output_gives_its_shards_of_the_base_alone_and_no_other(
    large: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(large, large.parent / "q_proj", tmp_path / "out", SMALL_SHARDS).out
    receipt = read_receipt(out)
    assert receipt is not None

    given = reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")

    assert given
    assert {one.shard.path.name for one in given} <= receipt["of_the_base_alone"].keys()
    assert not any("_proj" in name for one in given for name in one.names)


def test_a_receipt_that_makes_no_sense_gives_nothing_and_says_so(
    large: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(large, large.parent / "q_proj", tmp_path / "out", SMALL_SHARDS).out
    for nonsense in (dict.fromkeys((read_receipt(out) or {})["of_the_base_alone"], 4), {}):
        change_json(out / "conversion.json", of_the_base_alone=nonsense)
        if nonsense:
            with pytest.raises(BadOutput, match="can't be understood"):
                reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")
        else:
            assert reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu") == []


@pytest.mark.parametrize("error", ["nan", float("inf"), pytest.param(10**400, id="1e400"), None, "x", [1]])
def test_a_figure_that_no_receipt_could_have_gives_nothing(
    error: object, large: Path, inputs: list[Inputs], plans: list[Plan], tmp_path: Path
) -> None:
    out = convert(large, large.parent / "q_proj", tmp_path / "out", SMALL_SHARDS).out
    tensors = (read_receipt(out) or {})["tensors"]
    change_json(out / "conversion.json", tensors={name: entry | {"error": error} for name, entry in tensors.items()})
    with pytest.raises(BadOutput, match="can't be understood"):
        reusable_shards(out, plans[1], untouched(plans[1]), inputs[1], "cpu")


@pytest.mark.parametrize("how", ["hard", "copy"])
def test_of_an_output_in_the_cache_of_the_hub_the_files_are_linked_to_and_not_its_links(
    how: How, large: Path, tmp_path: Path
) -> None:
    convert_batch([Job(tmp_path / "out", large.parent / "q_proj", large, SMALL_SHARDS)])
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (tmp_path / "out").iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")

    (outcome,) = convert_batch(
        [Job(tmp_path / "later", large.parent / "down_proj", large, SMALL_SHARDS)],
        BatchOptions(against=snapshot, link=how),
    )

    assert (outcome.status, outcome.link, outcome.message) == ("made", how, "")
    assert not any(file.is_symlink() for file in (tmp_path / "later").iterdir())
    assert verify(tmp_path / "later", large, large.parent / "down_proj").problems == []


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
