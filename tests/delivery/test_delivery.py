"""A pipeline to a folder: nothing is published that is not good, and nothing is done twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converter import Gates, Resources, convert
from converter.batch.batch import convert_batch
from converter.batch.job_file import read_file, read_jobs
from converter.batch.options import BatchOptions
from converter.delivery.delivery import DeliveryObserver, deliver
from converter.delivery.state import STATE, STEPS
from converter.errors import BadOutput, Interrupted, OutputLocked
from converter.lock import Lock
from tests.delivery.scenes import ADAPTER, BASE, ONE_THREAD, delivered, job_file, killed
from tests.folders import change_json, contents, copy

ALL_DONE = [(step, "done") for step in STEPS]
NOTHING = [("announce", "skipped")]
EVALUATE = {"text": "text.txt", "window": 32, "max_kl": 5.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `convert` writes of the same base and adapter."""
    return contents(convert(BASE, ADAPTER, tmp_path_factory.mktemp("whole") / "out").out)


def state_of(work: Path, out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / STATE).read_text())["outputs"][out]
    return found


def test_a_whole_run_publishes_the_bytes_of_a_conversion_and_says_what_each_step_found(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    command = ["tee", "heard.json"]
    tables: dict[str, Any] = {"evaluate": EVALUATE, "verify": {"compare": True}, "announce": {"command": command}}
    file = job_file(tmp_path, "out", min_survival=0.9, max_error=0.12, **tables)

    ran = delivered(file, tmp_path / "work")

    out = tmp_path / "out"
    assert (ran.code, ran.steps) == (0, ALL_DONE)
    assert contents(out) == whole
    steps = state_of(tmp_path / "work", "out")
    assert [*steps] == [*STEPS]
    assert {step["state"] for step in steps.values()} == {"done"}
    assert steps["convert"]["figures"]["fingerprint"] == json.loads(whole["conversion.json"])["fingerprint"]
    assert steps["verify"]["figures"]["made_again"] == steps["convert"]["figures"]["tensors"]["quantized"] + 11
    assert steps["gates"]["figures"]["gates"] == {"min_survival": 0.9, "max_error": 0.12, "max_kl": 5.0}
    assert 0 < steps["gates"]["figures"]["evaluation"]["comparison"]["divergence"]["value"] < 5
    assert [path.name for path in (tmp_path / "work" / "outputs").iterdir()] == []
    heard = json.loads((tmp_path / "heard.json").read_text())
    assert heard == ran.events[-1].result
    assert (heard["out"], heard["seen_at"]) == (str(out), str(out))
    assert heard["fingerprint"] == steps["convert"]["figures"]["fingerprint"]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", evaluate=EVALUATE, announce={"command": ["sh", "-c", "echo >> heard"]})
    assert delivered(file, tmp_path / "work").code == 0
    before = (tmp_path / "out" / "config.json").stat(), (tmp_path / "work" / STATE).stat()

    again = delivered(file, tmp_path / "work")

    assert (again.code, again.steps) == (0, NOTHING)
    assert again.outputs[0].had_nothing_to_do
    assert (tmp_path / "heard").read_text() == "\n"
    after = (tmp_path / "out" / "config.json").stat(), (tmp_path / "work" / STATE).stat()
    assert [(one.st_ino, one.st_mtime_ns) for one in before] == [(one.st_ino, one.st_mtime_ns) for one in after]


def test_a_file_that_is_named_from_elsewhere_or_has_moved_with_its_output_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    file = job_file(tmp_path / "here", "out", announce={"command": ["touch", "heard"]})
    assert delivered(file, tmp_path / "work").code == 0

    monkeypatch.chdir(tmp_path)
    assert delivered(Path("here", "job.toml"), tmp_path / "work").steps == NOTHING
    (tmp_path / "here").rename(tmp_path / "there")
    assert delivered(tmp_path / "there" / "job.toml", tmp_path / "work").steps == NOTHING


MISSED: dict[str, tuple[dict[str, Any], str]] = {
    "survival": ({"min_survival": 0.9999}, "survival"),
    "error": ({"max_error": 0.01}, "error"),
    "evaluation": ({"evaluate": EVALUATE | {"max_kl": 1e-9}}, "KL divergence"),
}


@pytest.mark.parametrize("case", MISSED)
def test_a_missed_gate_publishes_nothing_ends_with_4_and_a_weaker_one_needs_no_new_conversion(
    case: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    gates, said = MISSED[case]

    ran = delivered(job_file(tmp_path, "out", announce={"command": ["touch", "heard"]}, **gates), tmp_path / "work")

    assert ran.code == 4
    assert ran.steps == [("fetch", "done"), ("convert", "done"), ("verify", "done"), ("gates", "failed")]
    assert said in ran.events[-1].reason
    assert state_of(tmp_path / "work", "out")["gates"]["reason"] == ran.events[-1].reason
    assert {path.name for path in tmp_path.iterdir()} == {"job.toml", "text.txt", "work"}

    again = delivered(job_file(tmp_path, "out"), tmp_path / "work")
    assert again.code == 0
    assert [step for step, state in again.steps if state == "skipped"] == ["fetch", "convert", "verify"]
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "state"), [*((step, "began") for step in STEPS), ("convert", "done"), ("publish", "done")]
)
def test_a_run_that_is_killed_at_a_step_shows_nothing_half_and_is_resumed(
    step: str, state: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    file = job_file(tmp_path, "out", evaluate=EVALUATE, announce={"command": ["sh", "-c", "echo >> heard"]})
    assert killed(file, tmp_path / "work", step, state) == -signal.SIGKILL
    is_public = (step, state) == ("publish", "done") or step == "announce"
    assert (tmp_path / "out").exists() == is_public

    ran = delivered(file, tmp_path / "work")

    assert ran.code == 0
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / "heard").read_text() == "\n"
    assert [path.name for path in (tmp_path / "work" / "outputs").iterdir()] == []
    left = STEPS.index(step) + (state == "done")  # type: ignore[arg-type]
    done = [name for name, how in ran.steps if how == "done"]
    assert done == [*STEPS[left:]]
    assert delivered(file, tmp_path / "work").steps == NOTHING


