"""Many adapters, one pass: each output is what a conversion alone gives, and none depends on another's fate."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter.pipeline
import converter.plan.budget
from converter import BatchOptions, Job, Outcome, Recipe, Resources, convert, convert_batch
from converter.batch.batch import convert_jobs
from converter.batch.disks import Disks
from converter.batch.run import Access
from converter.errors import Interrupted, ReadFailed, WriteFailed
from converter.observer import Progress
from converter.seal.receipt import read_receipt
from converter.verification import verify
from tests.conftest import REPOSITORY
from tests.folders import change_tensor, contents, copy
from tests.models import save_adapter, save_base
from tests.reference import differences

ATTENTION = ["q_proj", "v_proj"]
EVERY_TENSOR_IS_NOTED = BatchOptions(Resources(journal_seconds=0.0))


def adapters(folder: Path, base: Path, name: str = "llama", **settings: Any) -> list[Path]:
    """Three different adapters, two of attention and one of all layers unless `settings` says otherwise."""
    targets: list[dict[str, Any]] = [{"target_modules": ATTENTION}, {"target_modules": ATTENTION}, {}]
    return [
        save_adapter(folder / f"a{number}", base, name, scale=0.03 * (number + 1), **(settings or some))
        for number, some in enumerate(targets)
    ]


def jobs_for(some: list[Path], base: Path, out: Path, recipe: Recipe = Recipe()) -> list[Job]:
    return [Job(out / adapter.name, adapter, base, recipe) for adapter in some]


def interrupt(jobs: list[Job], tiles: int) -> None:
    """Begin a batch, and have a signal end it after so many tiles."""
    count = itertools.count()
    with pytest.raises(Interrupted, match="goes on with it"):
        convert_batch(jobs, EVERY_TENSOR_IS_NOTED, stop=lambda: signal.SIGTERM if next(count) == tiles else None)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def linked(folder: Path) -> list[Path]:
    return [shard for shard in shards(folder) if shard.stat().st_nlink > 1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("batch") / "base", "llama", sharded=True)


@pytest.fixture(scope="module")
def three(base: Path) -> list[Path]:
    return adapters(base.parent, base)


@pytest.fixture(scope="module")
def undisturbed(base: Path, three: list[Path]) -> Path:
    """What a batch of the three leaves that nothing happened to."""
    out = base.parent / "undisturbed"
    convert_batch(jobs_for(three, base, out))
    return out


@pytest.mark.parametrize(
    ("name", "recipe", "dtype"),
    [
        ("llama", Recipe(), torch.bfloat16),
        ("gpt2", Recipe(), torch.bfloat16),
        ("qwen3", Recipe(merge_precision="reference"), torch.float32),
        ("mixtral", Recipe(quant_type="fp4", double_quant=False), torch.float16),
        ("llama", Recipe(quant_type="int8"), torch.bfloat16),
        ("llama", Recipe(quant_type="none"), torch.bfloat16),
    ],
    ids=["nf4", "gpt2", "reference", "fp4", "int8", "none"],
)
def test_each_output_equals_a_conversion_alone_tensor_by_tensor(
    name: str, recipe: Recipe, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, dtype)
    some = adapters(tmp_path, base, name) if name == "llama" else [save_adapter(tmp_path / "a0", base, name)]
    if name != "llama":
        some.append(save_adapter(tmp_path / "a1", base, name, scale=0.2))

    outcomes = convert_batch(jobs_for(some, base, tmp_path / "out", recipe))

    assert statuses(outcomes) == ["made"] * len(some)
    for adapter in some:
        alone = convert(base, adapter, tmp_path / f"alone {adapter.name}", recipe)
        assert differences(tmp_path / "out" / adapter.name, alone.out) == []
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []


def test_an_adapter_that_replaces_or_trains_the_head_has_it_for_itself(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3")  # ties its head
    some = [
        save_adapter(tmp_path / "head", base, "qwen3", target_modules=["q_proj", "lm_head"]),
        save_adapter(tmp_path / "norm", base, "qwen3", target_modules=["q_proj"], modules_to_save=["norm"]),
        save_adapter(tmp_path / "plain", base, "qwen3", target_modules=["q_proj"]),
    ]

    assert statuses(convert_batch(jobs_for(some, base, tmp_path / "out"))) == ["made"] * 3

    for adapter in some:
        alone = convert(base, adapter, tmp_path / f"alone {adapter.name}")
        assert differences(tmp_path / "out" / adapter.name, alone.out) == []


def test_each_tile_of_the_base_is_read_once_for_all(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    read_tile = converter.pipeline.read_tile

    def counted(tensor: Any, folder: Any, start: int, *rest: Any) -> Any:
        read[f"{tensor.name} {start}"] += 1
        return read_tile(tensor, folder, start, *rest)

    monkeypatch.setattr("converter.pipeline.read_tile", counted)
    convert_batch(jobs_for(three, base, tmp_path))

    assert set(read.values()) == {1}


def test_what_no_adapter_touches_is_one_file_in_every_output_and_outlives_any_of_them(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path))

    inodes = [{shard.stat().st_ino for shard in linked(tmp_path / adapter.name)} for adapter in three]
    assert inodes[0] == inodes[1] == inodes[2] != set()
    assert [outcome.link for outcome in outcomes] == ["hard"] * 3
    assert all(0 < outcome.shared_bytes < outcome.output_bytes for outcome in outcomes)
    shutil.rmtree(tmp_path / three[0].name)
    for adapter in three[1:]:
        assert verify(tmp_path / adapter.name, base, adapter).problems == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["a1", "a2"]


def test_copies_are_files_of_their_own(base: Path, three: list[Path], tmp_path: Path) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path), BatchOptions(link="copy"))

    assert [outcome.link for outcome in outcomes] == ["copy"] * 3
    assert [linked(tmp_path / adapter.name) for adapter in three] == [[], [], []]
    assert verify(tmp_path / "a1", base, three[1]).problems == []


@pytest.mark.parametrize("threads", [1, 3])
def test_several_passes_give_the_bytes_of_one(
    threads: int, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_batch(jobs_for(three, base, tmp_path / "one"))
    options = BatchOptions(Resources(threads=threads), outputs_per_pass=1, plans_kept=1)
    outcomes = convert_batch(jobs_for(three, base, tmp_path / "many"), options)

    assert statuses(outcomes) == ["made"] * 3
    for adapter in three:
        assert contents(tmp_path / "many" / adapter.name) == contents(tmp_path / "one" / adapter.name)


def test_a_refused_adapter_does_not_stop_the_others(base: Path, three: list[Path], tmp_path: Path) -> None:
    broken = copy(three[0], tmp_path / "broken")
    change_tensor(next(broken.glob("*.safetensors")), _a_factor(broken), lambda value: value.fill_(float("nan")))
    jobs = jobs_for([*three, broken], base, tmp_path / "out")

    outcomes = convert_batch(jobs)

    assert statuses(outcomes) == ["made", "made", "made", "refused"]
    assert "NaN" in outcomes[-1].message
    assert not jobs[-1].out.exists()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "file/x", "loop", "loop/x", "x" * 300 + "/x"])
def test_an_out_that_can_not_be_does_not_stop_the_others(
    name: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    jobs = [Job(tmp_path / name, three[0], base), *jobs_for(three[1:], base, tmp_path / "out")]

    outcomes = convert_batch(jobs)

    assert statuses(outcomes) == ["refused", "made", "made"]
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" not in path.name) == ["file", "loop", "out"]


@pytest.mark.parametrize("end", ["", ".partial"])
def test_a_link_where_what_is_in_common_is_made_is_not_followed(
    end: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    victim, place = tmp_path / "victim", tmp_path / "out" / f"{_common_place(jobs)}{end}"
    victim.mkdir()
    place.parent.mkdir()
    place.symlink_to(victim)
    before = victim.stat().st_mtime_ns

    outcomes = convert_batch(jobs)

    assert statuses(outcomes) == ["refused"] * 3
    assert victim.stat().st_mtime_ns == before
    assert not (tmp_path / "victim.partial").exists()
    place.unlink()
    assert statuses(convert_batch(jobs)) == ["made"] * 3


def _common_place(jobs: list[Job]) -> str:
    """The name of the folder in which a batch makes what its outputs have in common."""
    names: list[str] = []

    def stop() -> int | None:
        names.extend(path.name for path in jobs[0].out.parent.glob(".shared-*.partial"))
        return signal.SIGTERM if names else None

    with pytest.raises(Interrupted):
        convert_batch(jobs, stop=stop)
    shutil.rmtree(jobs[0].out.parent)
    return names[0].removesuffix(".partial")


def test_a_strict_batch_makes_nothing_if_one_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    jobs = [*jobs_for(three, base, tmp_path / "out"), Job(tmp_path / "out" / "a0", three[1], base)]

    outcomes = convert_batch(jobs, BatchOptions(strict=True))

    assert statuses(outcomes) == ["planned", "planned", "planned", "refused"]
    assert "clashes" in outcomes[-1].message
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_sum_overflows_is_dropped_alone(base: Path, three: list[Path], tmp_path: Path) -> None:
    huge = copy(three[0], tmp_path / "huge")
    for half in ("lora_A", "lora_B"):
        change_tensor(next(huge.glob("*.safetensors")), _a_factor(huge, half), lambda value: value.fill_(3e38))

    outcomes = convert_batch(jobs_for([three[0], huge, three[2]], base, tmp_path / "out"))

    assert statuses(outcomes) == ["made", "failed", "made"]
    assert "q_proj" in outcomes[1].message
    assert verify(tmp_path / "out" / "a2", base, three[2]).problems == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a2"]


def test_an_adapter_whose_own_tensors_can_not_be_read_is_dropped_alone(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = save_adapter(tmp_path / "head", base, "llama", target_modules=ATTENTION, modules_to_save=["lm_head"])
    read_tile = converter.pipeline.read_tile

    def failing(tensor: Any, *rest: Any) -> Any:
        if tensor.origin == "adapter":
            raise ReadFailed("adapter_model.safetensors: Input/output error")
        return read_tile(tensor, *rest)

    jobs = jobs_for([three[0], head, three[2]], base, tmp_path / "out")
    with monkeypatch.context() as broken:
        broken.setattr("converter.pipeline.read_tile", failing)
        assert statuses(convert_batch(jobs)) == ["made", "failed", "made"]

    assert statuses(convert_batch(jobs)) == ["nothing to do", "made", "nothing to do"]
    assert verify(tmp_path / "out" / "head", base, head).problems == []


def test_a_nan_in_what_all_have_in_common_fails_all(three: list[Path], base: Path, tmp_path: Path) -> None:
    bad = copy(base, tmp_path / "base")
    for shard in shards(bad):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})

    outcomes = convert_batch(jobs_for(three, bad, tmp_path / "out"))

    assert statuses(outcomes) == ["failed"] * 3
    assert all("model.norm.weight" in outcome.message for outcome in outcomes)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fails_one_output_fails_no_other(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = converter.write.shard.ShardWriter.write

    def failing(writer: Any, name: str, start: int, raw: bytes) -> int:
        if writer._path.parent.name == "a1.partial":
            raise WriteFailed(f"{writer._path}: No space left on device")
        return write(writer, name, start, raw)

    with monkeypatch.context() as broken:
        broken.setattr("converter.write.shard.ShardWriter.write", failing)
        outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    assert statuses(outcomes) == ["made", "failed", "made"]
    assert statuses(convert_batch(jobs_for(three, base, tmp_path / "out"))) == [
        "nothing to do",
        "made",
        "nothing to do",
    ]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


@pytest.mark.parametrize("tiles", [3, 12, 20])
def test_a_batch_that_was_interrupted_ends_in_the_bytes_of_one_that_was_not(
    tiles: int, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_batch(jobs_for(three, base, tmp_path / "undisturbed"))
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles)
    assert not any(job.out.exists() for job in jobs)
    assert statuses(convert_batch(jobs)) == ["made"] * 3

    for adapter in three:
        assert contents(tmp_path / "out" / adapter.name) == contents(tmp_path / "undisturbed" / adapter.name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("tiles", [12, 20])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)], ids=["one more", "one less"])
def test_what_was_begun_for_another_list_of_adapters_is_begun_anew_by_itself(
    before: int, after: int, tiles: int, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shared depends on the whole list, and with it the layout of each output."""
    interrupt(jobs_for(three[:before], base, tmp_path / "out"), tiles)
    # Of one nothing may be kept yet: its first tensors were under way.
    begun = {name for name in ("a0", "a1") if (tmp_path / "out" / f"{name}.partial").exists()}
    assert begun

    outcomes = convert_batch(jobs_for(three[:after], base, tmp_path / "out"))

    assert [outcome.message for outcome in outcomes if not outcome.is_good] == []
    told = {outcome.job.out.name for outcome in outcomes if any("begun anew" in note for note in outcome.notes)}
    assert told == begun
    for adapter in three[:after]:
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []


