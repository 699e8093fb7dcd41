"""The shards that outputs share: where they are made, and what becomes of them when a batch is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converter import Job, convert_batch
from converter.api import verify
from converter.batch.batch import convert_jobs
from converter.batch.run import Access
from converter.errors import Interrupted, WriteFailed
from converter.seal.receipt import read_receipt
from converter.seal.staging import Staging
from tests.batch.scenes import Reads, a_factor, inodes, interrupt, jobs_for, linked, names_in, shards, statuses
from tests.conftest import REPOSITORY
from tests.folders import change_tensor, contents, copy


def test_what_no_adapter_touches_is_one_file_in_every_output_and_outlives_any_of_them(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    outcomes = convert_batch(jobs_for(three, base, tmp_path / "out"))

    some = [inodes(tmp_path / "out" / adapter.name) for adapter in three]
    assert some[0] == some[1] == some[2] != set()
    assert [outcome.link for outcome in outcomes] == ["hard"] * 3
    assert all(0 < outcome.shared_bytes < outcome.output_bytes for outcome in outcomes)
    shutil.rmtree(tmp_path / "out" / three[0].name)
    for adapter in three[1:]:
        assert verify(tmp_path / "out" / adapter.name, base, adapter).problems == []
    assert names_in(tmp_path / "out") == ["a1", "a2"]


def test_the_receipt_says_what_is_shared_and_how(undisturbed: Path, three: list[Path]) -> None:
    receipts = [read_receipt(undisturbed / adapter.name) for adapter in three]
    shared = [receipt["of_the_base_alone"] if receipt else {} for receipt in receipts]
    assert {entry["link"] for one in shared for entry in one.values()} == {"hard"}
    assert len({entry["identity"] for one in shared for entry in one.values()}) == len(shared[0])


@pytest.mark.parametrize("end", ["", ".partial"])
def test_a_link_where_shared_shards_are_made_is_not_followed(
    end: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    victim, place = tmp_path / "victim", tmp_path / "out" / f"{_shared_folder(jobs)}{end}"
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


def _shared_folder(jobs: list[Job]) -> str:
    """The name of the folder in which a batch makes what its outputs share, without its end."""
    names: list[str] = []

    def stop() -> int | None:
        names.extend(path.name for path in jobs[0].out.parent.glob(".shared-*.partial"))
        return signal.SIGTERM if names else None

    with pytest.raises(Interrupted):
        convert_batch(jobs, stop=stop)
    shutil.rmtree(jobs[0].out.parent)
    return names[0].removesuffix(".partial")


def noted_of_the_shared(out: Path) -> set[str]:
    """The tensors that the journal of the shared shards has: as many as the disk had time for."""
    lines = next(out.glob(".shared-*/.journal")).read_text().splitlines()[1:]
    return {json.loads(line.partition(" ")[2])["tensor"] for line in lines}


# Interrupted


@pytest.mark.parametrize("tiles", [3, 12, 20])
def test_a_batch_that_was_interrupted_ends_in_the_bytes_of_one_that_was_not(
    tiles: int, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path)
    interrupt(jobs, tiles)
    assert not any(job.out.exists() for job in jobs)

    assert statuses(convert_batch(jobs)) == ["made"] * 3

    for adapter in three:
        assert contents(tmp_path / adapter.name) == contents(undisturbed / adapter.name)
    assert names_in(tmp_path) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("tiles", [12, 20])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)], ids=["one more", "one less"])
def test_what_was_begun_for_another_list_of_adapters_is_begun_anew_by_itself(
    before: int, after: int, tiles: int, base: Path, three: list[Path], tmp_path: Path
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
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    mine = [copy(adapter, tmp_path / adapter.name) for adapter in three]
    interrupt(jobs_for(mine[:2], base, tmp_path / "out"), tiles=20)
    change_tensor(next(mine[0].glob("*.safetensors")), a_factor(mine[0]), lambda value: value.mul_(2))
    before = contents(tmp_path / "out" / "a0.partial")

    outcomes = convert_batch(jobs_for(mine, base, tmp_path / "out"))

    assert statuses(outcomes) == ["refused", "made", "made"]
    assert "another conversion, of which adapter differ" in outcomes[0].message
    assert contents(tmp_path / "out" / "a0.partial") == before


def test_shared_shards_that_another_batch_left_are_made_anew(base: Path, three: list[Path], tmp_path: Path) -> None:
    interrupt(jobs_for(three[:2], base, tmp_path / "out"), tiles=12)
    for adapter in three[:2]:
        shutil.rmtree(tmp_path / "out" / f"{adapter.name}.partial", ignore_errors=True)  # if it had begun

    assert statuses(convert_batch(jobs_for(three, base, tmp_path / "out"))) == ["made"] * 3
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]


def test_shared_shards_are_resumed_though_nothing_was_kept_of_the_outputs(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=12)
    kept = noted_of_the_shared(tmp_path / "out")
    for folder in (tmp_path / "out").glob("a?.partial"):
        shutil.rmtree(folder)
    reads = Reads()

    assert statuses(convert_jobs(jobs, access=reads.access)) == ["made"] * 3

    assert kept
    assert not kept & reads.rows.keys()


def test_where_every_output_fails_the_shared_shards_are_kept_for_the_next_run(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    class Full(Staging):
        """Nothing that stands beside shards can be written."""

        def seal(self, *_: Any) -> None:
            raise WriteFailed("No space left on device")

    jobs = jobs_for(three, base, tmp_path / "out")
    assert statuses(convert_jobs(jobs, access=Access(staging=Full))) == ["failed"] * 3
    reads = Reads()

    assert statuses(convert_jobs(jobs, access=reads.access)) == ["made"] * 3

    assert not reads.tiles
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]


# What is left lying, and who takes it away


def test_what_a_batch_left_is_removed_by_one_that_begins_with_another_job(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    interrupt(jobs_for(three[1:], base, tmp_path / "out"), tiles=12)

    assert statuses(convert_batch(jobs_for(three, base, tmp_path / "out"))) == ["made"] * 3
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]


def test_what_a_batch_left_goes_with_those_of_its_outputs_that_are_made_though_its_first_job_is_gone(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=20)
    assert names_in(tmp_path / "out") == [".shared", "a0.partial", "a1.partial", "a2.partial"]

    assert statuses(convert_batch(jobs[1:])) == ["made"] * 2

    assert names_in(tmp_path / "out") == ["a0.partial", "a1", "a2"]
    assert statuses(convert_batch(jobs)) == ["made", "nothing to do", "nothing to do"]
    assert names_in(tmp_path / "out") == ["a0", "a1", "a2"]


def test_what_a_batch_left_stays_while_another_of_its_outputs_is_unfinished(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    interrupt(jobs, tiles=20)

    assert statuses(convert_batch(jobs[2:])) == ["made"]

    assert names_in(tmp_path / "out") == [".shared", "a0.partial", "a1.partial", "a2"]


@pytest.mark.parametrize("raw", [None, b"{", b'{"outputs": 1}', b'{"outputs": ["a0", "\\u0000"]}'])
def test_a_folder_of_shared_shards_that_does_not_say_for_whom_it_was_stays(
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


# Killed


def kill(where: str, base: Path, three: list[Path], out: Path) -> None:
    """Run a batch in a process of its own, which kills itself at a call of something."""
    program = Path(__file__).with_name("killed_batch.py")
    ran = subprocess.run(
        [sys.executable, program, where, base, out, *three],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".shared-") for path in out.iterdir())


@pytest.mark.parametrize("where", ["note:9", "accept:1", "accept:2", "spend:1"])
def test_killed_while_it_makes_seals_or_tidies_it_goes_on_to_the_same_bytes_and_leaves_nothing(
    where: str, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill(where, base, three, out)
    kept = noted_of_the_shared(out)
    reads = Reads()

    outcomes = convert_jobs(jobs_for(three, base, out), access=reads.access)

    assert [outcome.message for outcome in outcomes if not outcome.is_good] == []
    assert not kept & reads.rows.keys() if where == "note:9" else not reads.rows
    assert names_in(out) == ["a0", "a1", "a2"]
    for adapter in three:
        assert contents(out / adapter.name) == contents(undisturbed / adapter.name)


@pytest.mark.parametrize("where", ["place", "a0", "a1.partial"])
def test_a_shared_shard_that_was_damaged_while_a_batch_lay_killed_is_made_anew(
    where: str, base: Path, three: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    """Killed when the first output had its name and the second had its links: all of them are one file."""
    out = tmp_path / "out"
    kill("accept:2", base, three, out)
    folder = next(out.glob(".shared-*")) if where == "place" else out / where
    assert linked(folder)
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
    assert names_in(out) == ["a0", "a1", "a2"]
    assert all(shards(out / name) for name in ("a0", "a1", "a2"))