def test_a_changed_input_is_converted_again_and_replaces_out_only_if_the_user_says_so(tmp_path: Path) -> None:
    adapter = copy(ADAPTER, tmp_path / "adapter")
    file = job_file(tmp_path, "out", adapter=str(adapter))
    assert delivered(file, tmp_path / "work").code == 0
    before = contents(tmp_path / "out")
    change_json(adapter / "adapter_config.json", lora_alpha=3)

    refused = delivered(file, tmp_path / "work")
    assert refused.code == 2
    assert "holds another conversion" in str(refused.outputs[0].error)
    assert contents(tmp_path / "out") == before

    ran = delivered(file, tmp_path / "work", replace(ONE_THREAD, overwrite=True))
    assert (ran.code, ran.steps) == (0, ALL_DONE)
    assert contents(tmp_path / "out") == contents(convert(BASE, adapter, tmp_path / "expected").out)


def test_stronger_gates_are_held_although_the_output_is_published(tmp_path: Path) -> None:
    assert delivered(job_file(tmp_path, "out"), tmp_path / "work").code == 0

    ran = delivered(job_file(tmp_path, "out", min_survival=0.9999), tmp_path / "work")

    assert ran.code == 4
    assert ran.steps[-1] == ("gates", "failed")


def test_an_out_that_is_gone_is_published_again(whole: dict[str, bytes], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out")
    assert delivered(file, tmp_path / "work").code == 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")

    assert delivered(file, tmp_path / "work").code == 0
    assert contents(tmp_path / "out") == whole


def test_without_the_state_file_the_gates_are_held_again_and_out_stays(tmp_path: Path) -> None:
    file = job_file(tmp_path, "out")
    assert delivered(file, tmp_path / "work").code == 0
    before = (tmp_path / "out" / "config.json").stat().st_ino

    ran = delivered(file, tmp_path / "another-machine")

    assert (ran.code, ran.steps) == (0, ALL_DONE)
    assert (tmp_path / "out" / "config.json").stat().st_ino == before


def test_an_output_that_is_changed_before_it_is_published_is_found(tmp_path: Path) -> None:
    assert delivered(job_file(tmp_path, "out", max_error=0.01), tmp_path / "work").code == 4
    (made,) = (tmp_path / "work" / "outputs").iterdir()
    shard = made / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)

    ran = delivered(job_file(tmp_path, "out"), tmp_path / "work")

    assert ran.code == 1
    assert ran.steps[-1] == ("verify", "failed")
    assert "model.safetensors: sha256 " in ran.events[-1].reason
    assert f"delete {made} to make it anew" in ran.events[-1].reason
    assert not (tmp_path / "out").exists()


