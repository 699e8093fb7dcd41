"""A batch takes what its dry run predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import BatchOptions, Job, Recipe, make_plan
from converter.batch.batch import convert_jobs
from converter.batch.forecast import Forecast, costs_of, forecast
from converter.batch.observer import BatchObserver, PassBegun
from converter.batch.sharing import untouched
from converter.plan.estimate import Estimate
from converter.plan.inputs import Inputs
from tests.models import save_adapter, save_base

ALONE = Estimate(read=2.0, compute=3.0, write=1.0, check=5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    base = save_base(folder / "base", "llama")
    for number in range(3):
        save_adapter(folder / f"a{number}", base, "llama", target_modules=["q_proj", "v_proj"])
    return folder


def jobs(folder: Path, out: Path) -> list[Job]:
    return [Job(out / f"a{number}", folder / f"a{number}", folder / "base") for number in range(3)]


def foretold(some: list[Job], options: BatchOptions = BatchOptions()) -> list[Forecast]:
    found: list[Forecast] = []
    convert_jobs(some, options, BatchObserver(foretold=found.append), dry_run=True)
    return found


@pytest.mark.parametrize("most", [200, 2, 1])
def test_passes_memory_and_disk_are_those_of_the_batch(most: int, folder: Path, tmp_path: Path) -> None:
    passes: list[PassBegun] = []
    some, options = jobs(folder, tmp_path), BatchOptions(outputs_per_pass=most)

    (found,) = foretold(some, options)
    assert list(tmp_path.glob("a*")) == []
    convert_jobs(some, options, BatchObserver(begun=passes.append))

    assert (found.outputs, found.passes) == (3, len(passes))
    assert found.memory == max(one.memory for one in passes)
    files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*/*.safetensors")}
    assert sum(files.values()) <= found.disk < 1.1 * sum(files.values())


def test_each_pass_reads_the_base_and_what_is_shared_is_computed_once(folder: Path) -> None:
    with Inputs(folder / "base", folder / "a0") as inputs:
        plan = make_plan(inputs.base, inputs.adapter, Recipe())
        base, shared, costs = inputs.base, list(untouched(plan).values()), costs_of(plan)

        def seconds(outputs: int, most: int = 200) -> Forecast:
            return forecast([costs] * outputs, shared, plan, base, most, sample=lambda *_: ALONE)

        one, three, apart = seconds(1), seconds(3), seconds(3, most=1)

    assert (one.passes, one.estimate.read, one.estimate.compute) == (1, 2.0, 3.0)
    assert (three.passes, three.estimate.read) == (1, 2.0)
    assert 3.0 < three.estimate.compute < 9.0
    assert (apart.passes, apart.estimate.read, apart.estimate.compute) == (3, 6.0, three.estimate.compute)
    assert [found.estimate.check for found in (one, three, apart)] == [5.0] * 3  # once for the batch


def test_of_what_is_made_already_nothing_is_foretold(folder: Path, tmp_path: Path) -> None:
    some = jobs(folder, tmp_path)
    convert_jobs(some[:2])

    (found,) = foretold(some)
    assert found.outputs == 1

    convert_jobs(some)
    assert foretold(some) == []
