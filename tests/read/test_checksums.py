"""Bases and adapters whose sha256 somebody states, and bits that are not what they were."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from converter import Job, convert, convert_batch, plan_conversion
from converter.cli.main import main
from converter.errors import BadAdapter, BadCheckpoint, InputChanged, Interrupted, ReadFailed
from converter.observer import Progress
from converter.plan.inputs import Base
from converter.read.cache import cache_folder
from converter.read.checksums import MAX_SUMS_BYTES, Hashing, Stated, read_sums, remembered_sha256, stated
from converter.read.folder import PIECE, LocalFolder
from tests.folders import contents, copy, flip_bit, write_sums
from tests.hub_server import StandInHub, sha256
from tests.models import save_adapter, save_originals

SHARD, WEIGHTS, SUMS = "model.safetensors", "adapter_model.safetensors", "SHA256SUMS"
ZEROS, ONES = "0" * 64, "1" * 64


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """base, sharded and adapter, to be changed."""
    return copy(originals, tmp_path / "place")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many bytes were read of each file, by its name; in the Hub's cache that is its digest."""
    counted: Counter[str] = Counter()
    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        done = preadv(descriptor, buffers, offset)
        counted[Path(f"/proc/self/fd/{descriptor}").readlink().name] += done
        return done

    monkeypatch.setattr(os, "preadv", count)
    return counted


