"""Real clusters of Ray on this machine: two nodes, one of which is lost on the way; and the one that `local` starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from converter import Job, convert_batch
from converter.api import verify
from converter.batch.cluster.parts import Ask
from converter.batch.cluster.ray_cluster import task_options
from tests.conftest import REPOSITORY
from tests.models import four_jobs, save_four
from tests.reference import differences

PATIENCE = 240
"""Seconds for what takes some on an idle machine: not a measurement, but a hang."""

AT_THIS_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where it is 0, Ray's ports are at 127.0.0.1, with or without a network."""


def test_ray_is_asked_for_cpus_memory_and_a_gpu_and_repeats_nothing_by_itself() -> None:
    asked = task_options(Ask(cpus=4, gpus=1, memory=900_000_000))
    assert asked == {"num_cpus": 4, "num_gpus": 1, "memory": 900_000_000, "max_retries": 0}


@dataclass
class Scene:
    """Four jobs in a file: two of one recipe, two of another, so two parts; and marks, by which workers are held."""

    folder: Path
    jobs: list[Job]
    environment: dict[str, str]

    @property
    def marks(self) -> Path:
        return self.folder / "marks"

    def start(self, address: str) -> subprocess.Popen[str]:
        """The batch, of which only the workers know the marks."""
        return self._start(Path(__file__).with_name("held_batch.py"), self.folder / "jobs.jsonl", address)

    def start_command(self, *options: str) -> subprocess.Popen[str]:
        """The command line, whose workers know no marks."""
        return self._start("-m", "converter", "batch", self.folder / "jobs.jsonl", "--threads", "1", *options)

    def _start(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_marked(self, process: subprocess.Popen[str], mark: Callable[[list[str]], Any]) -> Any:
        """What `mark` finds among the names of the marks."""
        until = time.monotonic() + PATIENCE
        while not (found := mark(os.listdir(self.marks))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, os.listdir(self.marks)
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters a0 to a3 beside it, and a cache that knows them."""
    return save_four(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def scene(inputs: Path, tmp_path: Path) -> Iterator[Scene]:
    jobs = four_jobs(inputs, tmp_path / "out")
    rows = [
        {"base": str(job.base), "adapter": str(job.adapter), "out": f"out/a{n}", "block_size": job.recipe.block_size}
        for n, job in enumerate(jobs)
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "marks").mkdir()
    short = Path(tempfile.mkdtemp(prefix="ray-"))  # names of sockets have 107 bytes at most
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "MARKS": str(tmp_path / "marks"),
        "RAY_USAGE_STATS_ENABLED": "0",
        AT_THIS_MACHINE: "0",
        "XDG_CACHE_HOME": str(inputs / "cache"),
        "TMPDIR": str(short),
    }
    yield Scene(tmp_path, jobs, environment)
    shutil.rmtree(short)


@dataclass
class TwoNodes:
    process: subprocess.Popen[str]
    address: str
    second: str

    def lose_the_second(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("lose\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "lost\n"


@pytest.fixture
def two_nodes(scene: Scene) -> Iterator[TwoNodes]:
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("two_nodes.py")],
        env=scene.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "it ended"
        yield TwoNodes(process, **json.loads(first))
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert of_ray(scene) == []


def of_ray(scene: Scene) -> list[str]:
    """Processes of a cluster that the scene began."""
    folder = scene.environment["TMPDIR"]
    running = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [" ".join(line)[:200] for line in running if any(folder in word for word in line)]


def listening(scene: Scene, command: subprocess.Popen[str]) -> set[str]:
    """Addresses at which the command and the processes of its cluster listen."""
    folder = scene.environment["TMPDIR"]
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if process.pid == command.pid or any(folder in word for word in process.info["cmdline"] or []):
            found |= {at.laddr.ip for at in process.net_connections("inet") if at.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_two_nodes_make_what_a_batch_makes_through_a_signal_and_the_loss_of_one(
    scene: Scene, two_nodes: TwoNodes
) -> None:
    # Interrupted while both nodes have a part.
    (scene.marks / "slow").touch()
    command = scene.start(two_nodes.address)
    scene.until_marked(command, lambda marks: sum(mark.startswith("reading") for mark in marks) == 2)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=PATIENCE)

    assert (command.returncode, err.count("\n")) == (130, 1), err
    assert "SIGINT while 2 parts were under way; what is done is kept; run the same command to resume" in err
    assert not any(job.out.exists() for job in scene.jobs)

    # The same command; the second node is lost when one of its two outputs is whole, and the other about to be.
    (scene.marks / "slow").unlink()
    seconds = ["a1", "a3"]
    for name in seconds:
        (scene.marks / f"hold {name}").touch()
    command = scene.start(two_nodes.address)
    lost = scene.until_marked(
        command, lambda marks: [name for name in seconds if f"sealing {name} on {two_nodes.second}" in marks]
    )[0]
    finished = scene.folder / "out" / {"a1": "a0", "a3": "a2"}[lost]
    before = (finished / "conversion.json").stat()
    two_nodes.lose_the_second()
    seconds.remove(lost)
    (scene.marks / f"hold {seconds[0]}").unlink()  # which makes room on the first node
    sealing = f"sealing {lost} on "
    scene.until_marked(command, lambda marks: len([mark for mark in marks if mark.startswith(sealing)]) == 2)
    (scene.marks / f"hold {lost}").unlink()
    out, err = command.communicate(timeout=PATIENCE)

    assert (command.returncode, err) == (0, ""), err
    told = json.loads(out)
    assert [row["out"] for row in told] == [str(job.out) for job in scene.jobs]
    assert {row["status"] for row in told} == {"made"}
    assert (finished / "conversion.json").stat() == before
    notes = {Path(row["out"]).name: row["notes"] for row in told}
    assert [name for name, some in notes.items() if some] == [lost]
    assert notes[lost][0].startswith("started again, as its worker was lost: ")

    alone = [Job(scene.folder / "alone" / j.out.name, j.adapter, j.base, j.recipe) for j in scene.jobs]
    convert_batch(alone)
    for job, other in zip(scene.jobs, alone, strict=True):
        assert differences(job.out, other.out) == []
        assert verify(job.out, job.base, job.adapter).problems == []


@pytest.mark.slow
def test_a_local_cluster_ends_in_order_at_a_signal_and_leaves_nothing_behind(scene: Scene) -> None:
    (scene.marks / "slow").touch()
    command = scene.start("local")
    scene.until_marked(command, lambda marks: any(mark.startswith("reading") for mark in marks))
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=PATIENCE)

    assert (command.returncode, err.count("\n")) == (143, 1), err
    assert "SIGTERM while" in err
    assert "run the same command to resume" in err
    assert of_ray(scene) == []
    assert os.listdir(scene.environment["TMPDIR"]) == []


def test_the_command_makes_a_batch_on_a_cluster_of_its_own_that_only_this_machine_can_reach(scene: Scene) -> None:
    del scene.environment[AT_THIS_MACHINE]  # of itself
    command = scene.start_command("--ray", "local", "--json")
    while not any((scene.folder / "out").glob("*")) and command.poll() is None:
        time.sleep(0.05)
    addresses = listening(scene, command)
    out, err = command.communicate(timeout=PATIENCE)

    assert (command.returncode, err) == (0, ""), err
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    told = json.loads(out)
    assert [(row["out"], row["status"]) for row in told["outputs"]] == [(str(job.out), "made") for job in scene.jobs]
    for job in scene.jobs:
        assert verify(job.out, job.base, job.adapter).problems == []
    assert of_ray(scene) == []
    assert os.listdir(scene.environment["TMPDIR"]) == []
