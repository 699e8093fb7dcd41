"""An accelerator: in which order copies and work are, and that what it makes is checked on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from converter import Recipe, Resources, convert, plan_conversion
from converter.batch.batch import convert_batch
from converter.batch.options import BatchOptions
from converter.errors import DeviceDisagrees
from converter.job import Job, RunOptions
from converter.observer import Observer
from converter.pipeline import Report, convert_job
from converter.recheck import sampled
from tests.devices import LateCopies, opened
from tests.folders import contents
from tests.models import save_adapter, save_base

ON_A_DEVICE = Resources(kernels=False, threads=2)
MADE_AGAIN = "made_again_on_the_cpu"


def on(
    streams: LateCopies, base: Path, adapter: Path | None, out: Path, recipe: Recipe = Recipe(), **how: Any
) -> Report:
    """Convert on a device that computes on the CPU by torch and bitsandbytes, as an accelerator does."""
    options = RunOptions(**{"resources": ON_A_DEVICE, "device": "cpu", "open_device": opened(streams)} | how)
    return convert_job(Job(out, adapter, base, recipe), options)


def receipt(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "conversion.json").read_bytes())
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(quant_type="int8"),
        Recipe(quant_type="none", dtype="bfloat16"),
        Recipe(quant_type="w4a16"),
        Recipe(quant_type="nvfp4a16"),
        Recipe(merge_precision="reference"),
    ],
    ids=lambda recipe: f"{recipe.quant_type} {recipe.merge_precision}",
)
def test_copies_that_come_as_late_as_events_allow_give_the_cpus_bytes(
    base: Path, adapter: Path, tmp_path: Path, recipe: Recipe, threads: int
) -> None:
    resources = replace(ON_A_DEVICE, threads=threads, tile_weights=(1 << 10, 1 << 10))
    out = on(LateCopies(), base, adapter, tmp_path / "out", recipe, resources=resources, check_tiles=1).out
    expected = convert(base, adapter, tmp_path / "expected", recipe, device="cpu").out

    ours, theirs = contents(out), contents(expected)
    found = receipt(out).pop(MADE_AGAIN)
    assert {name: raw for name, raw in ours.items() if name.endswith("safetensors")} == {
        name: raw for name, raw in theirs.items() if name.endswith("safetensors")
    }
    assert found["tiles"] > 10
    assert (found["codes"], found["scales"]) == (0, 0)
    assert MADE_AGAIN not in receipt(expected)


def test_what_sees_a_tensor_before_it_converts_it_is_made_again_as_well(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, "llama", target_modules=["embed_tokens"], use_dora=True)
    out = on(LateCopies(), base, adapter, tmp_path / "out", check_tiles=1).out
    expected = convert(base, adapter, tmp_path / "expected", device="cpu").out

    assert receipt(out)[MADE_AGAIN]["codes"] == 0
    assert contents(out)["model.safetensors"] == contents(expected)["model.safetensors"]


def test_error_feedback_on_a_device_is_made_again_as_well(base: Path, adapter: Path, tmp_path: Path) -> None:
    stored = convert(base, None, tmp_path / "stored", device="cpu").out
    out = on(LateCopies(), stored, adapter, tmp_path / "out", check_tiles=1).out

    found = receipt(out)
    assert found["recipe"]["rounding"] == "adapter"
    assert found[MADE_AGAIN]["tiles"] > 10
    assert found[MADE_AGAIN]["codes"] <= 1e-3


def test_work_waits_for_its_values_the_copy_back_for_the_work_and_the_host_for_the_copy_back(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    streams = LateCopies()
    on(streams, base, adapter, tmp_path / "out")

    came_to_the_device = [
        "in: copy to the device",
        "in: event",
        "computing: waits for in",
        "computing: event",
        "out: waits for computing",
        "out: copy to the host",
        "out: event",
        "host: waits for out",
        "computing: event",
        "host: waits for computing",
    ]
    only_copied = came_to_the_device[-2:]
    for log in streams.logs.values():
        while log:
            tile = came_to_the_device if log[0] == came_to_the_device[0] else only_copied
            assert log[: len(tile)] == tile
            del log[: len(tile)]


def test_a_copy_to_the_device_waits_for_no_work_so_that_it_overlaps_that_of_other_tiles(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    streams = LateCopies()
    on(streams, base, adapter, tmp_path / "out")

    asked = {what for log in streams.logs.values() for what in log}
    assert "in: copy to the device" in asked
    assert not {what for what in asked if what.startswith("in: waits")}
    assert len(streams.logs) == ON_A_DEVICE.threads  # so that one waits while the other works


def test_a_device_that_computes_before_its_values_are_there_ends_the_conversion(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeviceDisagrees, match=r"of the codes differ.*and scales by up to"):
        on(LateCopies(forgets=True), base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def flip(first: int, count: int) -> Any:
    """Flip a bit in each of `count` bytes of the copy with this number."""

    def spoil(number: int, raw: Tensor) -> None:
        if number == first:
            raw[:count] ^= 1

    return spoil


def test_a_tile_with_wrong_codes_ends_the_conversion_and_says_what_was_found(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    spoiled = LateCopies(spoil=flip(0, 40))
    with pytest.raises(DeviceDisagrees) as failure:
        on(spoiled, base, adapter, tmp_path / "out")

    said = str(failure.value)
    assert "rows 0 to" in said
    assert "of the codes differ (at most 0.1% may)" in said
    assert "convert with `device` cpu" in said
    assert list(tmp_path.iterdir()) == []


def test_fewer_codes_than_one_in_a_thousand_may_differ_and_the_receipt_says_so(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = on(LateCopies(spoil=flip(0, 1)), base, adapter, tmp_path / "out")

    found = receipt(report.out)[MADE_AGAIN]
    assert 0 < found["codes"] <= 1e-3
    assert found["scales"] == 0
    assert report.agreement is not None
    assert report.agreement.codes == found["codes"]


def test_without_the_check_wrong_codes_stay_and_the_receipt_says_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = on(LateCopies(spoil=flip(0, 40)), base, adapter, tmp_path / "out", check_tiles=0).out
    expected = convert(base, adapter, tmp_path / "expected", device="cpu").out

    assert MADE_AGAIN not in receipt(out)
    assert contents(out)["model.safetensors"] != contents(expected)["model.safetensors"]


def test_the_first_tile_of_each_kind_of_module_is_checked_and_then_one_in_so_many(base: Path, adapter: Path) -> None:
    small_tiles = Resources(tile_weights=(1 << 10, 1 << 10))
    plan = plan_conversion(base, adapter, recipe=Recipe(), resources=small_tiles, device="cpu").plan
    tiles = [(t.name, number) for t in plan.tensors() if not t.is_copy for number in range(len(t.tiles) - 1)]

    chosen = sampled(plan, 7)

    kinds = groupby(
        sorted(tiles, key=lambda tile: tile[0].replace(".1.", ".0.")), lambda tile: tile[0].replace(".1.", ".0.")
    )
    firsts = {min(members, key=tiles.index) for _, members in kinds}
    assert {(name, number) for name, numbers in chosen.items() for number in numbers} == firsts | set(tiles[::7])
    assert sampled(plan, 0) == {}


def test_a_resumed_run_counts_the_tiles_that_the_earlier_one_compared(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    often = replace(ON_A_DEVICE, journal_seconds=0.0)
    whole = on(LateCopies(), base, adapter, tmp_path / "whole", resources=often).out
    asked = iter(range(1_000_000))

    def stop() -> int | None:
        return 15 if next(asked) > 15 else None

    options = RunOptions(often, "cpu", open_device=opened(LateCopies()))
    job = Job(tmp_path / "out", adapter, base)
    with pytest.raises(Exception, match="SIGTERM"):
        convert_job(job, options, Observer(stop=stop))
    out = convert_job(job, options).out

    assert contents(out) == contents(whole)


def test_each_output_of_a_batch_is_checked_and_only_the_wrong_one_fails(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    jobs = [Job(tmp_path / name, adapter, base) for name in ("one", "two")]
    spoiled = opened(LateCopies(spoil=flip(1, 40)))
    outcomes = convert_batch(jobs, BatchOptions(replace(ON_A_DEVICE, threads=1), "cpu", open_device=spoiled))

    assert sorted(outcome.status for outcome in outcomes) == ["failed", "made"]
    [made] = [outcome for outcome in outcomes if outcome.status == "made"]
    assert receipt(made.job.out)[MADE_AGAIN]["codes"] == 0