def sha256_of(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def shards_of(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def nothing_is_left_of(out: Path) -> bool:
    return not out.exists() and not out.with_name(f"{out.name}.partial").exists()


# SHA256SUMS beside the base


def test_a_flipped_bit_in_a_base_with_sums_is_refused_with_the_files_name_and_nothing_is_written(
    place: Path, capfd: pytest.CaptureFixture[str], signal_handlers: None
) -> None:
    base = place / "sharded"
    write_sums(base)
    shard = shards_of(base)[1]
    flip_bit(shard)

    with pytest.raises(SystemExit) as ended:
        main([f"--base={base}", f"--adapter={place / 'adapter'}", f"--out={place / 'out'}"])

    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert said.startswith(f"error: {shard}: its sha256 is {sha256(shard)[:12]}…, expected ")
    assert "by SHA256SUMS: the file is damaged, or another than was meant there; get it anew" in said
    assert nothing_is_left_of(place / "out")


def test_without_sums_a_flipped_bit_makes_another_model(place: Path) -> None:
    whole = convert(place / "base", None, place / "whole")
    flip_bit(place / "base" / SHARD)

    other = convert(place / "base", None, place / "out")

    assert whole.checked == other.checked == {"base": {}, "adapter": {}}
    assert other.fingerprint != whole.fingerprint


def test_a_base_that_is_as_its_sums_say_is_converted_to_the_same_bytes_and_said_to_be_checked(place: Path) -> None:
    convert(place / "sharded", place / "adapter", place / "whole")
    write_sums(place / "sharded")
    write_sums(place / "adapter")

    report = convert(place / "sharded", place / "adapter", place / "out")

    shards = {shard.name: SUMS for shard in shards_of(place / "sharded")}
    assert report.checked == {"base": shards, "adapter": {WEIGHTS: SUMS}}
    assert contents(place / "out") == contents(place / "whole")


def test_a_base_is_read_for_its_sha256_once(place: Path, read: Counter[str]) -> None:
    size = (place / "base" / SHARD).stat().st_size
    convert(place / "base", None, place / "unchecked")
    without = read[SHARD]
    write_sums(place / "base")

    read.clear()
    convert(place / "base", None, place / "first")
    assert read[SHARD] == without + size

    read.clear()
    convert(place / "base", None, place / "second")
    assert read[SHARD] == without


@pytest.mark.parametrize("change", ["written to, its time put back", "replaced by a copy"])
def test_a_file_that_may_be_another_is_read_again(change: str, place: Path, read: Counter[str]) -> None:
    shard = place / "base" / SHARD
    write_sums(place / "base")
    convert(place / "base", None, place / "first")
    before = shard.stat()
    if change == "replaced by a copy":
        shutil.copy2(shard, place / "copy")
        (place / "copy").rename(shard)
    else:
        flip_bit(shard)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (shard.stat().st_mtime_ns, shard.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        with pytest.raises(BadCheckpoint, match="its sha256 is"):
            convert(place / "base", None, place / "second")
        return

    read.clear()
    convert(place / "base", None, place / "second")
    assert read[SHARD] > before.st_size * 2


def test_a_damaged_file_is_remembered_as_damaged_and_not_read_again(place: Path, read: Counter[str]) -> None:
    write_sums(place / "base")
    flip_bit(place / "base" / SHARD)
    for most in (2, 0.5):
        read.clear()
        with pytest.raises(BadCheckpoint, match="its sha256 is"):
            convert(place / "base", None, place / "out")
        assert read[SHARD] < most * (place / "base" / SHARD).stat().st_size


def test_where_nothing_can_be_remembered_it_is_read_each_time(
    place: Path, read: Counter[str], cold_cache: Path
) -> None:
    cold_cache.mkdir()
    cache_folder().write_text("a file where the folder should be")
    write_sums(place / "base")
    size = (place / "base" / SHARD).stat().st_size
    for out in ("first", "second"):
        read.clear()
        assert convert(place / "base", None, place / out).checked["base"] == {SHARD: SUMS}
        assert read[SHARD] > 2 * size


@pytest.mark.parametrize(
    "remembered",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"model.safetensors": 1}', b'{"model.safetensors": {"file": [1]}}'],
)
def test_what_cannot_be_understood_of_what_was_remembered_is_not_believed(remembered: bytes, place: Path) -> None:
    write_sums(place / "base")
    convert(place / "base", None, place / "first")
    (file,) = (cache_folder() / "sha256").iterdir()
    file.write_bytes(remembered)
    assert convert(place / "base", None, place / "second").checked["base"] == {SHARD: SUMS}


def test_a_list_that_has_some_of_the_files_is_held_against_these(place: Path) -> None:
    base = place / "sharded"
    first, second = shards_of(base)[:2]
    (base / SUMS).write_text(f"{sha256(first)}  {first.name}\n")
    flip_bit(second)

    assert convert(base, None, place / "out").checked["base"] == {first.name: SUMS}

    flip_bit(first)
    with pytest.raises(BadCheckpoint, match=first.name):
        convert(base, None, place / "other")


def test_a_dry_run_reads_no_more_of_a_base_because_of_its_sums(place: Path, read: Counter[str]) -> None:
    plan_conversion(place / "base", None)
    without = read[SHARD]
    write_sums(place / "base")
    flip_bit(place / "base" / SHARD)

    read.clear()
    plan_conversion(place / "base", None, place / "out")

    assert read[SHARD] == without


def test_a_dry_run_foretells_the_time_of_the_check_until_it_is_made(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def foretold() -> float:
        return plan_conversion(place / "base", place / "adapter").estimate.check

    without = foretold()
    write_sums(place / "base")
    before = foretold()
    with pytest.raises(SystemExit):
        main(["--base", str(place / "base"), "--adapter", str(place / "adapter"), "--out", "z", "--dry-run"])
    assert "; before them the sha256 of the base, " in capsys.readouterr().out
    convert(place / "base", place / "adapter", place / "out")

    assert (without, foretold()) == (0, 0)
    assert before > 0


def test_a_dry_run_refuses_sums_that_the_conversion_would_refuse(place: Path) -> None:
    (place / "base" / "SHA256SUMS").write_text("nonsense\n")

    with pytest.raises(BadCheckpoint, match="SHA256SUMS: line 1"):
        plan_conversion(place / "base", place / "adapter")


def test_checking_is_a_stage_of_the_progress(place: Path) -> None:
    write_sums(place / "sharded")
    seen: list[Progress] = []

    convert(place / "sharded", None, place / "out", progress=seen.append)

    stages = list(dict.fromkeys(one.stage for one in seen))
    assert stages == ["checking", "converting", "sealing"]
    total = sum(shard.stat().st_size for shard in shards_of(place / "sharded"))
    last = [one for one in seen if one.stage == "checking"][-1]
    assert (last.done, last.total, last.name) == (total, total, shards_of(place / "sharded")[-1].name)

    seen.clear()
    convert(place / "sharded", None, place / "again", progress=seen.append)
    assert "checking" not in {one.stage for one in seen}


def test_a_signal_ends_it_before_anything_is_written(place: Path) -> None:
    write_sums(place / "base")

    with pytest.raises(Interrupted, match=f"SIGTERM while the sha256 of {SHARD} was checked") as ended:
        convert(place / "base", None, place / "out", stop=lambda: signal.SIGTERM)

    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert nothing_is_left_of(place / "out")


def test_a_file_that_is_written_to_while_others_are_checked_is_refused(place: Path) -> None:
    base = place / "sharded"
    write_sums(base)
    first = shards_of(base)[0]

    def write(progress: Progress) -> None:
        if progress.stage == "checking" and progress.name != first.name:
            os.utime(first)

    with pytest.raises(InputChanged, match=f"{first.name}: changed while it was being read"):
        convert(base, None, place / "out", progress=write)
    assert nothing_is_left_of(place / "out")


def test_a_file_that_takes_the_place_of_one_that_is_open_is_refused(place: Path) -> None:
    write_sums(place / "base")
    base = Base(place / "base")
    shutil.copy(place / "base" / SHARD, place / "copy")
    (place / "copy").rename(place / "base" / SHARD)

    with pytest.raises(InputChanged, match=SHARD):
        base.bring(lambda *_: None)


def test_a_disk_that_fails_while_the_sha256_is_taken_is_no_damaged_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(place / "base")
    preadv = os.preadv

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0 and len(buffers[0]) > 1_000:  # more than a header's length: the file is read whole
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadFailed, match=f"{SHARD}: reading at byte 0: Input/output error"):
        convert(place / "base", None, place / "out")


# What SHA256SUMS may look like


def sums_of(folder: Path, raw: str | bytes) -> dict[str, str]:
    (folder / SUMS).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with closing(LocalFolder(folder)) as opened:
        return read_sums(opened)


@pytest.mark.parametrize("options", [[], ["--binary"], ["--tag"]], ids=lambda options: " ".join(options) or "plain")
def test_what_sha256sum_writes_is_understood(options: list[str], place: Path) -> None:
    for name in ("back\\slash", "line\nbreak", "a  b", "権"):
        (place / "sharded" / name).write_text(name)
    names = sorted(os.listdir(place / "sharded"))
    written = subprocess.run(["sha256sum", *options, *names], cwd=place / "sharded", capture_output=True, check=True)

    found = sums_of(place / "sharded", written.stdout)

    expected = {name: sha256(place / "sharded" / name) for name in names if "\\" not in name and "\n" not in name}
    assert found == expected


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("", {}),
        (f"# made by hand\n\n{ZEROS}  a\n", {"a": ZEROS}),
        (f"{ZEROS}  a\r\n{ONES} *b\r\n", {"a": ZEROS, "b": ONES}),
        (f"{ZEROS}  a", {"a": ZEROS}),
        (f"{'A' * 64}  a\n", {"a": "a" * 64}),
        (f"{ZEROS}  ./a\n", {"a": ZEROS}),
        (f"{ZEROS}  a\n{ZEROS}  a\n", {"a": ZEROS}),
        (f"{ZEROS}  nobody/a\n{ZEROS}  ../a\n{ZEROS}  /etc/passwd\n{ZEROS}  ./../a\n", {}),
        (f"{ZEROS}  .\n{ONES}  ..\n", {".": ZEROS, "..": ONES}),
        (f"{ZEROS}  ".encode() + b"\xff\n", {"\udcff": ZEROS}),
    ],
)
def test_rows_are_names_to_be_looked_up_and_those_of_other_folders_nobodys_business(
    raw: str | bytes, found: dict[str, str], tmp_path: Path
) -> None:
    assert sums_of(tmp_path, raw) == found


