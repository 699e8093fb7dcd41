"""What a dry run of a batch foretells is what the batch then takes."""

from __future__ import annotations

from pathlib import Path

import pytest

import converter.batch.forecast
import converter.plan.budget
import converter.plan.estimate
from converter import BatchOptions, Job, convert_batch
from converter.batch.forecast import Forecast
from converter.batch.passes import Pass
from tests.models import save_adapter, save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    base = save_base(folder / "base", "llama")
    for number in range(3):
        save_adapter(folder / f"a{number}", base, "llama", target_modules=["q_proj", "v_proj"])
    return folder


def jobs(folder: Path, out: Path) -> list[Job]:
    return [Job(out / f"a{number}", folder / f"a{number}", folder / "base") for number in range(3)]


def foretold(some: list[Job]) -> list[Forecast]:
    found: list[Forecast] = []
    convert_batch(some, dry_run=True, foretell=found.append)
    return found


def test_passes_memory_and_disk_are_those_of_the_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Pass] = []
    run = Pass.run

    def watched(one: Pass) -> None:
        made.append(one)
        run(one)

    monkeypatch.setattr(Pass, "run", watched)
    some = jobs(folder, tmp_path)

    (found,) = foretold(some)
    assert not made
    convert_batch(some, BatchOptions())

    assert (found.outputs, found.passes) == (3, len(made))
    assert found.memory == max(one.memory for one in made)
    files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*/*.safetensors")}
    assert sum(files.values()) <= found.disk < 1.1 * sum(files.values())


def test_each_pass_reads_the_base_and_what_is_in_common_is_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        converter.batch.forecast, "estimate", lambda *_: converter.plan.estimate.Estimate(2.0, 3.0, 1.0, 5.0)
    )
    (one,) = foretold(jobs(folder, tmp_path)[:1])
    (three,) = foretold(jobs(folder, tmp_path))
    monkeypatch.setattr(converter.plan.budget, "MOST_TOGETHER", 1)
    (apart,) = foretold(jobs(folder, tmp_path))

    assert (one.passes, one.estimate.read, one.estimate.compute) == (1, 2.0, 3.0)
    assert (three.passes, three.estimate.read) == (1, 2.0)
    assert 3.0 < three.estimate.compute < 9.0
    assert (apart.passes, apart.estimate.read, apart.estimate.compute) == (3, 6.0, three.estimate.compute)
    assert [found.estimate.check for found in (one, three, apart)] == [5.0] * 3  # once for the batch


def test_of_what_is_made_already_nothing_is_foretold(folder: Path, tmp_path: Path) -> None:
    some = jobs(folder, tmp_path)
    convert_batch(some[:2])

    (found,) = foretold(some)
    assert found.outputs == 1

    convert_batch(some)
    assert foretold(some) == []