def test_what_was_begun_of_an_adapter_that_changed_is_refused_and_the_others_go_on(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [copy(adapter, tmp_path / adapter.name) for adapter in three]
    interrupt(jobs_for(mine[:2], base, tmp_path / "out"), tiles=20)
    change_tensor(next(mine[0].glob("*.safetensors")), _a_factor(mine[0]), lambda value: value.mul_(2))
    before = contents(tmp_path / "out" / "a0.partial")

    outcomes = convert_batch(jobs_for(mine, base, tmp_path / "out"))

    assert statuses(outcomes) == ["refused", "made", "made"]
    assert "another conversion, of which adapter differ" in outcomes[0].message
    assert contents(tmp_path / "out" / "a0.partial") == before


def test_what_another_batch_left_in_common_is_made_anew(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(jobs_for(three[:2], base, tmp_path / "out"), tiles=12)
    for adapter in three[:2]:
        shutil.rmtree(tmp_path / "out" / f"{adapter.name}.partial", ignore_errors=True)  # if it had begun

    assert statuses(convert_batch(jobs_for(three, base, tmp_path / "out"))) == ["made"] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


def test_the_next_night_only_what_is_new_is_made_and_it_links_to_what_is_there(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    convert_batch(jobs_for([three[0], three[2]], base, tmp_path / "out"))
    before = contents(tmp_path / "out" / "a2")

    outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    assert statuses(outcomes) == ["nothing to do", "made", "nothing to do"]
    assert contents(tmp_path / "out" / "a2") == before
    assert {s.stat().st_ino for s in linked(tmp_path / "out" / "a1")} == {
        s.stat().st_ino for s in linked(tmp_path / "out" / "a2")
    }
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


def test_a_later_conversion_links_to_an_earlier_output_instead_of_quantizing_again(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_batch(jobs_for(three[:2], base, tmp_path / "out"))
    read: list[str] = []
    monkeypatch.setattr("converter.pipeline.read_tile", _noting(read, converter.pipeline.read_tile))

    job = Job(tmp_path / "later", three[0], base)
    (outcome,) = convert_batch([job], BatchOptions(against=tmp_path / "out" / "a1"))

    assert (outcome.status, outcome.link) == ("made", "hard")
    assert all("q_proj" in name or "v_proj" in name for name in read)
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


def test_the_receipt_says_what_is_shared_and_how(base: Path, three: list[Path], tmp_path: Path) -> None:
    convert_batch(jobs_for(three, base, tmp_path))

    receipts = [read_receipt(tmp_path / adapter.name) for adapter in three]
    shared = [receipt["of_the_base_alone"] if receipt else {} for receipt in receipts]
    assert {entry["link"] for one in shared for entry in one.values()} == {"hard"}
    assert len({entry["identity"] for one in shared for entry in one.values()}) == len(shared[0])


# What happens while a batch runs


def once(act: Callable[[], object], *, at: int = 1) -> Callable[[Progress], None]:
    """Something that another program does when `at` tensors are converted."""
    count = itertools.count(1)
    return lambda progress: act() if progress.stage == "converting" and next(count) == at else None


@pytest.mark.parametrize("plans", [1, 64], ids=["forgotten", "kept"])
@pytest.mark.parametrize("what", ["touches more", "same names", "gone"])
def test_an_adapter_that_changes_before_its_turn_comes_is_dropped_alone(
    what: str, plans: int, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "last"]


def test_a_base_that_changes_between_passes_gives_no_output_of_two_bases(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_slices_of_one_batch_can_run_at_the_same_time_beside_each_other(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    second: list[Outcome] = []

    first = convert_batch(jobs[:1], progress=once(lambda: second.extend(convert_batch(jobs[1:]))))

    assert statuses([*first, *second]) == ["made"] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]
    assert verify(tmp_path / "out" / "a2", base, three[2]).problems == []


def test_the_same_batch_a_second_time_at_the_same_time_is_refused_and_disturbs_nothing(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    second: list[Outcome] = []

    first = convert_batch(jobs, progress=once(lambda: second.extend(convert_batch(jobs)), at=3))

    assert statuses(second) == ["refused"] * 3
    assert all("another conversion is writing it" in outcome.message for outcome in second)
    assert statuses(first) == ["made"] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


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
    how: str, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_batch(jobs_for([three[2]], base, tmp_path / "out"))
    jobs = jobs_for(three, base, tmp_path / "out")
    init = converter.seal.staging.Staging.__init__

    def going(staging: Any, destination: Any, *rest: Any, **settings: Any) -> None:
        init(staging, destination, *rest, **settings)
        if destination.out.name == "a1":
            shutil.rmtree(tmp_path / "out" / "a2")

    with monkeypatch.context() as patch:
        patch.setattr("converter.seal.staging.Staging.__init__", going)
        outcomes = convert_batch(jobs, BatchOptions(Resources(journal_seconds=0.0), link="hard"))
    assert statuses(outcomes) == ["made", "failed", "nothing to do"]
    assert "gone or changed since it was looked at" in outcomes[1].message

    assert [outcome.message for outcome in convert_batch(jobs) if not outcome.is_good] == []
    for adapter in three:
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []


def test_where_every_output_fails_what_they_have_in_common_is_kept_for_the_next_run(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise WriteFailed("No space left on device")

    jobs = jobs_for(three, base, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("converter.batch.passes.seal", full)
        assert statuses(convert_batch(jobs)) == ["failed"] * 3
    read = rows_read(monkeypatch)

    assert statuses(convert_batch(jobs)) == ["made"] * 3

    assert not read
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


class MadeUpDisks(Disks):
    """Disks by the first part of a path below `place`, and what is free on each."""

    def __init__(self, place: Path, **free: int) -> None:
        self._place, self._free = place, free

    def number_of(self, path: Path) -> int:
        return list(self._free).index(path.relative_to(self._place).parts[0])

    def room(self, folders: Sequence[Path]) -> int:
        return list(self._free.values())[self.number_of(folders[0])]


@pytest.mark.parametrize("full", ["one", "two"])
def test_a_disk_that_is_too_full_refuses_the_outputs_on_it_and_no_other(
    full: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "disks"
    disks = MadeUpDisks(place, **({"one": 10**9, "two": 10**9} | {full: 3_000}))
    jobs = [Job(place / "one" / "a0", three[0], base), *jobs_for(three[1:], base, place / "two")]

    outcomes = convert_jobs(jobs, access=Access(disks=disks))

    assert statuses(outcomes) == (["refused", "made", "made"] if full == "one" else ["made", "refused", "refused"])
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome.status == "refused":
            assert f"{job.out}: " in outcome.message
            assert "bytes are needed" in outcome.message
            assert "3,000 free" in outcome.message
            assert not job.out.exists()
        else:
            assert verify(job.out, base, job.adapter).problems == []
    assert not (place / full).exists()


def test_what_an_interrupted_batch_has_on_a_disk_is_counted_when_it_goes_on(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    planned = convert_batch(jobs, dry_run=True)
    needed = planned[0].shared_bytes + sum(outcome.output_bytes - outcome.shared_bytes for outcome in planned)
    interrupt(jobs, tiles=20)
    held = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - held))

    assert statuses(convert_batch(jobs)) == ["made"] * 3


@pytest.mark.parametrize("where", ["place", "a0", "a1.partial"])
def test_a_shard_in_common_that_was_damaged_while_a_batch_lay_killed_is_made_anew(
    where: str, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    """Killed when the first output had its name and the second had its links: all of them are one file."""
    out = tmp_path / "out"
    options = ["--base", base, *(word for adapter in three for word in ("--adapter", adapter)), "--out", out, "-q"]
    words = [sys.executable, "-c", DRIVER, "accept:2", *map(os.fspath, options)]
    assert subprocess.run(words, cwd=REPOSITORY, check=False).returncode == -signal.SIGKILL
    folder = next(out.glob(".shared-*")) if where == "place" else out / where
    for shard in linked(folder):
        if where == "a1.partial":  # there it may be a file of its own
            shard.write_bytes(shutil.copy(shard, tmp_path / "copy").read_bytes())
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")

    outcomes = convert_batch(jobs_for(three, base, out))

    assert statuses(outcomes) == ["nothing to do", "made", "made"]
    assert all("not linked to" in "".join(outcome.notes) for outcome in outcomes[1:])
    for adapter in three[1:]:
        assert contents(out / adapter.name) == contents(undisturbed / adapter.name)
    assert sorted(path.name for path in out.iterdir()) == ["a0", "a1", "a2"]


def test_an_output_that_fails_in_a_first_pass_leaves_the_common_shards_to_the_second(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = copy(three[0], tmp_path / "huge")
    for half in ("lora_A", "lora_B"):
        change_tensor(next(huge.glob("*.safetensors")), _a_factor(huge, half), lambda value: value.fill_(3e38))

    outcomes = convert_batch(jobs_for([huge, *three[1:]], base, tmp_path / "out"), BatchOptions(outputs_per_pass=1))

    assert statuses(outcomes) == ["failed", "made", "made"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []
    assert (
        {s.stat().st_ino for s in linked(tmp_path / "out" / "a1")}
        == {s.stat().st_ino for s in linked(tmp_path / "out" / "a2")}
        != set()
    )


DRIVER = """
import os, signal, sys
import converter.seal.destination, converter.seal.staging
from converter.cli.main import console

where, count = sys.argv.pop(1).split(":")
owner = {
    "accept": converter.seal.destination.Destination,
    "note": converter.seal.production.Production,
    "spend": converter.seal.staging.Staging,
}
act, left = getattr(owner[where], where), [int(count)]

def dying(self, *arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return act(self, *arguments)

setattr(owner[where], where, dying)
console()
"""
"""The command line, with every tensor noted at once, killed at a call of something."""


@pytest.mark.parametrize("where", ["note:9", "accept:1", "accept:2", "spend:1"])
def test_killed_while_it_makes_seals_or_tidies_it_goes_on_to_the_same_bytes_and_leaves_nothing(
    where: str, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--base", base, *(word for adapter in three for word in ("--adapter", adapter)), "--out", out, "-q"]
    options += ["--journal-seconds", "0"]
    ran = subprocess.run([sys.executable, "-c", DRIVER, where, *map(os.fspath, options)], cwd=REPOSITORY, check=False)
    assert ran.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".shared-") for path in out.iterdir())

    outcomes = convert_batch(jobs_for(three, base, out))
    assert [outcome.message for outcome in outcomes if not outcome.is_good] == []

    assert sorted(path.name for path in out.iterdir()) == ["a0", "a1", "a2"]
    for adapter in three:
        assert contents(out / adapter.name) == contents(undisturbed / adapter.name)


def test_what_a_batch_left_is_taken_away_by_one_that_begins_with_another_job(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(jobs_for(three[1:], base, tmp_path / "out"), tiles=12)

    assert statuses(convert_batch(jobs_for(three, base, tmp_path / "out"))) == ["made"] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


def names_in(folder: Path) -> list[str]:
    """Its files and folders; of a place of what is in common, not which."""
    return sorted(".shared" if path.name.startswith(".shared-") else path.name for path in folder.iterdir())


def test_what_a_batch_left_goes_with_those_of_its_outputs_that_are_made_though_its_first_job_is_gone(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=20)
    assert names_in(tmp_path / "out") == [".shared", "a0.partial", "a1.partial", "a2.partial"]

    assert statuses(convert_batch(jobs[1:])) == ["made"] * 2

    assert names_in(tmp_path / "out") == ["a0.partial", "a1", "a2"]
    assert statuses(convert_batch(jobs)) == ["made", "nothing to do", "nothing to do"]
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]


def test_what_a_batch_left_stays_while_another_of_its_outputs_is_unfinished(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=20)

    assert statuses(convert_batch(jobs[2:])) == ["made"]

    assert names_in(tmp_path / "out") == [".shared", "a0.partial", "a1.partial", "a2"]


def test_what_is_in_common_is_gone_on_with_though_nothing_was_kept_of_the_outputs(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=12)
    journal = next((tmp_path / "out").glob(".shared-*/.journal")).read_text()
    for folder in (tmp_path / "out").glob("a?.partial"):
        shutil.rmtree(folder)

    read = rows_read(monkeypatch)

    assert statuses(convert_batch(jobs)) == ["made"] * 3

    kept = {json.loads(line.partition(" ")[2])["tensor"] for line in journal.splitlines()[1:]}
    assert kept
    assert not kept & read.keys()


@pytest.mark.parametrize("raw", [None, b"{", b'{"outputs": 1}', b'{"outputs": ["a0", "\\u0000"]}'])
def test_of_a_place_that_does_not_say_for_whom_it_was_nothing_is_taken_away(
    raw: bytes | None, base: Path, three: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "out" / ".shared-0123456789ab.partial"
    place.mkdir(parents=True)
    for name in (".lock", ".journal", "model.safetensors.unfinished"):
        (place / name).touch()
    if raw is not None:
        (place / ".outputs").write_bytes(raw)
    before = contents(place)

    assert statuses(convert_batch(jobs_for(three[:1], base, tmp_path / "out"))) == ["made"]

    assert contents(place) == before


# Reading once, in whatever memory


def rows_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows of each tensor are read."""
    read: Counter[str] = Counter()
    read_tile = converter.pipeline.read_tile

    def counted(tensor: Any, folder: Any, start: int, end: int, *rest: Any) -> Any:
        read[tensor.name] += end - start
        return read_tile(tensor, folder, start, end, *rest)

    monkeypatch.setattr("converter.pipeline.read_tile", counted)
    return read


def test_a_kept_tensor_that_one_adapter_changes_and_others_copy_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", "llama", num_hidden_layers=1, vocab_size=9000)
    some = [
        save_adapter(tmp_path / "head", base, "llama", target_modules=["q_proj", "lm_head"]),
        save_adapter(tmp_path / "plain", base, "llama", target_modules=["q_proj"]),
    ]
    file = some[0] / "adapter_model.safetensors"  # PEFT saves the head whole, too
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora_" in name}, file)

    with monkeypatch.context() as patched:
        patched.setattr(converter.plan.budget, "FIXED", 1_000_000)
        patched.setattr(converter.batch.memory, "FIXED", 1_000_000)  # else both would not be made in one pass
        read = rows_read(patched)
        outcomes = convert_batch(
            jobs_for(some, base, tmp_path / "out"), BatchOptions(Resources(memory=20_000_000, threads=1, kernels=False))
        )

    assert statuses(outcomes) == ["made"] * 2
    assert read["lm_head.weight"] == 9000
    for adapter in some:
        assert (
            differences(tmp_path / "out" / adapter.name, convert(base, adapter, tmp_path / f"{adapter.name}1").out)
            == []
        )


def test_several_passes_read_what_is_in_common_once(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    monkeypatch.setattr("converter.pipeline.read_tile", _counting(read, converter.pipeline.read_tile))

    convert_batch(jobs_for(three, base, tmp_path), BatchOptions(outputs_per_pass=1))

    in_common = {name for name in read if "_proj" not in name}
    assert in_common
    assert {read[name] for name in in_common} == {1}
    assert {read[name] for name in read.keys() - in_common} == {3}


@pytest.mark.parametrize("memory", [135_000_000, None], ids=["asked for", "default"])
def test_as_many_are_made_together_as_leave_room_for_a_tensor_that_can_not_be_cut(
    memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conv1D is one tile, which takes more than the quarter of the budget that is left to tiles."""
    base = save_base(tmp_path / "base", "gpt2", n_embd=512, n_layer=1)
    adapter = save_adapter(tmp_path / "a0", base, "gpt2")
    some = [adapter, *(copy(adapter, tmp_path / f"a{number}") for number in range(1, 4))]
    monkeypatch.setattr(converter.batch.memory, "PER_TENSOR", 2_000_000)  # as large models have it
    monkeypatch.setattr(converter.plan.budget, "DEFAULT_MEMORY", 135_000_000)
    monkeypatch.setattr(converter.batch.memory, "DEFAULT_MEMORY", 135_000_000)
    largest: list[int] = []
    init = converter.seal.production.Production.__init__
    monkeypatch.setattr(
        "converter.seal.production.Production.__init__",
        lambda self, plan, *rest: (largest.append(plan.memory), init(self, plan, *rest))[1],
    )

    outcomes = convert_batch(
        jobs_for(some, base, tmp_path / "out"), BatchOptions(Resources(memory=memory, threads=1, kernels=False))
    )

    assert statuses(outcomes) == ["made"] * 4
    assert max(largest[1:]) <= 135_000_000  # the first is that of the shards in common, which is cut later


def test_memory_that_is_just_enough_for_each_alone_is_enough_for_all(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(memory: int) -> bool:
        try:
            for adapter in three:
                with converter.Inputs(base, adapter) as inputs:
                    converter.make_plan(inputs.base, inputs.adapter, Recipe(), Resources(memory=memory, threads=1))
        except converter.errors.BadRecipe:
            return False
        return True

    enough = next(memory for memory in range(64_000_000, 80_000_000, 1000) if alone(memory))
    read = rows_read(monkeypatch)

    outcomes = convert_batch(
        jobs_for(three, base, tmp_path / "out"), BatchOptions(Resources(memory=enough, threads=1), device="cpu")
    )

    assert [outcome.message for outcome in outcomes if not outcome.is_good] == []
    assert read["model.norm.weight"] == 64  # what is in common is made once, whatever the passes
    assert all(outcome.link == "hard" for outcome in outcomes)


def test_a_budget_too_small_for_anything_refuses_each_with_what_is_needed(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path), BatchOptions(Resources(memory=1_000_000)))

    assert statuses(outcomes) == ["refused"] * 3
    assert all("bytes are needed" in outcome.message for outcome in outcomes)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


# Jobs that differ in more than their adapters


def test_without_an_adapter_and_by_another_recipe_in_one_batch(base: Path, three: list[Path], tmp_path: Path) -> None:
    fp4 = Recipe(quant_type="fp4")
    jobs = [
        Job(tmp_path / "plain", None, base),
        *jobs_for(three[:2], base, tmp_path),
        Job(tmp_path / "fp4", three[0], base, fp4),
    ]

    assert statuses(convert_batch(jobs)) == ["made"] * 4

    for job in jobs:
        alone = convert(base, job.adapter, tmp_path / f"alone {job.out.name}", job.recipe)
        assert differences(job.out, alone.out) == []
    assert {s.stat().st_ino for s in linked(tmp_path / "a0")} == {s.stat().st_ino for s in linked(tmp_path / "plain")}
    assert verify(tmp_path / "fp4", base, three[0]).problems == []


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("gpt2", torch.float32, {"target_modules": ["c_attn"]}),
        ("qwen2", torch.float16, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt_neox", torch.bfloat16, {"target_modules": ["dense"]}),
        ("qwen2_moe", torch.bfloat16, {"target_modules": ["v_proj"]}),
    ],
    ids=["gpt2", "qwen2", "gpt_neox", "qwen2_moe"],
)
def test_adapters_of_different_modules_share_what_neither_changes_in_any_architecture(
    name: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, dtype)
    some = [save_adapter(tmp_path / "some", base, name, **settings), save_adapter(tmp_path / "all", base, name)]

    outcomes = convert_batch(jobs_for(some, base, tmp_path / "out"))

    assert statuses(outcomes) == ["made"] * 2
    assert all(outcome.shared_bytes > 0 for outcome in outcomes)
    for adapter in some:
        assert differences(tmp_path / "out" / adapter.name, convert(base, adapter, tmp_path / "1").out) == []
        shutil.rmtree(tmp_path / "1")


# Again, and against


def test_the_same_batch_again_reads_nothing_and_changes_nothing(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert_batch(jobs_for(three, base, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    read = rows_read(monkeypatch)

    again = convert_batch(list(reversed(jobs_for(three, base, tmp_path / "out"))))

    assert statuses(again) == ["nothing to do"] * 3
    assert [outcome.fingerprint for outcome in reversed(again)] == [outcome.fingerprint for outcome in first]
    assert not read
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_conversion_alone_finds_the_output_of_a_batch_already_made_by_its_content_only_in_a_batch(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    """The layout is part of the plan: a conversion alone would lay the same tensors out otherwise."""
    convert_batch(jobs_for(three, base, tmp_path / "out"))
    out = tmp_path / "out" / "a0"

    assert statuses(convert_batch([Job(out, three[0], base)])) == ["nothing to do"]
    with pytest.raises(converter.errors.BadOutput, match="holds another conversion"):
        convert(base, three[0], out)


def test_an_output_that_lost_a_file_is_no_longer_whole_and_is_made_again_if_it_may_be(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    convert_batch(jobs)
    shards(tmp_path / "out" / "a1")[0].unlink()

    assert statuses(convert_batch(jobs)) == ["nothing to do", "refused", "nothing to do"]
    assert statuses(convert_batch(jobs, BatchOptions(overwrite=True))) == ["nothing to do", "made", "nothing to do"]
    assert verify(tmp_path / "out" / "a1", base, three[1]).problems == []


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


def _counting(read: Counter[str], read_tile: Any) -> Any:
    return lambda tensor, *rest: read.update([tensor.name]) or read_tile(tensor, *rest)


def _noting(read: list[str], read_tile: Any) -> Any:
    return lambda tensor, *rest: read.append(tensor.name) or read_tile(tensor, *rest)


def _a_factor(adapter: Path, half: str = "lora_B") -> str:
    names: Iterator[str] = (name for name in load_file(next(adapter.glob("*.safetensors"))) if half in name)
    return next(name for name in names if "q_proj" in name)