@pytest.mark.parametrize(
    "row",
    [
        "not a sum",
        f"{ZEROS[:-1]}  a",
        f"{ZEROS}0  a",
        f"{'g' * 64}  a",
        f"{ZEROS} a",
        f"{ZEROS}\ta",
        f"{ZEROS}  ",
        ZEROS,
        f"{ZEROS}  a\0{ONES}  b\0",
        f"MD5 (a) = {'0' * 32}",
        f"SHA256 (a) = {ZEROS} and more",
        "-----BEGIN PGP SIGNED MESSAGE-----",
        "<html>not found</html>",
        "\x1b[2J\u202e",
        "x" * 100_000,
    ],
)
def test_a_row_that_sha256sum_does_not_write_is_refused_by_its_number(row: str, place: Path) -> None:
    (place / "base" / SUMS).write_text(f"{ONES}  config.json\n{row}\n")

    with pytest.raises(BadCheckpoint, match=r"SHA256SUMS: line 2 is .*, expected a sha256, two spaces") as refused:
        convert(place / "base", None, place / "out")

    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600
    assert nothing_is_left_of(place / "out")


def test_two_sums_of_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="line 3 states another sha256 of 'a' than a line before"):
        sums_of(tmp_path, f"{ZEROS}  a\n{ZEROS}  b\n{ONES}  ./a\n")


