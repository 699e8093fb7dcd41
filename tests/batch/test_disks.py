"""Room on the disks that the outputs of a batch come to lie on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from converter import BatchOptions, Job, convert_batch
from converter.api import verify
from converter.batch.batch import convert_jobs
from converter.batch.disks import Disks
from converter.batch.run import Access
from tests.batch.scenes import interrupt, jobs_for, statuses


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


@pytest.mark.parametrize("link", ["hard", "copy"])
def test_what_is_shared_is_counted_once_or_as_often_as_it_is_copied(
    link: str, base: Path, three: list[Path], tmp_path: Path
) -> None:
    options = BatchOptions(link=link)  # type: ignore[arg-type]
    jobs = jobs_for(three, base, tmp_path / "disk")
    planned = convert_batch(jobs, options, dry_run=True)
    own = sum(outcome.output_bytes - outcome.shared_bytes for outcome in planned)
    needed = own + planned[0].shared_bytes * (4 if link == "copy" else 1)  # and in the folder where they are made

    def made_with(free: int) -> list[str]:
        disks = MadeUpDisks(tmp_path, disk=free)
        return statuses(convert_jobs(jobs, options, access=Access(disks=disks)))

    assert made_with(needed - 1) == ["refused"] * 3
    assert not (tmp_path / "disk").exists()
    assert made_with(needed) == ["made"] * 3


def test_where_no_disk_has_room_for_the_shared_shards_all_are_refused(
    base: Path, three: list[Path], tmp_path: Path
) -> None:
    """An output that is made already needs no room, but the shared shards would lie next to it."""
    place = tmp_path / "disks"
    jobs = [Job(place / "one" / "a0", three[0], base), Job(place / "two" / "a1", three[2], base)]
    convert_batch(jobs[:1])
    disks = MadeUpDisks(place, one=0, two=0)

    outcomes = convert_jobs(jobs, access=Access(disks=disks))

    assert statuses(outcomes) == ["nothing to do", "refused"]
    assert f"{jobs[1].out}: " in outcomes[1].message
    assert not (place / "two").exists()


def test_what_an_interrupted_batch_has_on_a_disk_is_counted_when_it_goes_on(
    base: Path, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_for(three, base, tmp_path / "out")
    planned = convert_batch(jobs, dry_run=True)
    needed = planned[0].shared_bytes + sum(outcome.output_bytes - outcome.shared_bytes for outcome in planned)
    interrupt(jobs, tiles=20)
    held = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert held > 0
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - held))

    assert statuses(convert_batch(jobs)) == ["made"] * 3
