"""Many adapters, one pass: each output is what a conversion alone gives, and none depends on another's fate."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter.batch
import converter.budget
import converter.journal
import converter.pipeline
from converter import Job, Outcome, Recipe, Resources, Terms, convert, convert_batch
from converter.errors import Interrupted, WriteFailed
from converter.verify import verify
from tests.folders import change_tensor, contents, copy
from tests.models import save_adapter, save_base
from tests.reference import differences

ATTENTION = ["q_proj", "v_proj"]


def adapters(folder: Path, base: Path, name: str = "llama", **settings: Any) -> list[Path]:
    """Three different adapters, two of attention and one of all layers unless `settings` says otherwise."""
    targets: list[dict[str, Any]] = [{"target_modules": ATTENTION}, {"target_modules": ATTENTION}, {}]
    return [
        save_adapter(folder / f"a{number}", base, name, scale=0.03 * (number + 1), **(settings or some))
        for number, some in enumerate(targets)
    ]


def jobs_for(some: list[Path], base: Path, out: Path, recipe: Recipe = Recipe()) -> list[Job]:
    return [Job(out / adapter.name, adapter, base, recipe) for adapter in some]


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
    outcomes = convert_batch(jobs_for(three, base, tmp_path), Terms(link="copy"))

    assert [outcome.link for outcome in outcomes] == ["copy"] * 3
    assert [linked(tmp_path / adapter.name) for adapter in three] == [[], [], []]
    assert verify(tmp_path / "a1", base, three[1]).problems == []


@pytest.mark.parametrize("threads", [1, 3])
def test_several_passes_give_the_bytes_of_one(
    threads: int, base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_batch(jobs_for(three, base, tmp_path / "one"))
    monkeypatch.setattr(converter.budget, "MOST_TOGETHER", 1)
    monkeypatch.setattr(converter.batch, "MOST_PLANS", 1)
    outcomes = convert_batch(jobs_for(three, base, tmp_path / "many"), Terms(Resources(threads=threads)))

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


def test_a_strict_batch_makes_nothing_if_one_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    jobs = [*jobs_for(three, base, tmp_path / "out"), Job(tmp_path / "out" / "a0", three[1], base)]

    outcomes = convert_batch(jobs, Terms(strict=True))

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
    write = converter.write.ShardWriter.write

    def failing(writer: Any, name: str, start: int, raw: bytes) -> int:
        if "a1" in str(writer._path):
            raise WriteFailed(f"{writer._path}: No space left on device")
        return write(writer, name, start, raw)

    monkeypatch.setattr("converter.write.ShardWriter.write", failing)
    outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    assert statuses(outcomes) == ["made", "failed", "made"]
    monkeypatch.undo()
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
    monkeypatch.setattr(converter.journal, "SECONDS", 0.0)
    jobs = jobs_for(three, base, tmp_path / "out")
    count = itertools.count()

    with pytest.raises(Interrupted, match="goes on with it"):
        convert_batch(jobs, stop=lambda: signal.SIGTERM if next(count) == tiles else None)
    assert not any(job.out.exists() for job in jobs)
    assert statuses(convert_batch(jobs)) == ["made"] * 3

    for adapter in three:
        assert contents(tmp_path / "out" / adapter.name) == contents(tmp_path / "undisturbed" / adapter.name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a1", "a2"]


def test_what_another_batch_left_in_common_is_made_anew(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter.journal, "SECONDS", 0.0)
    count = itertools.count()
    with pytest.raises(Interrupted):
        convert_batch(
            jobs_for(three[:2], base, tmp_path / "out"), stop=lambda: signal.SIGINT if next(count) == 12 else None
        )
    for adapter in three[:2]:
        shutil.rmtree(tmp_path / "out" / f"{adapter.name}.partial")

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
    (outcome,) = convert_batch([job], Terms(against=tmp_path / "out" / "a1"))

    assert (outcome.status, outcome.link) == ("made", "hard")
    assert all("q_proj" in name or "v_proj" in name for name in read)
    assert differences(tmp_path / "later", tmp_path / "out" / "a0") == []
    assert verify(tmp_path / "later", base, three[0]).problems == []


def test_against_refuses_what_it_can_not_link_to(base: Path, three: list[Path], tmp_path: Path) -> None:
    convert_batch(jobs_for(three[:2], base, tmp_path / "out"))

    def message(against: Path, recipe: Recipe = Recipe()) -> str:
        (outcome,) = convert_batch([Job(tmp_path / "later", three[0], base, recipe)], Terms(against=against))
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
    from converter.receipt import read_receipt

    convert_batch(jobs_for(three, base, tmp_path))

    receipts = [read_receipt(tmp_path / adapter.name) for adapter in three]
    shared = [receipt["of_the_base_alone"] if receipt else {} for receipt in receipts]
    assert {entry["link"] for one in shared for entry in one.values()} == {"hard"}
    assert len({entry["identity"] for one in shared for entry in one.values()}) == len(shared[0])


def _noting(read: list[str], read_tile: Any) -> Any:
    return lambda tensor, *rest: read.append(tensor.name) or read_tile(tensor, *rest)


def _a_factor(adapter: Path, half: str = "lora_B") -> str:
    names: Iterator[str] = (name for name in load_file(next(adapter.glob("*.safetensors"))) if half in name)
    return next(name for name in names if "q_proj" in name)