def test_sums_without_end_are_refused_unread(place: Path, read: Counter[str]) -> None:
    with (place / "base" / SUMS).open("wb") as file:
        file.truncate(10_000_000_000)
    with pytest.raises(
        BadCheckpoint, match=f"SHA256SUMS has 10,000,000,000 bytes, expected at most {MAX_SUMS_BYTES:,}"
    ):
        convert(place / "base", None, place / "out")
    assert read[SUMS] == 0


def test_sums_of_files_that_are_absent_are_of_no_interest(place: Path) -> None:
    write_sums(place / "base", f"{ZEROS}  model-00002-of-00002.safetensors", f"{ONES}  ../adapter/{WEIGHTS}")
    assert convert(place / "base", place / "adapter", place / "out").checked == {
        "base": {SHARD: SUMS},
        "adapter": {},
    }


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), Path.mkdir])
def test_sums_that_are_no_file_of_the_folder_are_not_opened(plant: Callable[[Path], object], place: Path) -> None:
    plant(place / "base" / SUMS)
    assert convert(place / "base", None, place / "out").checked["base"] == {}


# Adapters


def test_a_flipped_bit_in_an_adapter_with_sums_is_refused_as_the_adapters(place: Path) -> None:
    write_sums(place / "adapter")
    flip_bit(place / "adapter" / WEIGHTS)

    for action in (convert, plan_conversion):
        with pytest.raises(BadAdapter, match=f"{WEIGHTS}: its sha256 is .* by SHA256SUMS"):
            action(place / "base", place / "adapter", place / "out")

    assert nothing_is_left_of(place / "out")


def test_an_adapters_sums_that_cannot_be_read_are_the_adapters_fault(place: Path) -> None:
    (place / "adapter" / SUMS).write_text("nonsense\n")
    with pytest.raises(BadAdapter, match="SHA256SUMS: line 1"):
        convert(place / "base", place / "adapter", place / "out")


# Batches


def test_a_batch_reads_the_base_for_its_sha256_once(place: Path, read: Counter[str]) -> None:
    save_adapter(place / "other", place / "base", "llama", scale=0.05)
    jobs = [Job(place / "out" / name, place / name, place / "base") for name in ("adapter", "other")]
    convert_batch([Job(place / "unchecked" / job.out.name, job.adapter, job.base) for job in jobs])
    without = read[SHARD]
    write_sums(place / "base")

    read.clear()
    outcomes = convert_batch(jobs)

    assert [outcome.status for outcome in outcomes] == ["made", "made"]
    assert [outcome.checked["base"] for outcome in outcomes] == [{SHARD: SUMS}] * 2
    # Its tensors' digests, which were learnt without the sums, are of the same file.
    assert read[SHARD] == without + (place / "base" / SHARD).stat().st_size


