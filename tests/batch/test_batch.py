"""Many adapters, one pass: each output is what a conversion alone gives, and none depends on another's fate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import BatchOptions, Job, Outcome, Recipe, Resources, convert, convert_batch
from converter.api import verify
from converter.batch.batch import convert_jobs
from converter.batch.observer import BatchObserver
from converter.errors import BadOutput
from converter.observer import Progress
from tests.batch.scenes import (
    Reads,
    a_factor,
    adapters,
    inodes,
    jobs_for,
    linked,
    names_in,
    overflowing,
    shards,
    statuses,
)
from tests.folders import change_tensor, copy
from tests.models import save_adapter, save_base
from tests.reference import differences


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
    assert inodes(tmp_path / "a0") == inodes(tmp_path / "plain") != set()
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
        alone = convert(base, adapter, tmp_path / f"alone {adapter.name}")
        assert differences(tmp_path / "out" / adapter.name, alone.out) == []


def test_copies_are_files_of_their_own(base: Path, three: list[Path], tmp_path: Path) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path), BatchOptions(link="copy"))

    assert [outcome.link for outcome in outcomes] == ["copy"] * 3
    assert [linked(tmp_path / adapter.name) for adapter in three] == [[], [], []]
    assert verify(tmp_path / "a1", base, three[1]).problems == []


# What fails fails alone


def test_a_refused_adapter_does_not_stop_the_others(base: Path, three: list[Path], tmp_path: Path) -> None:
    broken = copy(three[0], tmp_path / "broken")
    change_tensor(next(broken.glob("*.safetensors")), a_factor(broken), lambda value: value.fill_(float("nan")))
    jobs = jobs_for([*three, broken], base, tmp_path / "out")

    outcomes = convert_batch(jobs)

    assert statuses(outcomes) == ["made", "made", "made", "refused"]
    assert "NaN" in outcomes[-1].message
    assert not jobs[-1].out.exists()


def test_what_is_wrong_is_told_as_soon_as_it_is_known_and_before_anything_is_converted(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    """So that a command can print it above what it shows of the progress."""
    told: list[str] = []

    def progress(item: Progress) -> None:
        told.append(item.stage)

    def ended(outcome: Outcome) -> None:
        told.append(f"{outcome.job.out.name}: {outcome.status}: {outcome.message}")

    def planned(done: int, total: int) -> None:
        told.append(f"planned {done} of {total}")

    jobs = [*jobs_for(three[:1], base, tmp_path / "out"), Job(tmp_path / "out" / "z", tmp_path / "nowhere", base)]
    convert_jobs(jobs, observer=BatchObserver(progress, ended=ended, planned=planned))

    assert told[0] == "planned 1 of 2"
    assert told[1].startswith("z: refused: ")
    assert "no such folder" in told[1]
    assert told[2] == "planned 2 of 2"
    assert told[-1] == "a0: made: "
    assert set(told[3:-1]) == {"converting", "sealing"}


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


def test_a_strict_batch_makes_nothing_if_one_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    jobs = [*jobs_for(three, base, tmp_path / "out"), Job(tmp_path / "out" / "a0", three[1], base)]

    outcomes = convert_batch(jobs, BatchOptions(strict=True))

    assert statuses(outcomes) == ["planned", "planned", "planned", "refused"]
    assert "clashes" in outcomes[-1].message
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_sum_overflows_is_dropped_alone(base: Path, three: list[Path], tmp_path: Path) -> None:
    huge = overflowing(three[0], tmp_path / "huge")

    outcomes = convert_batch(jobs_for([three[0], huge, three[2]], base, tmp_path / "out"))

    assert statuses(outcomes) == ["made", "failed", "made"]
    assert "q_proj" in outcomes[1].message
    assert verify(tmp_path / "out" / "a2", base, three[2]).problems == []
    assert names_in(tmp_path / "out") == ["a0", "a2"]


def test_an_adapter_whose_own_tensors_can_not_be_read_is_dropped_alone(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    head = save_adapter(tmp_path / "head", base, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = head / "adapter_model.safetensors"
    whole = file.read_bytes()
    jobs = jobs_for([three[0], head, three[2]], base, tmp_path / "out")

    def truncate(progress: Progress) -> None:
        if progress.stage == "converting" and progress.done == progress.total:  # what is left is the adapter's head
            file.write_bytes(whole[:1000])

    outcomes = convert_batch(jobs, progress=truncate)
    assert statuses(outcomes) == ["made", "failed", "made"]
    assert "adapter_model.safetensors: ends at byte 1000" in outcomes[1].message

    file.write_bytes(whole)
    assert statuses(convert_batch(jobs)) == ["nothing to do", "made", "nothing to do"]
    assert verify(tmp_path / "out" / "head", base, head).problems == []


def test_a_nan_in_what_all_share_fails_all(three: list[Path], base: Path, tmp_path: Path) -> None:
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


# Again


def test_the_same_batch_again_reads_nothing_and_changes_nothing(base: Path, three: list[Path], tmp_path: Path) -> None:
    first = convert_batch(jobs_for(three, base, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    reads = Reads()

    again = convert_jobs(list(reversed(jobs_for(three, base, tmp_path / "out"))), access=reads.access)

    assert statuses(again) == ["nothing to do"] * 3
    assert [outcome.fingerprint for outcome in reversed(again)] == [outcome.fingerprint for outcome in first]
    assert not reads.tiles
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("link", ["hard", "copy"])
def test_a_rerun_reports_the_sizes_and_figures_of_the_first_run(
    link: Any, base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs, options = jobs_for(three, base, tmp_path / "out"), BatchOptions(link=link)

    def figures(outcomes: list[Outcome]) -> list[dict[str, object]]:
        names = ("fingerprint", "output_bytes", "shared_bytes", "link", "fidelity")
        return [{name: getattr(outcome, name) for name in names} for outcome in outcomes]

    first = convert_batch(jobs, options)

    assert figures(convert_batch(jobs, options)) == figures(first)
    assert figures(convert_batch(jobs, options, dry_run=True)) == figures(first)
    for outcome in first:
        files = shards(outcome.job.out)
        assert outcome.output_bytes == sum(shard.stat().st_size for shard in files)
        assert 0 < outcome.shared_bytes < outcome.output_bytes
        if link == "hard":
            assert outcome.shared_bytes == sum(shard.stat().st_size for shard in linked(outcome.job.out))
        assert len(outcome.fidelity) == (4 if outcome.job.out.name != "a2" else 14)
        assert all(0.0 < (found.survival or 0.0) < 1.5 for found in outcome.fidelity.values())


def test_an_output_that_is_made_stays_made_whatever_somebody_wrote_into_its_figures(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    (made,) = convert_batch(jobs_for(three[:1], base, tmp_path))
    receipt = tmp_path / "a0" / "conversion.json"
    receipt.write_text(receipt.read_text().replace('"link": "hard"', '"link": "magic"'))

    (again,) = convert_batch(jobs_for(three[:1], base, tmp_path))

    assert (again.status, again.fingerprint) == ("nothing to do", made.fingerprint)
    assert (again.output_bytes, again.fidelity) == (0, {})


def test_a_conversion_alone_finds_the_output_of_a_batch_already_made_by_its_content_only_in_a_batch(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    """The layout is part of the plan: a conversion alone would lay the same tensors out otherwise."""
    convert_batch(jobs_for(three, base, tmp_path / "out"))
    out = tmp_path / "out" / "a0"

    assert statuses(convert_batch([Job(out, three[0], base)])) == ["nothing to do"]
    with pytest.raises(BadOutput, match="holds another conversion"):
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


def test_a_budget_too_small_for_anything_refuses_each_with_what_is_needed(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path), BatchOptions(Resources(memory=1_000_000)))

    assert statuses(outcomes) == ["refused"] * 3
    assert all("bytes are needed" in outcome.message for outcome in outcomes)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
