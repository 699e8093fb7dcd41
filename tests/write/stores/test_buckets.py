"""OUT in a bucket, of a real S3 server: the bytes of a folder, all or nothing, whatever happens on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from converter import Gates, convert, plan_conversion, verify
from converter.errors import BadOutput, ConverterError, GateFailed, StoreFailed, StoreRefused
from converter.seal.receipt import RECEIPT
from converter.write.journal import Upload
from converter.write.stores.bucket import Bucket
from converter.write.stores.reading import small_file
from tests.bucket_proxy import Proxy, place_of_its_own
from tests.bucket_server import BUCKET, SECRET, BucketServer, use
from tests.folders import contents
from tests.write.stores.settings import ONE_THREAD, SHARDS, SMALL_SHARDS


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """A place of the test's own."""
    return f"s3://{BUCKET}/team/{place_of_its_own(request.node.name)}"


def prefix(address: str) -> str:
    return address.removeprefix(f"s3://{BUCKET}/")


def visible(server: BucketServer, address: str) -> set[str]:
    """What a reader may see as a part of a model: not what waits."""
    return {name for name in server.names(prefix(address)) if not name.startswith(".partial/")}


def run(address: str, inputs: tuple[Path, Path], work: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    base, adapter = map(str, inputs)
    arguments = ["--base", base, "--adapter", adapter, "--out", address, "--work", str(work), "--max-shard-size", "1MB"]
    command = [sys.executable, "-m", "converter", *arguments, "--threads", "1", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_an_output_in_a_bucket_has_the_bytes_of_one_in_a_folder(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    report = convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert server.contents(prefix(address)) == whole
    assert report.store is not None
    assert (report.store.address, report.label) == (address, address)
    assert report.output_bytes == sum(len(raw) for name, raw in whole.items() if name.endswith(".safetensors"))
    assert list((tmp_path / "work").iterdir()) == []
    config = [at for at, (method, path) in enumerate(proxy.log) if (method, path[-12:]) == ("PUT", "/config.json")]
    last = max(at for at, (method, path) in enumerate(proxy.log) if method == "PUT")
    assert config == [last]
    assert small_file(address, RECEIPT) == whole[RECEIPT]
    with pytest.raises(StoreRefused, match=r"has no other.json, so nothing tells that this tool made it"):
        small_file(address, "other.json")


def test_what_is_there_already_is_not_made_again(
    inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    proxy.log.clear()

    report = convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "elsewhere")

    assert report.nothing_to_do
    assert {method for method, _ in proxy.log} <= {"GET", "HEAD"}
    assert plan_conversion(*inputs, address, SMALL_SHARDS).nothing_to_do


def test_another_conversion_is_replaced_only_if_the_user_says_so(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    convert(inputs[0], None, address, work=tmp_path / "work")  # in one shard, which has another name
    before = server.contents(prefix(address))

    with pytest.raises(BadOutput, match="holds another conversion; `overwrite` replaces it"):
        convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")
    assert server.contents(prefix(address)) == before

    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", overwrite=True)
    assert server.contents(prefix(address)) == whole


def test_what_somebody_else_has_there_is_never_touched(
    inputs: tuple[Path, Path], server: BucketServer, proxy: Proxy, address: str
) -> None:
    import obstore

    obstore.put(server.store(prefix(address)), "model.safetensors", b"precious")

    with pytest.raises(BadOutput, match=r"'model.safetensors', and nothing says that this tool made it"):
        convert(*inputs, address, SMALL_SHARDS, overwrite=True)

    assert server.contents(prefix(address)) == {"model.safetensors": b"precious"}


def test_a_killed_run_leaves_nothing_to_be_seen_and_the_next_one_sends_only_the_rest(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    killed = run(address, inputs, tmp_path / "work")
    proxy.before = when(3, "PUT", "/.partial/", lambda: killed.send_signal(signal.SIGKILL))
    assert killed.wait(120) == -signal.SIGKILL
    proxy.before = None
    assert visible(server, address) == set()
    first = sent(proxy)
    assert len(first) >= 2
    proxy.log.clear()

    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert server.contents(prefix(address)) == whole
    assert len(sent(proxy)) <= SHARDS - 2
    assert len(first | sent(proxy)) == SHARDS


@pytest.mark.slow
@pytest.mark.parametrize("at", ["conversion.json", "model-00002-of-00004.safetensors", "config.json"])
def test_a_run_that_is_killed_while_it_publishes_leaves_no_checkpoint_and_is_resumed(
    at: str,
    inputs: tuple[Path, Path],
    whole: dict[str, bytes],
    server: BucketServer,
    proxy: Proxy,
    address: str,
    tmp_path: Path,
) -> None:
    killed = run(address, inputs, tmp_path / "work")
    proxy.before = when(1, "PUT", f"/{at}", lambda: killed.send_signal(signal.SIGKILL))
    assert killed.wait(120) == -signal.SIGKILL
    proxy.before = None
    assert "config.json" not in visible(server, address)
    proxy.log.clear()

    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert server.contents(prefix(address)) == whole
    assert sent(proxy) == set()


def test_a_missed_gate_publishes_nothing_and_a_weaker_one_needs_no_second_upload(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed) as failed:
        convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", gates=Gates(max_error=0.01))
    assert failed.value.exit_code == 4
    assert visible(server, address) == set()
    assert len(sent(proxy)) == SHARDS
    proxy.log.clear()

    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", gates=Gates(max_error=0.5))

    assert server.contents(prefix(address)) == whole
    assert sent(proxy) == set()


def test_a_shard_that_the_bucket_has_lost_is_made_again(
    inputs: tuple[Path, Path], whole: dict[str, bytes], server: BucketServer, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    import obstore

    with pytest.raises(GateFailed):
        convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", gates=Gates(max_error=0.01))
    lost = min(server.names(prefix(address)))
    obstore.delete(server.store(prefix(address)), lost)
    proxy.log.clear()

    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert server.contents(prefix(address)) == whole
    assert {name.rpartition("/")[2] for name in sent(proxy)} == {lost.rpartition("/")[2]}


def test_two_shards_at_most_lie_on_this_disk(
    inputs: tuple[Path, Path], whole: dict[str, bytes], proxy: Proxy, address: str, tmp_path: Path
) -> None:
    most = 0

    def measure(_: object) -> None:
        nonlocal most
        most = max(most, sum(taken(path) for path in (tmp_path / "work").rglob("*.safetensors*")))

    plan = plan_conversion(*inputs, address, SMALL_SHARDS, ONE_THREAD)
    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work", progress=measure)

    sizes = sorted(shard.layout.size for shard in plan.plan.shards)
    thin = 100_000  # the small tensors of the shards that are gone
    assert sizes[0] < most <= sum(sizes[-2:]) + thin
    assert most < sum(sizes) - thin


def taken(path: Path) -> int:
    """Bytes of the disk that a file takes; a file may be gone meanwhile."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def test_a_disk_budget_below_one_shard_is_refused_and_says_what_helps(
    inputs: tuple[Path, Path], proxy: Proxy, address: str
) -> None:
    with pytest.raises(
        BadOutput, match=r"`disk` is 100,000,000 bytes.*give at least [0-9,]+, or a smaller `max_shard_size`"
    ):
        plan_conversion(*inputs, address, SMALL_SHARDS, disk=100_000_000)

    assert plan_conversion(*inputs, address, SMALL_SHARDS, disk=200_000_000).disk is not None


@pytest.mark.parametrize("fault", [500, 503, "drop"])
def test_a_server_that_fails_for_a_while_is_asked_again(
    fault: int | str,
    inputs: tuple[Path, Path],
    whole: dict[str, bytes],
    server: BucketServer,
    proxy: Proxy,
    address: str,
    tmp_path: Path,
) -> None:
    left = 3

    def fail(method: str, path: str) -> int | str | None:
        nonlocal left
        if method in ("PUT", "HEAD") and left:
            left -= 1
            return fault
        return None

    proxy.before = fail
    convert(*inputs, address, SMALL_SHARDS, ONE_THREAD, work=tmp_path / "work")

    assert left == 0
    assert server.contents(prefix(address)) == whole


def test_a_server_that_is_gone_ends_the_try_after_a_while(proxy: Proxy, address: str, tmp_path: Path) -> None:
    bucket = Bucket("s3", address.removeprefix("s3://"), patience=timedelta(seconds=1))
    (tmp_path / "shard").write_bytes(b"1234")
    proxy.before = lambda *_: "drop"

    with pytest.raises(StoreFailed, match=r"shard: .*: check the connection, and AWS_ACCESS_KEY_ID") as failed:
        bucket.take(Upload("shard", 4, "0" * 64), tmp_path / "shard")

    assert failed.value.resumable
    assert SECRET not in str(failed.value)


def test_a_wrong_key_is_refused_before_anything_is_made_and_never_repeated(
    inputs: tuple[Path, Path], server: BucketServer, monkeypatch: pytest.MonkeyPatch, address: str, tmp_path: Path
) -> None:
    use(monkeypatch, server.environment(secret="another-secret"))

    with pytest.raises(StoreRefused, match="check keys and rights") as refused:
        convert(*inputs, address, SMALL_SHARDS, work=tmp_path / "work")

    assert "another-secret" not in str(refused.value)
    assert not (tmp_path / "work").exists()


def test_no_file_of_an_output_has_the_key(whole: dict[str, bytes], server: BucketServer) -> None:
    there = {name: raw for name, raw in server.contents("team").items() if not name.endswith(".safetensors")}

    assert there
    assert not [name for name, raw in there.items() if SECRET.encode() in raw]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://bucket", "give a bucket and a folder in it, such as s3://bucket/model"),
        ("s3://key:secret@bucket/model", "an address holds no key and no settings"),
        ("s3://bucket/model?secret=1", "an address holds no key and no settings"),
        ("s3://bucket/../model", "give a bucket and a folder in it"),
        ("ftp://bucket/model", "not a store that is known; give a folder, or hf://ORG/NAME"),
        ("file://elsewhere/model", "not a file of this machine"),
    ],
)
def test_an_address_that_is_none_is_refused_by_name(place: str, said: str, inputs: tuple[Path, Path]) -> None:
    with pytest.raises(StoreRefused) as refused:
        plan_conversion(*inputs, place)

    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_file_address_is_a_folder(inputs: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    convert(*inputs, f"file://{tmp_path}/with%20space", SMALL_SHARDS, ONE_THREAD)

    assert contents(tmp_path / "with space") == whole


def test_verify_says_which_stores_are_known() -> None:
    with pytest.raises(StoreRefused, match="ftp://bucket/model: not a store that is known; give a folder, or hf://"):
        verify("ftp://bucket/model")


def test_what_belongs_to_a_store_is_refused_for_a_folder(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConverterError, match="`create_pr` and `work` go with an OUT in a store"):
        convert(*inputs, tmp_path / "out", work=tmp_path / "work")


def sent(proxy: Proxy) -> set[str]:
    """The shards that were sent, by the names under which they wait."""
    return {path.partition("?")[0] for method, path in proxy.log if method == "PUT" and "/.partial/" in path}


def when(number: int, method: str, path: str, action: Callable[[], None]) -> Callable[[str, str], str | None]:
    """Do something at the n-th request of a kind, which then never arrives."""
    seen: set[str] = set()

    def before(asked: str, where: str) -> str | None:
        where = where.partition("?")[0]
        if asked == method and path in where and where not in seen:
            seen.add(where)
            if len(seen) == number:
                action()
                return "drop"
        return None

    return before