def test_in_a_batch_a_damaged_base_refuses_its_jobs_and_no_other(place: Path) -> None:
    damaged = copy(place / "base", place / "damaged")
    write_sums(damaged)
    flip_bit(damaged / SHARD)
    bases = [damaged, place / "base", damaged]
    jobs = [Job(place / "out" / str(number), place / "adapter", base) for number, base in enumerate(bases)]

    outcomes = convert_batch(jobs)

    assert [outcome.status for outcome in outcomes] == ["refused", "made", "refused"]
    assert all("its sha256 is" in outcomes[number].message for number in (0, 2))
    assert sorted(os.listdir(place / "out")) == ["1"]


def test_in_a_batch_a_damaged_adapter_refuses_its_job_and_no_other(place: Path) -> None:
    damaged = copy(place / "adapter", place / "damaged")
    write_sums(damaged)
    flip_bit(damaged / WEIGHTS)
    jobs = [Job(place / "out" / name, place / name, place / "base") for name in ("damaged", "adapter")]

    outcomes = convert_batch(jobs)

    assert [outcome.status for outcome in outcomes] == ["refused", "made"]
    assert os.listdir(place / "out") == ["adapter"]


# The Hub


@pytest.fixture
def hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({"maker/base": place / "sharded", "maker/adapter": place / "adapter"}) as server:
        server.use(monkeypatch, tmp_path / "hub-cache")
        monkeypatch.chdir(tmp_path)
        yield server


def test_what_is_fetched_from_the_hub_is_held_against_what_the_hub_says(hub: StandInHub, place: Path) -> None:
    report = convert("maker/base", "maker/adapter", place / "out")

    shards = {shard.name: "the Hub" for shard in shards_of(place / "sharded")}
    assert report.checked == {"base": shards, "adapter": {WEIGHTS: "the Hub"}}


def test_a_bit_that_flips_on_the_way_is_refused_until_the_file_is_removed_that_the_message_names(
    hub: StandInHub, place: Path
) -> None:
    shard = shards_of(place / "sharded")[1]
    hub.flips[shard.name] = shard.stat().st_size - 1
    with pytest.raises(BadCheckpoint, match=f"{shard.name}: its sha256 is .* by the Hub: the file is damaged; remove"):
        convert("maker/base", None, place / "out")
    assert not (place / "out").exists()

    # The Hub's library takes what its cache has for what it should be.
    hub.flips.clear()
    hub.log.clear()
    with pytest.raises(BadCheckpoint) as refused:
        convert("maker/base", None, place / "out")
    # Its header is read from there, and that is all.
    assert [request.method for request in hub.asked(shard.name)].count("GET") == 1

    blob = Path(str(refused.value).partition("remove ")[2].partition(", and")[0])
    assert blob.name == sha256(shard)
    blob.unlink()
    assert convert("maker/base", None, place / "out").checked["base"][shard.name] == "the Hub"
    assert contents(place / "out") == contents(convert("maker/base", None, place / "again").out)


def test_a_bit_that_flips_on_an_adapters_way_is_the_adapters(hub: StandInHub, place: Path) -> None:
    hub.flips[WEIGHTS] = (place / "adapter" / WEIGHTS).stat().st_size - 1
    with pytest.raises(BadAdapter, match=f"{WEIGHTS}: its sha256 is .* by the Hub"):
        convert("maker/base", "maker/adapter", place / "out")