COMMANDS: dict[str, tuple[list[str], str]] = {
    "fails": (["sh", "-c", "echo no >&2; exit 3"], "announce: sh: exit code 3: no"),
    "is not there": (["no-such-program-here"], "announce: no-such-program-here: No such file or directory"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_an_announcement_that_fails_is_made_again_alone(case: str, tmp_path: Path) -> None:
    command, said = COMMANDS[case]

    ran = delivered(job_file(tmp_path, "out", announce={"command": command}), tmp_path / "work")

    assert (ran.code, ran.events[-1].reason) == (1, said)
    assert (tmp_path / "out" / "config.json").exists()

    again = delivered(job_file(tmp_path, "out", announce={"command": ["touch", "heard"]}), tmp_path / "work")
    assert (again.code, again.steps) == (0, [("announce", "done")])
    assert (tmp_path / "heard").exists()


def several(folder: Path, *, third: str = "") -> Path:
    copy(ADAPTER, folder / "ads" / "one")
    change_json(copy(ADAPTER, folder / "ads" / "two") / "adapter_config.json", lora_alpha=3)
    file = folder / "jobs.toml"
    file.write_text(f'base = "{BASE}"\nout = "served"\nadapters = "ads/*"\n{third}')
    return file


def test_the_same_file_drives_a_batch_and_gives_the_same_bytes(tmp_path: Path) -> None:
    file = several(tmp_path)
    ran = delivered(file, tmp_path / "work")
    assert ran.code == 0
    found = {name: contents(tmp_path / "served" / name) for name in ("one", "two")}
    (tmp_path / "served").rename(tmp_path / "by-pipeline")

    outcomes = convert_batch(read_jobs(file), BatchOptions(Resources(threads=1)))

    assert [outcome.status for outcome in outcomes] == ["made", "made"]
    assert {name: contents(tmp_path / "served" / name) for name in ("one", "two")} == found
    assert found["one"] != found["two"]


def test_an_output_of_a_batch_that_misses_a_gate_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "missing").mkdir()
    file = several(tmp_path, third='[[jobs]]\nadapter = "missing"\n')
    text = file.read_text().replace('"ads/*"', '["ads/two", "ads/one"]')
    file.write_text(text + '[[jobs]]\nadapter = "ads/one"\nname = "gated"\nmin_survival = 0.9999\n')

    ran = delivered(file, tmp_path / "work")

    errors = {output.job.out.name: str(output.error or "") for output in ran.outputs}
    assert ran.code == 1
    assert {name for name, error in errors.items() if not error} == {"one", "two"}
    assert "survival" in errors["gated"]
    assert {path.name for path in (tmp_path / "served").iterdir()} == {"one", "two"}


def test_a_second_process_is_refused_while_one_works(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    lock = Lock(tmp_path / "work")
    try:
        with pytest.raises(OutputLocked, match="another pipeline is running there; wait for it"):
            delivered(job_file(tmp_path, "out"), tmp_path / "work")
    finally:
        lock.release()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b'{"format": 2, "outputs": {}}', b'{"format": 1, "outputs": {"x": {"fetch": 1}}}']
)
def test_a_state_file_of_something_else_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / STATE).write_bytes(raw)

    with pytest.raises(BadOutput, match=r"state\.json: not a state file of this version; delete it to begin anew"):
        delivered(job_file(tmp_path, "out"), tmp_path / "work")


def foreign(tmp_path: Path) -> str:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    return "not made by this tool"


def no_text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").unlink()
    return "text.txt: No such file or directory"


@pytest.mark.parametrize("spoil", [foreign, no_text])
def test_what_can_be_refused_is_refused_before_anything_is_made(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out", evaluate=EVALUATE)
    said = spoil(tmp_path)

    ran = delivered(file, tmp_path / "work")

    assert ran.code == 2
    assert said in str(ran.outputs[0].error)
    assert not (tmp_path / "work" / "outputs").exists()


def test_a_signal_ends_it_and_the_next_run_resumes(whole: dict[str, bytes], tmp_path: Path) -> None:
    file = job_file(tmp_path, "out")
    asked = read_file(file, stores=True)
    events: list[str] = []

    def stop() -> int | None:
        return signal.SIGTERM if "convert" in events else None

    observer = DeliveryObserver(stop=stop, event=lambda event: events.append(event.step))
    with pytest.raises(Interrupted, match="run the same command to resume") as ended:
        deliver(asked, tmp_path / "work", ONE_THREAD, observer)
    assert ended.value.exit_code == 143
    assert not (tmp_path / "out").exists()

    assert delivered(file, tmp_path / "work").code == 0
    assert contents(tmp_path / "out") == whole


def test_a_work_of_another_conversion_beside_out_is_left_alone(tmp_path: Path) -> None:
    from converter.errors import GateFailed

    with pytest.raises(GateFailed):
        convert(BASE, ADAPTER, tmp_path / "out", gates=Gates(max_error=0.01))
    before = contents(tmp_path / "out.partial")

    ran = delivered(job_file(tmp_path, "out"), tmp_path / "work")

    assert ran.code == 2
    assert "out.partial: another run left it there; finish that run, or delete the folder" in str(ran.outputs[0].error)
    assert contents(tmp_path / "out.partial") == before
