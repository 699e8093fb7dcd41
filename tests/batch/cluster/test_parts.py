"""How a batch is divided among nodes, and what its parts ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter import BatchOptions, Job, Resources, plan_conversion
from converter.batch.batch import convert_jobs
from converter.batch.cluster.parts import IMPORTS, Ask, Node, Prediction, divide, on_gpus, part_sizes, predict
from converter.batch.forecast import Forecast
from converter.batch.observer import BatchObserver, PassBegun
from converter.errors import ConversionRefused
from tests.models import save_adapter, save_base

GB = 1_000_000_000
SMALL = Node(cpus=2, gpus=0, memory=2 * GB)
LARGE = Node(cpus=8, gpus=2, memory=64 * GB)


def prediction(*, alone: int = 200_000_000, further: int = 1_000_000, most: int = 200) -> Prediction:
    return Prediction(GB, alone, further, budget=500_000_000, most=most, read=0.0, own=1.0)


@pytest.mark.parametrize(
    ("count", "slots", "most", "read", "own", "sizes"),
    [
        (8, 4, 200, 1.0, 10.0, [2, 2, 2, 2]),  # all slots are busy
        (7, 2, 200, 1.0, 10.0, [3, 4]),  # evenly
        (3, 8, 200, 1.0, 10.0, [1, 1, 1]),  # no part without jobs
        (10, 2, 3, 1.0, 10.0, [2, 3, 2, 3]),  # no more than one pass takes
        (8, 8, 200, 10.0, 5.0, [4, 4]),  # none shorter than two reads
        (8, 8, 3, 10.0, 5.0, [2, 3, 3]),  # but a pass is a pass
        (4, 4, 200, 10.0, 0.0, [4]),
        (4, 4, 200, 0.0, 0.0, [1, 1, 1, 1]),
    ],
)
def test_parts_keep_all_busy_and_are_neither_too_large_nor_too_short(
    count: int, slots: int, most: int, read: float, own: float, sizes: list[int]
) -> None:
    assert part_sizes(count, slots, most, read, own) == sizes


def test_every_job_of_every_group_is_in_one_part_and_groups_do_not_mix() -> None:
    groups = [((0, 2, 4), prediction()), ((1, 3, 5, 6), prediction())]

    parts = divide(groups, [SMALL, SMALL], threads=1, gpus=0)

    assert sorted(index for part in parts for index in part.indices) == list(range(7))
    assert all(set(part.indices) <= {0, 2, 4} or set(part.indices) <= {1, 3, 5, 6} for part in parts)
    assert len(parts) == 4  # as many as run at a time


def test_a_part_asks_for_no_more_cpus_than_the_largest_node_has() -> None:
    (part,) = divide([((0,), prediction())], [SMALL, SMALL], threads=64, gpus=0)
    assert part.ask.cpus == 2


def test_a_part_asks_for_the_memory_of_its_outputs_and_of_the_imports() -> None:
    (one,) = divide([((0,), prediction())], [LARGE], threads=8, gpus=0)
    (ten,) = divide([(range(10), prediction())], [LARGE], threads=8, gpus=0)

    assert one.ask.memory > IMPORTS + 200_000_000
    assert ten.ask.memory == one.ask.memory + 9 * 1_000_000


def test_many_outputs_of_one_pass_keep_to_the_budget() -> None:
    assert prediction().memory(10_000) == IMPORTS + 500_000_000
    assert prediction(alone=700_000_000).memory(10_000) == IMPORTS + 700_000_000


def test_parts_are_no_larger_than_the_memory_of_a_node_allows() -> None:
    found = prediction(further=60_000_000)

    parts = divide([(range(8), found)], [Node(cpus=1, gpus=0, memory=found.memory(2))], threads=1, gpus=0)

    assert [len(part.indices) for part in parts] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("node", "gpus", "lacking"),
    [
        (Node(cpus=4, gpus=0, memory=100_000_000), 0, "4 CPUs and 602,000,000 bytes of memory"),
        (Node(cpus=0, gpus=0, memory=GB), 0, "a CPU and 602,000,000 bytes of memory"),
        (Node(cpus=4, gpus=0, memory=GB), 1, "4 CPUs, a GPU and 602,000,000 bytes of memory"),
    ],
    ids=["memory", "cpus", "gpus"],
)
def test_where_no_node_has_what_one_job_takes_it_is_refused(node: Node, gpus: int, lacking: str) -> None:
    with pytest.raises(ConversionRefused, match=f"no node has {lacking}"):
        divide([((0,), prediction())], [node], threads=4, gpus=gpus)


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ConversionRefused, match="no node has"):
        divide([((0,), prediction())], [], threads=4, gpus=0)


@pytest.mark.parametrize(
    ("device", "nodes", "on"),
    [
        ("auto", [SMALL, LARGE], True),
        ("auto", [SMALL], False),
        ("cpu", [LARGE], False),
        ("cuda", [SMALL], True),
        ("cuda:1", [LARGE], True),
    ],
)
def test_gpus_are_used_where_they_are_asked_for_or_there_are_any(device: str, nodes: list[Node], on: bool) -> None:
    assert on_gpus(device, nodes) is on


def test_on_gpus_a_node_takes_as_many_parts_as_it_has_gpus() -> None:
    assert Ask(cpus=1, gpus=1, memory=GB).fits(LARGE) == 2
    assert Ask(cpus=1, gpus=0, memory=GB).fits(LARGE) == 8
    parts = divide([(range(8), prediction())], [LARGE, SMALL], threads=1, gpus=1)
    assert [len(part.indices) for part in parts] == [4, 4]
    assert {part.ask.gpus for part in parts} == {1}


@pytest.mark.parametrize("memory", [None, 120_000_000])
def test_a_pass_takes_no_more_memory_than_was_predicted(memory: int | None, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    some = [save_adapter(tmp_path / f"a{number}", base, "llama", target_modules=["q_proj"]) for number in range(3)]
    jobs = [Job(tmp_path / "out" / adapter.name, adapter, base) for adapter in some]
    options = BatchOptions(Resources(memory=memory, threads=2))
    passes: list[PassBegun] = []

    convert_jobs(jobs, options, BatchObserver(begun=passes.append))

    found = predict(jobs[0], options)
    assert [one.outputs for one in passes] == [3]
    assert passes[0].memory <= found.memory(len(jobs)) - IMPORTS
    assert found.most >= len(jobs)


def test_what_is_predicted_of_a_job_is_what_a_dry_run_of_it_alone_foretells(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    job = Job(tmp_path / "out", save_adapter(tmp_path / "a", base, "llama", target_modules=["q_proj"]), base)
    foretold: list[Forecast] = []

    convert_jobs([job], BatchOptions(device="cpu"), BatchObserver(foretold=foretold.append), dry_run=True)
    found = predict(job, BatchOptions())

    assert found.memory(1) - IMPORTS >= found.alone == foretold[0].memory
    assert found.base_bytes == plan_conversion(base, job.adapter).plan.base_bytes
    assert found.read > 0
    assert found.own > 0


def test_a_job_whose_out_is_taken_can_be_predicted(tmp_path: Path) -> None:
    """Whether it is made already, the node that makes its part finds out."""
    base = save_base(tmp_path / "base", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").touch()
    assert predict(Job(tmp_path / "out", None, base), BatchOptions()).most == BatchOptions().outputs_per_pass