def test_shards_are_hashed_as_they_arrive_and_not_again(hub: StandInHub, place: Path, read: Counter[str]) -> None:
    sizes = {sha256(shard): shard.stat().st_size for shard in shards_of(place / "sharded")}
    convert("maker/base", None, place / "first")
    first = {name: read[name] for name in sizes}

    read.clear()
    convert("maker/base", None, place / "second")

    assert {name: first[name] - read[name] for name in sizes} == sizes


def test_a_dry_run_of_a_base_on_the_hub_checks_nothing(hub: StandInHub, place: Path) -> None:
    for shard in shards_of(place / "sharded"):
        hub.flips[shard.name] = shard.stat().st_size - 1
    assert plan_conversion("maker/base", None).plan.shards


@pytest.mark.parametrize("how", ["by its id", "by the path of its snapshot"])
def test_a_flipped_bit_in_the_cache_is_refused_offline(how: str, hub: StandInHub, place: Path) -> None:
    base = Base("maker/base")
    base.fetch()
    snapshot = base.checkpoint.folder.path  # type: ignore[attr-defined]
    reference = "maker/base" if how == "by its id" else snapshot
    by = "the Hub" if how == "by its id" else "the Hub's cache"
    hub.log.clear()
    shards = [shard.name for shard in shards_of(place / "sharded")]
    assert convert(reference, None, place / "good", offline=True).checked["base"] == dict.fromkeys(shards, by)

    flip_bit(snapshot / shards[0])
    with pytest.raises(BadCheckpoint, match=f"{shards[0]}: its sha256 is .* by {by}: "):
        convert(reference, None, place / "out", offline=True)
    assert nothing_is_left_of(place / "out")
    assert not hub.log


def in_a_cache(folder: Path, blob: str, raw: bytes) -> LocalFolder:
    """A snapshot with one file, which links to a blob of this name."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / blob).write_bytes(raw)
    snapshot = folder / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / SHARD).symlink_to(Path("..", "..", "blobs", blob))
    return LocalFolder(snapshot)


@pytest.mark.parametrize(("blob", "is_one"), [(ONES, True), ("1" * 40, False), ("1" * 63, False), ("G" * 64, False)])
def test_only_blobs_with_the_name_of_a_sha256_are_known_by_it(blob: str, is_one: bool, tmp_path: Path) -> None:
    with closing(in_a_cache(tmp_path, blob, b"raw")) as folder:
        assert stated(folder, [SHARD]) == ({SHARD: Stated(ONES, "the Hub's cache")} if is_one else {})


def test_the_hub_is_asked_first_then_its_cache_then_the_list(tmp_path: Path) -> None:
    with closing(in_a_cache(tmp_path, ONES, b"raw")) as folder:
        (folder.path / SUMS).write_text(f"{ZEROS}  {SHARD}\n")
        assert stated(folder, [SHARD], {SHARD: f"sha256:{'2' * 64}"}) == {SHARD: Stated("2" * 64, "the Hub")}
        assert stated(folder, [SHARD], {SHARD: f"git-sha1:{'2' * 40}"}) == {SHARD: Stated(ONES, "the Hub's cache")}
        (folder.path / SUMS).write_text("nonsense, which nobody needs")
        assert stated(folder, [SHARD]) == {SHARD: Stated(ONES, "the Hub's cache")}


def test_a_blob_that_repositories_share_is_known_by_the_link_to_it(tmp_path: Path) -> None:
    # With hf_xet, the file lies in <cache>/blobs/<2 digits>/<another hash>, and the repository's blob is a link to it.
    with closing(in_a_cache(tmp_path / "repository", sha256_of(b"raw"), b"raw")) as folder:
        blob = (folder.path / SHARD).resolve()
        shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
        shared.parent.mkdir(parents=True)
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
        known = stated(folder, [SHARD])
        assert known == {SHARD: Stated(sha256_of(b"raw"), "the Hub's cache")}
        with Hashing() as hashing:
            hashing.check(folder, known)
        flip_bit(shared)
        with pytest.raises(BadCheckpoint, match=f"remove {shared}, and it"), Hashing() as hashing:
            hashing.check(folder, known)


# Folders that the Hub's own program filled


@pytest.fixture
def downloaded(hub: StandInHub, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base, as `hf download maker/base --local-dir` leaves it."""
    for file in sorted((place / "sharded").iterdir()):
        hf_hub_download("maker/base", file.name, local_dir=place / "downloaded")
    return place / "downloaded"


