"""What is read from a bucket of a real S3 server: the bytes of folders, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from converter import BatchOptions, Job, Recipe, convert, convert_batch, evaluate, plan_conversion, verify
from converter.calibration import Calibration
from converter.errors import (
    BadCheckpoint,
    BadOutput,
    ConversionRefused,
    HubOffline,
    InputChanged,
    Interrupted,
    StoreFailed,
    StoreRefused,
    Undecided,
)
from converter.read.bucket.connection import Entry
from converter.read.bucket.folder import BucketFolder, files_among
from converter.read.bucket.parts import PART
from converter.read.cache import cache_folder
from converter.seal.receipt import RECEIPT
from converter.write.journal import JOURNAL
from tests.batch.scenes import interrupt
from tests.bucket_proxy import Proxy, place_of_its_own
from tests.bucket_server import BUCKET, SECRET, BucketServer, use
from tests.folders import change_json, contents, copy
from tests.reference import differences
from tests.write.stores.settings import ONE_THREAD, SMALL_SHARDS


@pytest.fixture
def team(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return f"team/{place_of_its_own(request.node.name)}"


@pytest.fixture
def there(inputs: tuple[Path, Path], server: BucketServer, team: str) -> tuple[str, str]:
    """Base and adapter in the bucket."""
    return upload(server, inputs[0], team), upload(server, inputs[1], team)


def upload(server: BucketServer, folder: Path, team: str) -> str:
    """Put a folder's files below the team's folder; their address."""
    import obstore

    for name, raw in contents(folder).items():
        obstore.put(server.store(f"{team}/{folder.name}"), name, raw)
    return f"s3://{BUCKET}/{team}/{folder.name}"


def reading() -> list[Path]:
    """What lies in the user's cache of what is read from stores."""
    return [*(cache_folder() / "reading").iterdir()] if (cache_folder() / "reading").exists() else []


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def whole_gets(proxy: Proxy, name: str) -> int:
    return len([1 for method, path in proxy.log if method == "GET" and path.partition("?")[0].endswith(name)])


