"""Passes over the base: what is read, how often, for whom; and what happens to inputs while they run."""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter import BatchOptions, Inputs, Job, Recipe, Resources, convert, convert_batch, make_plan
from converter.api import verify
from converter.batch.batch import convert_jobs
from converter.batch.memory import reserve_of, split_into_passes
from converter.batch.observer import BatchObserver, PassBegun
from converter.errors import BadRecipe
from converter.observer import Progress
from tests.batch.scenes import Reads, inodes, jobs_for, names_in, once, overflowing, shards, statuses
from tests.folders import contents, copy
from tests.models import save_adapter, save_base
from tests.reference import differences


def test_each_tile_of_the_base_is_read_once_for_all(base: Path, three: list[Path], tmp_path: Path) -> None:
    reads = Reads()
    convert_jobs(jobs_for(three, base, tmp_path), access=reads.access)
    with Inputs(base, None) as inputs:
        assert {name for name, _ in reads.tiles} == set(inputs.base.tensors)
    assert set(reads.tiles.values()) == {1}


@pytest.mark.parametrize("threads", [1, 3])
def test_several_passes_give_the_bytes_of_one(
    threads: int, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    passes: list[PassBegun] = []
    options = BatchOptions(Resources(threads=threads), outputs_per_pass=1, plans_kept=1)

    outcomes = convert_jobs(jobs_for(three, base, tmp_path), options, BatchObserver(begun=passes.append))

    assert [one.outputs for one in passes] == [1, 1, 1]
    assert statuses(outcomes) == ["made"] * 3
    for adapter in three:
        assert contents(tmp_path / adapter.name) == contents(undisturbed / adapter.name)


def test_several_passes_read_what_is_shared_once(base: Path, three: list[Path], tmp_path: Path) -> None:
    reads = Reads()

    convert_jobs(jobs_for(three, base, tmp_path), BatchOptions(outputs_per_pass=1), access=reads.access)

    shared = {tile for tile in reads.tiles if "_proj" not in tile[0]}
    assert shared
    assert {reads.tiles[tile] for tile in shared} == {1}
    assert {reads.tiles[tile] for tile in reads.tiles.keys() - shared} == {3}


def test_a_kept_tensor_that_one_adapter_changes_and_others_copy_is_read_once(tmp_path: Path) -> None:
    """Merging takes more memory than copying, and so smaller tiles."""
    base = save_base(tmp_path / "base", "llama", num_hidden_layers=1, vocab_size=9000)
    some = [
        save_adapter(tmp_path / "head", base, "llama", target_modules=["q_proj", "lm_head"]),
        save_adapter(tmp_path / "plain", base, "llama", target_modules=["q_proj"]),
    ]
    file = some[0] / "adapter_model.safetensors"  # PEFT saves the head whole, too
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora_" in name}, file)
    options = BatchOptions(Resources(memory=88_000_000, threads=1, kernels=False))
    reads, passes = Reads(), list[PassBegun]()

    outcomes = convert_jobs(
        jobs_for(some, base, tmp_path / "out"), options, BatchObserver(begun=passes.append), access=reads.access
    )

    assert statuses(outcomes) == ["made"] * 2
    assert [one.outputs for one in passes] == [2]
    assert sum(name == "lm_head.weight" for name, _ in reads.tiles) > 1
    assert reads.rows["lm_head.weight"] == 9000
    for adapter in some:
        alone = convert(base, adapter, tmp_path / f"{adapter.name} alone")
        assert differences(tmp_path / "out" / adapter.name, alone.out) == []


def test_as_many_are_made_together_as_leave_room_for_a_tensor_that_can_not_be_cut(tmp_path: Path) -> None:
    """Conv1D is one tile, which takes more than the quarter of the budget that is left to tiles."""
    base = save_base(tmp_path / "base", "gpt2", n_embd=512, n_layer=1)
    adapter = save_adapter(tmp_path / "a0", base, "gpt2", r=128)
    some = [adapter, *(copy(adapter, tmp_path / f"a{number}") for number in range(1, 4))]
    with Inputs(base, adapter) as inputs:
        plan = make_plan(inputs.base, inputs.adapter, Recipe(), Resources(threads=1, kernels=False))
    memory = plan.memory + reserve_of(plan).nbytes * 3 // 2
    options = BatchOptions(Resources(memory=memory, threads=1, kernels=False))
    assert split_into_passes([reserve_of(plan)] * 4, options.resources, 200) == [[0, 1, 2, 3]]
    passes: list[PassBegun] = []

    outcomes = convert_jobs(jobs_for(some, base, tmp_path / "out"), options, BatchObserver(begun=passes.append))

    assert statuses(outcomes) == ["made"] * 4
    assert [one.outputs for one in passes] == [2, 2]
    assert all(one.memory <= memory for one in passes)


def test_memory_that_is_just_enough_for_each_alone_is_enough_for_all(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    def alone(memory: int) -> bool:
        try:
            for adapter in three:
                with Inputs(base, adapter) as inputs:
                    make_plan(inputs.base, inputs.adapter, Recipe(), Resources(memory=memory, threads=1))
        except BadRecipe:
            return False
        return True

    budgets = range(64_000_000, 80_000_000, 1000)
    enough = budgets[bisect_left(budgets, True, key=alone)]
    assert alone(enough)
    assert not alone(enough - 1000)
    reads = Reads()

    outcomes = convert_jobs(
        jobs_for(three, base, tmp_path / "out"),
        BatchOptions(Resources(memory=enough, threads=1), device="cpu"),
        access=reads.access,
    )

    assert [outcome.message for outcome in outcomes if not outcome.is_good] == []
    assert reads.rows["model.norm.weight"] == 64  # what is shared is made once, whatever the passes
    assert all(outcome.link == "hard" for outcome in outcomes)


# What happens while they run


@pytest.mark.parametrize("plans", [1, 64], ids=["forgotten", "kept"])
@pytest.mark.parametrize("what", ["touches more", "same names", "gone"])
def test_an_adapter_that_changes_before_its_turn_comes_is_dropped_alone(
    what: str, plans: int, base: Path, three: list[Path], tmp_path: Path
) -> None:
    some = [three[0], copy(three[1], tmp_path / "a1"), copy(three[0], tmp_path / "last")]

    def change() -> None:
        shutil.rmtree(some[1])
        if what != "gone":
            copy(three[2] if what == "touches more" else three[0], some[1])

    options = BatchOptions(outputs_per_pass=1, plans_kept=plans)
    outcomes = convert_batch(jobs_for(some, base, tmp_path / "out"), options, progress=once(change))

    assert statuses(outcomes) == ["made", "failed", "made"]
    assert "changed" in outcomes[1].message
    assert names_in(tmp_path / "out") == ["a0", "last"]


def test_a_base_that_changes_between_passes_gives_no_output_of_two_bases(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    mine = copy(base, tmp_path / "base")

    def change(progress: Progress) -> None:
        if progress.stage == "sealing":  # the first pass has read everything
            for shard in shards(mine):
                os.utime(shard, ns=(1, 1))

    options = BatchOptions(outputs_per_pass=1)
    outcomes = convert_batch(jobs_for(three, mine, tmp_path / "out"), options, progress=change)

    assert set(statuses(outcomes)) == {"failed"}
    assert all("changed while it was being read" in outcome.message for outcome in outcomes)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_whose_folder_is_taken_away_fails_alone_and_is_made_by_the_next_run(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")

    outcomes = convert_batch(jobs, progress=once(lambda: shutil.rmtree(tmp_path / "out" / "a1.partial"), at=9))

    assert statuses(outcomes) == ["made", "failed", "made"]
    assert "a1.partial" in outcomes[1].message
    assert statuses(convert_batch(jobs)) == ["nothing to do", "made", "nothing to do"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


def test_an_output_that_fails_in_a_first_pass_leaves_the_shared_shards_to_the_second(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    huge = overflowing(three[0], tmp_path / "huge")

    outcomes = convert_batch(jobs_for([huge, *three[1:]], base, tmp_path / "out"), BatchOptions(outputs_per_pass=1))

    assert statuses(outcomes) == ["failed", "made", "made"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []
    assert inodes(tmp_path / "out" / "a1") == inodes(tmp_path / "out" / "a2") != set()


def test_slices_of_one_batch_can_run_at_the_same_time_next_to_each_other(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    second: list[str] = []

    first = convert_batch(jobs[:1], progress=once(lambda: second.extend(statuses(convert_batch(jobs[1:])))))

    assert [*statuses(first), *second] == ["made"] * 3
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]
    assert verify(tmp_path / "out" / "a2", base, three[2]).problems == []


def test_the_same_batch_a_second_time_at_the_same_time_is_refused_and_disturbs_nothing(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs: list[Job] = jobs_for(three, base, tmp_path / "out")
    second: list[tuple[str, bool]] = []

    def again() -> None:
        second.extend((outcome.message, outcome.is_locked) for outcome in convert_batch(jobs))

    first = convert_batch(jobs, progress=once(again, at=3))

    assert len(second) == 3
    assert all("another conversion is writing it" in message and locked for message, locked in second)
    assert statuses(first) == ["made"] * 3
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]