def record_of(file: Path) -> Path:
    return file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"


def test_a_folder_that_was_downloaded_is_held_against_what_the_hub_stated_then(downloaded: Path, place: Path) -> None:
    shards = shards_of(downloaded)
    by = dict.fromkeys((shard.name for shard in shards), "the record of hf download")
    assert convert(downloaded, None, place / "good").checked["base"] == by

    before = shards[0].stat()
    flip_bit(shards[0])
    os.utime(shards[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BadCheckpoint, match=f"{shards[0].name}: its sha256 is .* by the record of hf download: "):
        convert(downloaded, None, place / "out")


def test_the_record_says_nothing_of_a_file_that_was_written_to_later(downloaded: Path, place: Path) -> None:
    shard = shards_of(downloaded)[0]
    flip_bit(shard)
    os.utime(shard, (shard.stat().st_atime, shard.stat().st_mtime + 60))
    checked = convert(downloaded, None, place / "out").checked["base"]
    assert sorted(checked) == [other.name for other in shards_of(downloaded)[1:]]


@pytest.mark.parametrize(
    "record", [b"", b"x" * 20_000, b"\xff\n\xff\n\xff\n", f"{'0' * 40}\n{ZEROS}\nlate\n".encode(), b"a\nb\n9e99\n"]
)
def test_a_record_that_the_library_did_not_write_tells_nothing(record: bytes, downloaded: Path) -> None:
    shard = shards_of(downloaded)[0]
    record_of(shard).write_bytes(record)
    with closing(LocalFolder(downloaded)) as folder:
        assert stated(folder, [shard.name]) == {}


@pytest.mark.parametrize("what", ["the record", "the folder of records", "the folder around it"])
def test_no_link_to_a_record_is_followed(what: str, downloaded: Path, place: Path) -> None:
    shard = shards_of(downloaded)[0]
    linked = {
        "the record": record_of(shard),
        "the folder of records": record_of(shard).parent,
        "the folder around it": downloaded / ".cache",
    }[what]
    linked.rename(place / "elsewhere")
    linked.symlink_to(place / "elsewhere")
    with closing(LocalFolder(downloaded)) as folder:
        assert stated(folder, [shard.name]) == {}


@pytest.mark.parametrize("name", [".cache", ".cache/huggingface", ".cache/huggingface/download"])
@pytest.mark.parametrize("target", ["x" * 300, "/proc/self/fd/0", "."])
def test_a_link_that_can_not_be_followed_is_no_record(name: str, target: str, downloaded: Path) -> None:
    shutil.rmtree(downloaded / name)
    (downloaded / name).symlink_to(target)
    with closing(LocalFolder(downloaded)) as folder:
        assert stated(folder, [shards_of(downloaded)[0].name]) == {}


# The thing itself


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_the_sha256_of_pieces_is_that_of_the_whole(size: int, tmp_path: Path) -> None:
    raw = os.urandom(size)
    (tmp_path / "file").write_bytes(raw)
    with closing(LocalFolder(tmp_path)) as folder, Hashing() as hashing:
        hashing.check(folder, {"file": Stated(sha256_of(raw), "somebody")})
        with pytest.raises(BadCheckpoint):
            hashing.check(folder, {"file": Stated(ZEROS, "somebody")})


def test_leaving_it_ends_the_reading_of_what_nobody_waits_for(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}).encode()
    with (tmp_path / SHARD).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 10**12)
    with closing(LocalFolder(tmp_path)) as folder:
        with Hashing() as hashing:
            hashing.begin(folder, SHARD)
        assert remembered_sha256(folder, SHARD) is None
