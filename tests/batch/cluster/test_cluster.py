"""A batch on many machines, from the side that divides it: here nodes are a list, and parts are made one by one."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converter import BatchOptions, Job, Outcome, convert_batch
from converter.batch.batch import convert_jobs
from converter.batch.cluster.cluster import MOST_STARTS, convert_on_cluster
from converter.batch.cluster.parts import Ask, Node
from converter.batch.cluster.ray_cluster import Lost
from converter.batch.cluster.worker import convert_part
from converter.batch.jobs import slice_of
from converter.batch.observer import BatchObserver
from converter.cli.main import main
from converter.errors import ConversionRefused, Interrupted
from converter.observer import Progress
from converter.recipe import versions
from tests.batch.scenes import linked, statuses
from tests.models import four_jobs, save_four
from tests.reference import differences

NODE = Node(cpus=1, gpus=0, memory=2_000_000_000)


class Nodes:
    """A cluster that makes a part when it is asked which have ended; `lose` says of a part whether it is lost."""

    def __init__(self, *nodes: Node, lose: Callable[[int], bool] = lambda _: False) -> None:
        self._nodes, self._lose = list(nodes), lose
        self._waiting: list[tuple[int, Sequence[Job], BatchOptions]] = []
        self._told: list[tuple[int, Outcome | Progress]] = []
        self.connected = 0
        self.asked: list[Ask] = []
        self.begun: list[list[str]] = []
        self.given: list[Job] = []
        self.options: list[BatchOptions] = []
        self.cancelled: list[int] = []

    @contextmanager
    def connect(self, _: str) -> Iterator[Nodes]:
        self.connected += 1
        yield self

    def nodes(self) -> list[Node]:
        return self._nodes

    def start(self, number: int, ask: Ask, jobs: Sequence[Job], options: BatchOptions) -> None:
        self.asked.append(ask)
        self.begun.append([job.out.name for job in jobs])
        self.given += jobs
        self.options.append(options)
        self._waiting.append((number, jobs, options))

    def finished(self, _: float) -> list[tuple[int, list[Outcome] | Lost]]:
        number, jobs, options = self._waiting.pop(0)

        def hear(item: Outcome | Progress) -> None:
            self._told.append((number, item))

        if self._lose(number):
            convert_part(jobs[:1], options, versions(), hear)  # so far it came
            return [(number, Lost("NodeDiedError: it burns"))]
        return [(number, convert_part(jobs, options, versions(), hear))]

    def heard(self) -> list[tuple[int, Outcome | Progress]]:
        told, self._told = self._told, []
        return told

    def cancel(self, numbers: Sequence[int]) -> None:
        self.cancelled += numbers
        self._waiting = [waiting for waiting in self._waiting if waiting[0] not in numbers]


def convert_on(nodes: Nodes, jobs: Sequence[Job], options: BatchOptions = BatchOptions(), **told: Any) -> list[Outcome]:
    """`told` are parts of an observer."""
    return convert_on_cluster(jobs, options, "here", BatchObserver(**told), connect=nodes.connect)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters a0 to a3 beside it."""
    return save_four(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def jobs(inputs: Path, tmp_path: Path) -> list[Job]:
    return four_jobs(inputs, tmp_path / "out")


def test_each_output_equals_that_of_a_batch_tensor_by_tensor(jobs: list[Job], tmp_path: Path) -> None:
    nodes = Nodes(NODE, NODE)
    told: list[Outcome] = []
    seen: list[Progress] = []

    outcomes = convert_on(nodes, jobs, ended=told.append, progress=seen.append)

    assert [outcome.job for outcome in outcomes] == jobs
    assert statuses(outcomes) == ["made"] * 4
    assert nodes.begun == [["a0", "a1"], ["a2", "a3"]]
    assert sorted(map(str, told)) == sorted(map(str, outcomes))
    assert [item.done for item in seen] == sorted(item.done for item in seen)
    assert seen[0].done < seen[-1].done == seen[-1].total
    assert len({item.total for item in seen}) == 1  # of all parts, from the first on
    alone = [replace(job, out=tmp_path / "alone" / job.out.name) for job in jobs]
    convert_batch(alone)
    assert [
        difference for job, other in zip(jobs, alone, strict=True) for difference in differences(job.out, other.out)
    ] == []


def test_a_rerun_on_a_cluster_reports_the_sizes_and_figures_of_the_first(jobs: list[Job]) -> None:
    first = convert_on(Nodes(NODE, NODE), jobs)
    again = convert_on(Nodes(NODE, NODE), jobs)

    assert statuses(again) == ["nothing to do"] * 4
    assert [replace(outcome, status="made", notes=(), checked={}) for outcome in again] == [
        replace(outcome, notes=(), checked={}) for outcome in first
    ]


def test_all_parts_are_made_on_one_kind_of_device_and_as_many_threads_as_cpus(jobs: list[Job]) -> None:
    nodes = Nodes(Node(cpus=64, gpus=0, memory=64_000_000_000), NODE)

    convert_on(nodes, jobs, BatchOptions(replace(BatchOptions().resources, threads=2)))

    assert {options.device for options in nodes.options} == {"cpu"}
    assert {options.resources.threads for options in nodes.options} == {ask.cpus for ask in nodes.asked} == {2}


def test_where_nodes_have_gpus_each_part_asks_for_one(jobs: list[Job]) -> None:
    class Untried(Nodes):
        def finished(self, _: float) -> list[tuple[int, list[Outcome] | Lost]]:
            return [(number, Lost("untried")) for number in range(2)]

    nodes = Untried(NODE, Node(cpus=8, gpus=2, memory=64_000_000_000))

    convert_on(nodes, jobs)

    assert {ask.gpus for ask in nodes.asked} == {1}
    assert {options.device for options in nodes.options} == {"cuda"}


def test_a_part_whose_node_is_lost_is_begun_again_and_what_it_had_finished_is_kept(jobs: list[Job]) -> None:
    losses = iter([True])
    nodes = Nodes(NODE, NODE, lose=lambda number: number == 0 and next(losses, False))
    told: list[Outcome] = []

    outcomes = convert_on(nodes, jobs, ended=told.append)

    assert nodes.begun == [["a0", "a1"], ["a2", "a3"], ["a0", "a1"]]
    assert statuses(outcomes) == ["made"] * 4
    assert len(told) == 4  # of a0 by the node that was lost, and not again
    assert outcomes[0].notes == outcomes[2].notes == ()
    assert outcomes[1].notes == ("started again, as its worker was lost: NodeDiedError: it burns",)


def test_a_part_that_somebody_else_interrupts_is_begun_again(jobs: list[Job]) -> None:
    class OnceInterrupted(Nodes):
        interrupted = False

        def finished(self, seconds: float) -> list[tuple[int, list[Outcome] | Lost]]:
            (number, result), *_ = super().finished(seconds)
            result = result if self.interrupted else []
            self.interrupted = True
            return [(number, result)]

    nodes = OnceInterrupted(NODE, NODE)

    outcomes = convert_on(nodes, jobs)

    assert all(outcome.is_good for outcome in outcomes)
    assert len(nodes.begun) == 3


def test_a_part_that_is_lost_each_time_fails_and_the_others_are_made(jobs: list[Job]) -> None:
    nodes = Nodes(NODE, NODE, lose=lambda number: number == 0)

    outcomes = convert_on(nodes, jobs)

    assert statuses(outcomes) == ["made", "failed", "made", "made"]
    assert outcomes[1].message == "started 4 times, and its worker was lost each time: NodeDiedError: it burns"
    assert nodes.begun.count(["a0", "a1"]) == MOST_STARTS


def test_where_no_node_is_left_that_could_make_a_part_it_fails(jobs: list[Job]) -> None:
    nodes = Nodes(NODE, lose=lambda _: bool(nodes.nodes().clear() or True))

    outcomes = convert_on(nodes, jobs)

    assert statuses(outcomes) == ["made", "failed", "failed", "failed"]
    assert "no node is left that has a CPU and" in outcomes[3].message
    assert nodes.cancelled == [0, 1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_what_is_under_way_and_the_same_batch_goes_on(signum: signal.Signals, jobs: list[Job]) -> None:
    nodes = Nodes(NODE, NODE)
    turns = itertools.count()

    with pytest.raises(Interrupted, match=f"{signum.name} while 1 parts were under way; what is done is kept") as ended:
        convert_on(nodes, jobs, stop=lambda: signum if next(turns) == 1 else None)

    assert ended.value.exit_code == 128 + signum
    assert nodes.cancelled == [1]
    assert statuses(convert_on(Nodes(NODE, NODE), jobs)) == ["nothing to do", "nothing to do", "made", "made"]


def test_jobs_that_clash_or_cannot_be_planned_are_refused_and_stop_no_other(jobs: list[Job], tmp_path: Path) -> None:
    nodes = Nodes(NODE, NODE)
    (tmp_path / "empty").mkdir()
    bad = replace(jobs[0], adapter=tmp_path / "empty", out=tmp_path / "out" / "bad")

    outcomes = convert_on(nodes, [bad, jobs[0], jobs[0], replace(bad, base=None, out=tmp_path / "out" / "worse")])

    assert statuses(outcomes) == ["refused", "made", "refused", "refused"]
    assert "clashes with" in outcomes[2].message
    assert nodes.begun == [["a0"]]


def test_a_name_too_long_for_a_folder_stops_no_other(jobs: list[Job]) -> None:
    jobs[1:] = [replace(jobs[1], base="x" * 300), replace(jobs[2], adapter="x" * 300)]
    assert statuses(convert_on(Nodes(NODE), jobs)) == ["made", "refused", "refused"]


def test_where_all_are_refused_no_cluster_is_asked(jobs: list[Job], tmp_path: Path) -> None:
    nodes = Nodes(NODE)
    (tmp_path / "empty").mkdir()
    jobs = [replace(job, adapter=tmp_path / "empty") for job in jobs]
    assert statuses(convert_on(nodes, jobs)) == ["refused"] * 4
    assert nodes.connected == 0


def test_relative_paths_are_those_of_this_process(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    job = Job(Path("here"), "a0", "base")
    nodes = Nodes(NODE)

    (outcome,) = convert_on(nodes, [job])

    assert (outcome.job, outcome.status) == (job, "made")
    assert (inputs / "here" / "config.json").exists()
    assert nodes.given[0] == Job(inputs / "here", str(inputs / "a0"), str(inputs / "base"))


def test_a_dry_run_asks_no_cluster(jobs: list[Job]) -> None:
    nodes = Nodes(NODE)
    outcomes = convert_on_cluster(jobs, connect=nodes.connect, dry_run=True)
    assert outcomes == convert_jobs(jobs, dry_run=True)
    assert statuses(outcomes) == ["planned"] * 4
    assert nodes.connected == 0


def test_a_strict_batch_with_one_bad_job_asks_no_cluster(jobs: list[Job], tmp_path: Path) -> None:
    nodes = Nodes(NODE)
    told: list[Outcome] = []
    (tmp_path / "empty").mkdir()
    bad = replace(jobs[0], adapter=tmp_path / "empty", out=tmp_path / "z")

    outcomes = convert_on(nodes, [*jobs, bad], BatchOptions(strict=True), ended=told.append)

    assert statuses(outcomes) == ["planned"] * 4 + ["refused"]
    assert told == outcomes
    assert nodes.connected == 0
    assert not jobs[0].out.parent.exists()


def test_a_slice_is_made_against_an_earlier_output(jobs: list[Job]) -> None:
    convert_batch(jobs[2:3])
    nodes = Nodes(NODE, NODE)

    outcomes = convert_on(nodes, slice_of(jobs, 1, 2), BatchOptions(strict=True, against=jobs[2].out))

    assert [(outcome.job.out.name, outcome.status) for outcome in outcomes] == [("a2", "nothing to do"), ("a3", "made")]
    assert sorted(name for names in nodes.begun for name in names) == ["a2", "a3"]
    assert linked(jobs[3].out)


def test_where_no_node_has_the_memory_it_is_refused(jobs: list[Job]) -> None:
    with pytest.raises(ConversionRefused, match="`address`: no node has a CPU and "):
        convert_on(Nodes(replace(NODE, memory=100_000_000)), jobs)
    assert not jobs[0].out.parent.exists()


# From the command line


@pytest.fixture
def listed(jobs: list[Job], tmp_path: Path) -> Path:
    """The jobs in a file."""
    rows = [
        {"base": str(j.base), "adapter": str(j.adapter), "out": str(j.out), "block_size": j.recipe.block_size}
        for j in jobs
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "jobs.jsonl"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no cluster answers there"),
        ("nowhere.invalid:6379", "no cluster answers there"),
        ("127.0.0.1:99999", "no cluster answers there"),
        (f"{'x' * 64}:6379", "no cluster answers there"),
        ("a..b:6379", "no cluster answers there"),
        ("auto", "neither local nor HOST:PORT"),
        ("ray://127.0.0.1:10001", "neither local nor HOST:PORT"),
    ],
)
@pytest.mark.usefixtures("signal_handlers")
def test_an_address_where_no_cluster_is_ends_with_2_and_one_line(
    address: str, why: str, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("batch", listed, "--ray", address) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--ray {address}: {why}" in line


@pytest.mark.usefixtures("signal_handlers")
def test_a_dry_run_does_not_ask_whether_a_cluster_is_there(
    listed: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("batch", listed, "--ray", "127.0.0.1:1", "--dry-run") == 0
    assert "4 planned" in capsys.readouterr().out
    assert not jobs[0].out.parent.exists()


@pytest.mark.usefixtures("signal_handlers")
def test_without_ray_one_line_says_how_to_install_it(
    listed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("batch", listed, "--ray", "local") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --ray: Ray is not installed: pip install nf4-converter[ray]"


def test_a_cluster_that_cannot_be_reached_refuses_in_python_too(jobs: list[Job]) -> None:
    with pytest.raises(ConversionRefused, match="no cluster answers"):
        convert_on_cluster(jobs, address="127.0.0.1:1")