def test_base_and_adapter_in_a_bucket_give_the_bytes_that_their_folders_give(
    there: tuple[str, str], whole: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    report = convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert contents(report.out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert reading() == []


def test_neither_key_nor_address_gets_into_an_output(
    there: tuple[str, str], server: BucketServer, proxy: Proxy, tmp_path: Path
) -> None:
    report = convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    for name, raw in contents(report.out).items():
        assert SECRET.encode() not in raw, name
        assert b"s3://" not in raw, name
    origin = json.loads((report.out / RECEIPT).read_text())["origin"]
    assert (origin["base_commit"], origin["adapter_name"]) == (None, None)


def test_from_a_bucket_to_a_bucket_with_room_for_a_part_only(
    there: tuple[str, str],
    inputs: tuple[Path, Path],
    whole: dict[str, bytes],
    server: BucketServer,
    proxy: Proxy,
    team: str,
    tmp_path: Path,
) -> None:
    out = f"s3://{BUCKET}/{team}/out"

    planned = plan_conversion(*there, out, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    convert(*there, out, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", disk=planned.disk)

    assert any("of the base come one by one" in note for note in planned.plan.notes)
    assert server.contents(f"{team}/out") == whole
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(BadOutput, match=r"`disk` is 1,000 bytes, and .* are needed"):
        convert(*there, f"{out}2", SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", disk=1_000)


def test_a_dry_run_reads_headers_and_downloads_no_shard(
    there: tuple[str, str], inputs: tuple[Path, Path], proxy: Proxy, tmp_path: Path
) -> None:
    planned = plan_conversion(*there, tmp_path / "out", SMALL_SHARDS)

    assert planned.plan.digest == plan_conversion(*inputs, tmp_path / "out", SMALL_SHARDS).plan.digest
    assert [whole_gets(proxy, f"{inputs[0].name}/{shard.name}") for shard in shards(inputs[0])] == [1] * len(
        shards(inputs[0])
    )
    assert reading() == []


def test_what_is_there_already_is_not_made_again_and_no_shard_is_fetched(
    there: tuple[str, str], inputs: tuple[Path, Path], proxy: Proxy, tmp_path: Path
) -> None:
    convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    proxy.log.clear()

    report = convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert report.nothing_to_do
    for shard in shards(inputs[0]):
        assert whole_gets(proxy, f"{inputs[0].name}/{shard.name}") == 1  # its header


def test_a_killed_run_is_resumed_and_fetches_only_what_is_still_needed(
    there: tuple[str, str], inputs: tuple[Path, Path], whole: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    files = [f"/{inputs[0].name}/{shard.name}" for shard in shards(inputs[0])]
    out = tmp_path / "out"
    arguments = ["--base", there[0], "--adapter", there[1], "--out", str(out), "--max-shard-size", "1MB"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "converter", *arguments, "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen: list[str] = []

    def kill(method: str, path: str) -> str | None:
        where = path.partition("?")[0]
        if method == "GET" and where.endswith(files[-1]):
            seen.append(where)
            if len(seen) > 1:  # the first is for its header
                killed.send_signal(signal.SIGKILL)
                return "drop"
        return None

    proxy.before = kill
    assert killed.wait(120) == -signal.SIGKILL
    proxy.before = None
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    proxy.log.clear()

    report = convert(*there, out, SMALL_SHARDS, ONE_THREAD)

    assert contents(report.out) == whole
    assert whole_gets(proxy, files[-1]) > 1
    assert sum(whole_gets(proxy, file) == 1 for file in files) >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert reading() == []


@pytest.mark.parametrize("fault", [500, 503, "drop"])
def test_a_server_that_fails_for_a_while_is_asked_again(
    fault: int | str, there: tuple[str, str], whole: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    failed: set[str] = set()

    def fail(method: str, path: str) -> int | str | None:
        if method == "GET" and path not in failed:
            failed.add(path)
            return fault
        return None

    proxy.before = fail
    report = convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert len(failed) > 5
    assert contents(report.out) == whole


def test_a_base_that_is_replaced_while_it_is_read_ends_the_run(
    there: tuple[str, str], inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, team: str, tmp_path: Path
) -> None:
    import obstore

    last = shards(inputs[0])[-1]
    seen: list[str] = []

    def replace(method: str, path: str) -> None:
        if method == "GET" and path.partition("?")[0].endswith(f"/{inputs[0].name}/{last.name}"):
            seen.append(path)
            if len(seen) == 2:
                raw = last.read_bytes()
                obstore.put(server.store(f"{team}/{inputs[0].name}"), last.name, raw[:-1] + bytes([raw[-1] ^ 1]))

    proxy.before = replace
    with pytest.raises(InputChanged, match=rf"{last.name}: was replaced while it was being read; run the same command"):
        convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert not (tmp_path / "out").exists()
    assert reading() == []


def test_a_damaged_file_is_found_by_the_sums_beside_it(
    there: tuple[str, str], inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, team: str, tmp_path: Path
) -> None:
    import obstore

    shard = shards(inputs[0])[0].name
    obstore.put(server.store(f"{team}/{inputs[0].name}"), "SHA256SUMS", f"{'0' * 64}  {shard}\n".encode())

    with pytest.raises(BadCheckpoint, match=rf"{shard}: its sha256 is not 000000000000…, which SHA256SUMS states"):
        convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_gone_ends_the_try_after_a_while(there: tuple[str, str], proxy: Proxy) -> None:
    folder = BucketFolder(there[0], patience=timedelta(seconds=1))
    proxy.before = lambda *_: "drop"

    with pytest.raises(StoreFailed, match=r"config.json: .*: check the connection, and AWS_ACCESS_KEY_ID") as failed:
        folder.read_into("config.json", 0, memoryview(bytearray(4)))

    assert failed.value.resumable
    assert SECRET not in str(failed.value)


def test_a_file_that_was_removed_is_named(
    there: tuple[str, str], inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, team: str
) -> None:
    import obstore

    folder = BucketFolder(there[0])
    obstore.delete(server.store(f"{team}/{inputs[0].name}"), "config.json")

    with pytest.raises(InputChanged, match=r"config\.json: was removed while it was being read"):
        folder.read_into("config.json", 0, memoryview(bytearray(4)))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (f"s3://{BUCKET}/nothing-here", "nothing lies there: check the name"),
        ("s3://no-such-bucket/model", "NoSuchBucket: check bucket and folder"),
        (f"s3://{BUCKET}", "give a bucket and a folder in it"),
        ("s3://key:secret@bucket/model", "an address holds no key and no settings"),
        (f"s3://{BUCKET}/model?secret=1", "an address holds no key and no settings"),
        ("file://elsewhere/model", "not a file of this machine"),
        ("file:///no/such/folder", "/no/such/folder: "),
    ],
)
def test_what_can_not_be_read_is_refused_with_what_to_do(
    place: str, said: str, inputs: tuple[Path, Path], proxy: Proxy, tmp_path: Path
) -> None:
    for base, adapter in ((place, inputs[1]), (inputs[0], place)):
        with pytest.raises(ConversionRefused) as refused:
            convert(base, adapter, tmp_path / "out")

        assert said in str(refused.value)
        assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_is_refused_and_never_repeated(
    there: tuple[str, str], server: BucketServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, server.environment(secret="another-secret"))

    with pytest.raises(StoreRefused, match="check keys and rights, AWS_ACCESS_KEY_ID") as refused:
        convert(*there, tmp_path / "out")

    assert "another-secret" not in str(refused.value)


def test_an_address_with_a_key_that_an_adapter_names_as_its_base_is_not_repeated(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="s3://key:secret@bucket/model")

    with pytest.raises(
        StoreRefused, match=r"names an address as the base, but .*holds no key.*; give `base`"
    ) as refused:
        plan_conversion(None, adapter)

    assert "secret" not in str(refused.value)


def test_a_bucket_is_the_base_that_an_adapter_names(
    there: tuple[str, str], inputs: tuple[Path, Path], whole: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    adapter = copy(inputs[1], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=there[0])

    report = convert(None, adapter, tmp_path / "out", SMALL_SHARDS, ONE_THREAD)

    assert {n: raw for n, raw in contents(report.out).items() if n.endswith(".safetensors")} == {
        n: raw for n, raw in whole.items() if n.endswith(".safetensors")
    }
    assert json.loads((report.out / RECEIPT).read_text())["origin"]["base_name"] is None


@pytest.mark.parametrize("where", ["alone", "in a file of jobs"])
def test_a_batch_reads_base_and_adapters_in_a_bucket_and_leaves_nothing_here(
    where: str,
    there: tuple[str, str],
    inputs: tuple[Path, Path],
    server: BucketServer,
    proxy: Proxy,
    team: str,
    tmp_path: Path,
) -> None:
    second = copy(inputs[1], tmp_path / "second")
    change_json(second / "adapter_config.json", lora_alpha=3)
    addresses = {"first": there[1], "second": upload(server, second, team)}
    if where == "alone":
        adapters = [part for name, address in addresses.items() for part in ("--adapter", f"{name}={address}")]
        command = ["--base", there[0], *adapters, "--out", str(tmp_path / "outs"), "-q"]
    else:
        jobs = [f'[[jobs]]\nname = "{name}"\nadapter = "{address}"\n' for name, address in addresses.items()]
        (tmp_path / "jobs.toml").write_text(f'base = "{there[0]}"\nout = "{tmp_path / "outs"}"\n' + "".join(jobs))
        command = ["batch", str(tmp_path / "jobs.toml"), "-q"]

    ran = subprocess.run([sys.executable, "-m", "converter", *command], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")
    for name, adapter in {"first": inputs[1], "second": second}.items():
        alone = convert(inputs[0], adapter, tmp_path / f"alone-{name}").out
        assert differences(tmp_path / "outs" / name, alone) == []
    assert reading() == []


def test_an_interrupted_batch_of_a_base_in_a_bucket_is_resumed_though_its_files_were_removed(
    there: tuple[str, str], inputs: tuple[Path, Path], proxy: Proxy, tmp_path: Path
) -> None:
    second = copy(inputs[1], tmp_path / "second")
    change_json(second / "adapter_config.json", lora_alpha=3)
    jobs = [Job(tmp_path / name, adapter, there[0]) for name, adapter in (("one", inputs[1]), ("two", second))]
    interrupt(jobs, 8)
    assert reading() == []
    assert (tmp_path / "one.partial" / JOURNAL).stat().st_size > 1_000

    outcomes = convert_batch(jobs, BatchOptions(ONE_THREAD))

    assert [outcome.status for outcome in outcomes] == ["made", "made"]
    assert differences(tmp_path / "one", convert(*inputs, tmp_path / "alone").out) == []


def test_a_signal_ends_a_wait_for_a_server_that_hangs_and_the_same_command_resumes(
    there: tuple[str, str], inputs: tuple[Path, Path], whole: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    last = f"/{inputs[0].name}/{shards(inputs[0])[-1].name}"
    hangs, waits, answers, seen = threading.Event(), threading.Event(), threading.Event(), itertools.count()

    def hang(method: str, path: str) -> str | None:
        if method == "GET" and path.partition("?")[0].endswith(last) and next(seen):  # the first is for its header
            hangs.set()
            answers.wait(60)
            return "drop"
        return None

    proxy.before = hang
    try:
        with pytest.raises(Interrupted, match=r"SIGTERM while .* was fetched"):
            convert(
                *(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD),
                progress=lambda told: waits.set() if last.endswith(f"/{told.name}") and hangs.is_set() else None,
                stop=lambda: signal.SIGTERM if waits.is_set() else None,
            )
        assert not answers.is_set()
    finally:
        answers.set()
        proxy.before = None

    assert contents(convert(*there, tmp_path / "out", SMALL_SHARDS, ONE_THREAD).out) == whole


@pytest.mark.slow
def test_a_base_in_a_bucket_is_calibrated_as_its_folder(
    tiny_base: Path, tiny_adapter: Path, server: BucketServer, proxy: Proxy, team: str, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("def main() -> None:\n    return None\n" * 20)
    recipe = Recipe(calibration=Calibration.of(tmp_path / "text", tokens=128, window=32))
    base, adapter = upload(server, tiny_base, team), upload(server, tiny_adapter, team)

    made = convert(base, adapter, tmp_path / "out", recipe, ONE_THREAD, calibrate=tmp_path / "text")

    alone = convert(tiny_base, tiny_adapter, tmp_path / "alone", recipe, ONE_THREAD, calibrate=tmp_path / "text")
    assert contents(made.out) == contents(alone.out)
    assert reading() == []


def test_offline_and_revisions_are_refused_before_a_request(there: tuple[str, str], proxy: Proxy) -> None:
    proxy.log.clear()
    with pytest.raises(HubOffline, match="`offline` reaches no bucket; give a folder"):
        plan_conversion(*there, offline=True)
    with pytest.raises(ConversionRefused, match="a bucket has no revisions: leave the revision out"):
        plan_conversion(there[0], None, base_revision="main")
    assert proxy.log == []


def test_file_addresses_are_folders(inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    base, adapter = (folder.as_uri() for folder in inputs)

    report = convert(base, adapter, (tmp_path / "out").as_uri(), SMALL_SHARDS, ONE_THREAD)

    assert contents(report.out) == whole


def test_what_is_read_whole_is_refused_beforehand_where_the_cache_has_no_room(
    there: tuple[str, str], inputs: tuple[Path, Path], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = convert(*inputs, tmp_path / "out", SMALL_SHARDS, ONE_THREAD).out
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1_234))

    with pytest.raises(Undecided, match=r"has 1,234 free; make room there, or name another place with XDG_CACHE_HOME"):
        verify(out, *there)
    assert reading() == []


# The folder itself


def test_a_file_of_many_parts_arrives_as_it_is_and_only_once(server: BucketServer, proxy: Proxy, team: str) -> None:
    import obstore

    raw = random.Random(1).randbytes(5 * PART // 2 + 3)
    obstore.put(server.store(f"{team}/model"), "large", raw, chunk_size=5 << 20)  # whose ETag is no MD5
    obstore.put(server.store(f"{team}/model"), "inner/empty.txt", b"")
    heard: list[int] = []

    with closing(BucketFolder(f"s3://{BUCKET}/{team}/model/")) as folder:
        here = folder.fetch(
            ["large", "inner/empty.txt"], lambda name, done: heard.append(done) if name == "large" else None
        )
        assert (here.path / "large").read_bytes() == raw
        assert here.inner_names() == {"inner/empty.txt"}
        assert here.path.name == "model"
        assert heard == sorted(heard)
        assert len({*heard} - {0}) == 3
        proxy.log.clear()
        folder.fetch(["large", "inner/empty.txt"])
        assert proxy.log == []
    assert not here.path.exists()


def test_of_a_prefix_what_waits_and_what_is_hidden_is_not_seen(server: BucketServer, proxy: Proxy, team: str) -> None:
    import obstore

    for name in ("config.json", ".partial/0123", "inner/a/b/c", "inner/.git/x", "a/b/c/d/e", "deep/a/b/file"):
        obstore.put(server.store(f"{team}/model"), name, b"x")
    obstore.put(server.store(f"{team}/model-2"), "other.json", b"x")

    folder = BucketFolder(f"s3://{BUCKET}/{team}/model")

    assert folder.names() == {"config.json"}
    assert folder.inner_names() == {"inner/a/b/c", "deep/a/b/file"}


def test_markers_of_folders_are_no_files() -> None:
    listed = {
        "": Entry(0, 1, '"a"'),
        "inner": Entry(0, 1, '"b"'),
        "empty": Entry(0, 1, '"c"'),
        ".arrived": Entry(5, 1, '"d"'),
        "inner/x": Entry(1, 1, '"e"'),
        "empty.txt": Entry(0, 1, '"f"'),
        "../outside": Entry(3, 1, '"g"'),
    }

    assert set(files_among(listed, "s3://bucket/model")) == {"inner/x", "empty.txt"}


def test_what_no_folder_can_hold_is_refused() -> None:
    listed = {"inner": Entry(2, 1, '"a"'), "inner/x": Entry(1, 1, '"b"')}

    with pytest.raises(StoreRefused, match="s3://bucket/model: inner is a file and a folder of others; move one"):
        files_among(listed, "s3://bucket/model")


def test_processes_that_read_the_same_have_folders_of_their_own(
    server: BucketServer, proxy: Proxy, there: tuple[str, str]
) -> None:
    with closing(BucketFolder(there[0])) as one, closing(BucketFolder(there[0])) as other:
        paths = {folder.fetch(["config.json"]).path for folder in (one, other)}
        assert len(paths) == 2
    assert reading() == []


def test_what_a_killed_reader_left_is_not_fetched_again_unless_it_was_replaced(
    there: tuple[str, str], inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, team: str
) -> None:
    import obstore

    names = sorted(contents(inputs[0]))
    program = (
        "import os, sys; from converter.read.bucket.folder import BucketFolder\n"
        "print(BucketFolder(sys.argv[1]).fetch(sys.argv[2:]).path, flush=True); os._exit(9)"
    )
    ran = subprocess.run([sys.executable, "-c", program, there[0], *names], capture_output=True, text=True, check=False)
    assert ran.returncode == 9, ran.stderr
    left = Path(ran.stdout.strip())
    (left / "gone.json").write_text("of an earlier listing")
    obstore.put(server.store(f"{team}/{inputs[0].name}"), "config.json", b"{}")
    proxy.log.clear()

    with closing(BucketFolder(there[0])) as folder:
        here = folder.fetch(names)
        assert here.path == left
        found = {name: (here.path / name).read_bytes() for name in here.names()}
        assert found == contents(inputs[0]) | {"config.json": b"{}"}
    gets = {path.partition("?")[0].rpartition("/")[2] for method, path in proxy.log if "list-type" not in path}
    assert gets == {"config.json"}
    assert reading() == []


# Reading what was published


def test_an_output_in_a_bucket_is_verified_against_base_and_adapter_there(
    there: tuple[str, str], proxy: Proxy, team: str, tmp_path: Path
) -> None:
    out = f"s3://{BUCKET}/{team}/out"
    convert(*there, out, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    stages: set[str] = set()

    found = verify(out, *there, require_receipt=True, progress=lambda progress: stages.add(progress.stage))

    assert found.is_good
    assert found.recomputed == len(list(plan_conversion(*there).plan.tensors()))
    assert {"fetching", "reading", "comparing"} <= stages
    assert reading() == []
    with pytest.raises(Undecided, match="give `adapter`"):
        verify(out, compare=True)


def test_a_byte_that_was_changed_in_the_bucket_is_found(
    there: tuple[str, str], server: BucketServer, proxy: Proxy, team: str, tmp_path: Path
) -> None:
    import obstore

    convert(*there, f"s3://{BUCKET}/{team}/out", SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    files = server.contents(f"{team}/out")
    name = max(files, key=lambda name: len(files[name]))
    obstore.put(server.store(f"{team}/out"), name, files[name][:-1] + bytes([files[name][-1] ^ 1]))

    found = verify(f"s3://{BUCKET}/{team}/out")

    assert [problem.partition("…")[0][:-13] for problem in found.problems] == [f"{name}: sha256"]


def test_an_output_in_a_bucket_is_evaluated_as_its_folder(
    tiny_base: Path, tiny_adapter: Path, proxy: Proxy, server: BucketServer, team: str, tmp_path: Path
) -> None:
    out = convert(tiny_base, tiny_adapter, tmp_path / "out").out
    (tmp_path / "text").write_text("def main() -> None:\n    return None\n" * 20)
    addresses = [upload(server, folder, team) for folder in (out, tiny_base, tiny_adapter)]

    found = evaluate(addresses[0], tmp_path / "text", addresses[1], addresses[2], max_tokens=100)

    assert found == evaluate(out, tmp_path / "text", tiny_base, tiny_adapter, max_tokens=100)
    assert found.comparison is not None
    assert reading() == []
