"""A pipeline to a bucket of a real S3 server."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from converter import convert
from converter.delivery.state import STATE, STEPS
from converter.read.cache import cache_folder
from tests.bucket_proxy import Proxy, place_of_its_own
from tests.bucket_server import BUCKET, SECRET, BucketServer
from tests.conftest import REPOSITORY
from tests.delivery.scenes import ADAPTER, BASE, ONE_THREAD, delivered, job_file
from tests.folders import change_json, contents, copy
from tests.limits import HANG
from tests.write.stores.test_buckets import when

NOTHING = [("announce", "skipped")]
EVALUATE = {"text": "text.txt", "window": 32, "max_kl": 5.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `convert` writes of the same base and adapter."""
    return contents(convert(BASE, ADAPTER, tmp_path_factory.mktemp("whole") / "out").out)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A place of the test's own."""
    return f"delivered/{place_of_its_own(request.node.name)}"


def test_what_passed_is_in_the_bucket_and_a_second_run_writes_nothing(
    whole: dict[str, bytes], server: BucketServer, proxy: Proxy, prefix: str, tmp_path: Path
) -> None:
    tables = {"evaluate": EVALUATE, "verify": {"compare": True}, "announce": {"command": ["tee", "heard.json"]}}
    file = job_file(tmp_path, f"s3://{BUCKET}/{prefix}", min_survival=0.9, **tables)

    ran = delivered(file, tmp_path / "work")

    assert (ran.code, ran.steps) == (0, [(step, "done") for step in STEPS])
    assert server.contents(prefix) == whole
    assert f'"seen_at": "s3://{BUCKET}/{prefix}"' in (tmp_path / "heard.json").read_text()
    assert SECRET not in (tmp_path / "heard.json").read_text() + (tmp_path / "work" / STATE).read_text()
    proxy.log.clear()

    again = delivered(file, tmp_path / "work")

    assert (again.code, again.steps) == (0, NOTHING)
    assert {method for method, _ in proxy.log} <= {"GET", "HEAD"}


def test_a_missed_gate_sends_nothing(server: BucketServer, proxy: Proxy, prefix: str, tmp_path: Path) -> None:
    file = job_file(tmp_path, f"s3://{BUCKET}/{prefix}", evaluate=EVALUATE | {"max_kl": 1e-9})

    ran = delivered(file, tmp_path / "work")

    assert (ran.code, ran.steps[-1]) == (4, ("gates", "failed"))
    assert server.names(prefix) == set()
    assert {method for method, _ in proxy.log} <= {"GET", "HEAD"}


@pytest.mark.slow
@pytest.mark.parametrize("at", [("PUT", "/.partial/"), ("PUT", "/conversion.json"), ("PUT", "/config.json")])
def test_a_run_that_is_killed_while_it_publishes_shows_no_checkpoint_and_is_resumed(
    at: tuple[str, str], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, prefix: str, tmp_path: Path
) -> None:
    file = job_file(tmp_path, f"s3://{BUCKET}/{prefix}", evaluate=EVALUATE)
    command = [sys.executable, "-m", "converter", "pipeline", file, "--work", tmp_path / "work", "--threads", "1"]
    killed = subprocess.Popen([*map(str, command)], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    proxy.before = when(1, *at, lambda: killed.send_signal(signal.SIGKILL))
    assert killed.wait(HANG) == -signal.SIGKILL
    proxy.before = None
    assert "config.json" not in server.names(prefix)

    ran = delivered(file, tmp_path / "work")

    assert (ran.code, ran.steps[-2:]) == (0, [("publish", "done"), ("announce", "done")])
    assert {state for _, state in ran.steps[:-2]} == {"skipped"}
    assert server.contents(prefix) == whole


def test_a_new_version_replaces_the_old_one_only_when_it_passed(
    server: BucketServer, proxy: Proxy, prefix: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    adapter, place, options = (
        copy(ADAPTER, tmp_path / "adapter"),
        f"s3://{BUCKET}/{prefix}",
        replace(ONE_THREAD, overwrite=True),
    )
    assert delivered(job_file(tmp_path, place, adapter=str(adapter)), tmp_path / "work").code == 0
    change_json(adapter / "adapter_config.json", lora_alpha=3)

    gated = job_file(tmp_path, place, adapter=str(adapter), max_error=0.01)
    assert delivered(gated, tmp_path / "work", options).code == 4
    assert server.contents(prefix) == whole

    assert delivered(job_file(tmp_path, place, adapter=str(adapter)), tmp_path / "work", options).code == 0
    assert server.contents(prefix) == contents(convert(BASE, adapter, tmp_path / "expected").out)


def test_a_batch_has_a_place_in_the_bucket_for_each_adapter(
    server: BucketServer, proxy: Proxy, prefix: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    change_json(copy(ADAPTER, tmp_path / "ads" / "two") / "adapter_config.json", lora_alpha=3)
    copy(ADAPTER, tmp_path / "ads" / "one")
    file = tmp_path / "jobs.toml"
    file.write_text(f'base = "{BASE}"\nout = "s3://{BUCKET}/{prefix}"\nadapters = "ads/*"\n')

    ran = delivered(file, tmp_path / "work")

    assert ran.code == 0
    one, two = (server.contents(f"{prefix}/{name}") for name in ("one", "two"))
    assert one.keys() == two.keys() > {"config.json", "conversion.json", "SHA256SUMS"}
    assert one["conversion.json"] != two["conversion.json"]
    assert one["tokenizer.json"] == whole["tokenizer.json"]


def test_a_pipeline_reads_base_and_adapter_in_a_bucket(
    whole: dict[str, bytes], server: BucketServer, proxy: Proxy, prefix: str, tmp_path: Path
) -> None:
    import obstore

    for folder in (BASE, ADAPTER):
        for name, raw in contents(folder).items():
            obstore.put(server.store(f"{prefix}/{folder.name}"), name, raw)
    given = {key: f"s3://{BUCKET}/{prefix}/{folder.name}" for key, folder in (("base", BASE), ("adapter", ADAPTER))}
    tables = {"evaluate": EVALUATE, "verify": {"compare": True}}
    file = job_file(tmp_path, f"s3://{BUCKET}/{prefix}/out", **given, **tables)

    ran = delivered(file, tmp_path / "work")

    assert (ran.code, ran.steps) == (0, [(step, "done") for step in STEPS])
    assert server.contents(f"{prefix}/out") == whole
    assert SECRET not in (tmp_path / "work" / STATE).read_text()
    reading = cache_folder() / "reading"
    assert not reading.exists() or list(reading.iterdir()) == []
    assert delivered(file, tmp_path / "work").steps == NOTHING
