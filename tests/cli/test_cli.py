"""The command line: what is printed where, and the exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter.read.hub.errors
from converter.cli.main import main
from tests.conftest import REPOSITORY
from tests.folders import change_json, change_tensor, contents, copy
from tests.hub_server import StandInHub
from tests.limits import HANG
from tests.models import save_adapter, save_base
from tests.reference import differences


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], signal_handlers: None) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture
def base(inputs: tuple[Path, Path]) -> Path:
    return inputs[0]


@pytest.fixture
def adapter(inputs: tuple[Path, Path]) -> Path:
    return inputs[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


# What is printed, and the exit code


def test_a_conversion_prints_a_summary_and_ends_with_0(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out)

    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert "peak memory" in lines[0]
    assert lines[1] == "14 merged, 14 quantized, 7 kept"
    assert lines[2].startswith("relative error: mean 0.0")
    assert lines[3].startswith("survival of the delta: mean ")
    assert (out / "config.json").exists()


def test_a_conversion_that_was_made_before_says_so_and_ends_with_0(run: Run, base: Path, out: Path) -> None:
    run("--base", base, "--out", out)

    ran = run("--base", base, "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{out}: made of the same inputs by the same recipe already; nothing to do\n"


def test_verbose_lists_every_tensor(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "-v")

    assert ran.code == 0
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert name in ran.out


def test_quiet_prints_nothing(run: Run, base: Path, adapter: Path, out: Path) -> None:
    for more in ([], ["--overwrite", "--quant-type", "fp4"], ["--quant-type", "fp4"], ["--dry-run", "--overwrite"]):
        assert run("--base", base, "--adapter", adapter, "--out", out, "--quiet", *more) == (0, "", "")


def test_json_is_one_object_with_the_figures(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "--json")

    told = json.loads(ran.out)
    receipt = json.loads((out / "conversion.json").read_text())
    assert (ran.code, ran.err) == (0, "")
    assert told["out"] == str(out)
    assert told["nothing_to_do"] is False
    assert told["fingerprint"] == receipt["fingerprint"]
    assert told["output_bytes"] == (out / "model.safetensors").stat().st_size
    assert told["base_bytes"] == sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert told["tensors"] == {"merged": 14, "quantized": 14, "kept": 7, "replaced": 0}
    errors = {name: t["error"] for name, t in receipt["tensors"].items() if t["action"] == "quantize"}
    assert told["error"]["worst"] == max(errors.values()) == errors[told["error"]["worst_tensor"]]
    assert told["survival"]["worst"] == min(t["survival"] for t in receipt["tensors"].values() if "survival" in t)
    assert told["seconds"] > 0
    assert told["peak_memory_bytes"] > 0


def test_json_of_a_conversion_that_was_made_before_says_so(run: Run, base: Path, out: Path) -> None:
    first = json.loads(run("--base", base, "--out", out, "--json").out)

    told = json.loads(run("--base", base, "--out", out, "--json").out)

    assert told["nothing_to_do"] is True
    assert told["fingerprint"] == first["fingerprint"]
    assert told["error"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--base", "./nope", "--out", "out"], 2),
        (["--base", "./nope", "--out", "out", "--max-shard-size", "5 cows"], 2),
        (["--base", "./nope"], 2),
        (["--nonsense"], 2),
        ([], 2),
    ],
    ids=str,
)
def test_json_of_a_refusal_is_one_object_too(run: Run, arguments: list[str], code: int) -> None:
    ran = run(*arguments, "--json")

    told = json.loads(ran.out)
    assert ran.code == told["exit_code"] == code
    assert told["error"] in ran.err
    assert told.keys() == {"error", "exit_code"}


def test_a_refusal_is_one_line_and_ends_with_2(run: Run, base: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")

    ran = run("--base", base, "--out", out)

    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {out}: not empty, and not made by this tool; choose another folder\n"


def test_with_verbose_a_refusal_comes_with_its_traceback(run: Run, tmp_path: Path) -> None:
    ran = run("--base", tmp_path / "nope", "--out", tmp_path / "out", "-v")

    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1] == f"error: {tmp_path}/nope: no such folder"


def test_what_nobody_foresaw_is_one_line_too_and_ends_with_1(
    run: Run, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a bad\nthing")

    monkeypatch.setattr("converter.pipeline.make_plan", fail)

    ran = run("--base", base, "--out", out)

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert ran.err.startswith("error: ValueError in test_cli.py:")
    assert ran.err.endswith(": a bad\\nthing (-v shows where)\n")


def test_a_nan_met_on_the_way_ends_with_1_and_names_the_tensor(run: Run, base: Path, out: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]):
        bad = copy(base, tmp_path / f"bad{number}")
        change_tensor(bad / "model.safetensors", name, lambda tensor: tensor.view(-1)[7].fill_(torch.nan))

        ran = run("--base", bad, "--out", out)

        assert (ran.code, ran.out) == (1, "")
        assert is_one_line(ran.err)
        assert ran.err.startswith(f"error: {name}: holds a NaN or an infinity")
        assert list(out.parent.iterdir()) == []


@pytest.fixture
def large_base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "large", "llama", vocab_size=8192)


@pytest.fixture
def small_disk(out: Path) -> Iterator[Path]:
    """OUT's parent, with room for a part of what is to come."""
    out.parent.mkdir()
    if os.system(f"mount -t tmpfs -o size=1500k tmpfs '{out.parent}' 2>/dev/null"):
        pytest.skip("mounting needs a privilege that this machine does not give")
    yield out.parent
    os.system(f"umount '{out.parent}'")


def test_a_disk_without_room_is_refused_at_once(run: Run, large_base: Path, out: Path, small_disk: Path) -> None:
    ran = run("--base", large_base, "--out", out, "--max-shard-size", "1MB")

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert "bytes are needed, the disk has" in ran.err
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_others_fill_meanwhile_ends_with_1_and_leaves_no_out(
    run: Run, large_base: Path, out: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = shutil.disk_usage(small_disk)._replace(free=10**9)
    monkeypatch.setattr("converter.seal.destination.shutil.disk_usage", lambda _: others)

    ran = run("--base", large_base, "--out", out, "--max-shard-size", "1MB")

    assert (ran.code, ran.out) == (1, "")
    assert is_one_line(ran.err)
    assert ran.err.startswith(f"error: {out}.partial/model-0000")
    assert "No space left on device" in ran.err
    assert not out.exists()


def test_a_limit_on_file_size_ends_with_1_and_leaves_nothing(run: Run, large_base: Path, out: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        ran = run("--base", large_base, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"error: {out}.partial/model.safetensors.unfinished: File too large\n"
    assert not out.exists()


# Options


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "Give --base, or an --adapter that names its base"),
        (["--base", "x"], "Give --out, or --dry-run"),
        (["--bose", "x"], "No such option"),
        (["--base"], "requires an argument"),
        (["--quant-type", "nf5"], "'nf5' is not one of"),
        (["--block-size", "many"], "not a valid integer"),
        (["--threads", "0"], "not in the range"),
        (["--max-shard-size", "5 cows"], "'5 cows' is not a size such as 5GB or 512MiB"),
        (["--memory", "-1"], "is not a size"),
        (["swap"], "No such command"),
    ],
    ids=str,
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(run: Run, arguments: list[str], found: str) -> None:
    ran = run(*arguments)

    assert (ran.code, ran.out) == (2, "")
    assert found in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--block-size", "100"], "--block-size 100: expected one of 32, 64"),
        (["--max-shard-size", "1KB"], "--max-shard-size 1000: expected at least 1MB"),
        (["--memory", "1MB"], "--memory 1,000,000: "),
        (["--device", "abacus"], "--device abacus: "),
        (["--quant-type", "none", "--keep", "q_proj"], "--keep has no meaning with --quant-type none"),
        (["--keep", "nothing_like_it"], "nothing_like_it"),
        (["--keep", "*"], "quantize none of its layers"),
    ],
    ids=str,
)
def test_choices_that_make_no_sense_end_with_2_and_name_the_option(
    run: Run, base: Path, out: Path, arguments: list[str], found: str
) -> None:
    ran = run("--base", base, "--out", out, *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert found in ran.err
    assert not out.parent.exists()


def test_both_spellings_of_an_option_mean_the_same(run: Run, base: Path, tmp_path: Path) -> None:
    arguments = ["--base", base, "--json", "--out", tmp_path / "out"]
    hyphens = run(*arguments, "--dry-run", "--quant-type", "fp4", "--no-double-quant", "--max-shard-size", "2MB")
    underscores = run(*arguments, "--dry_run", "--quant_type", "fp4", "--no_double_quant", "--max_shard_size", "2MB")

    assert hyphens.code == underscores.code == 0
    for key in ("recipe", "shards", "config"):
        assert json.loads(hyphens.out)[key] == json.loads(underscores.out)[key]


@pytest.mark.parametrize(
    ("text", "size"), [("2000000", 2_000_000), ("2MB", 2_000_000), ("2.5 gb", 2_500_000_000), ("2MiB", 2_097_152)]
)
def test_sizes_are_given_with_or_without_units(run: Run, base: Path, text: str, size: int) -> None:
    ran = run("--base", base, "--dry-run", "--json", "--max-shard-size", text)

    assert json.loads(ran.out)["recipe"]["max_shard_size"] == size


def test_every_choice_reaches_the_recipe(run: Run, base: Path, adapter: Path, out: Path) -> None:
    arguments = ["--quant-type", "fp4", "--no-double-quant", "--block-size", "128", "--dtype", "float16"]
    arguments += ["--merge-precision", "reference", "--keep", "o_proj", "--keep", "*.0.mlp.*"]

    ran = run("--base", base, "--adapter", adapter, "--out", out, *arguments, "--max-shard-size", "3MB", "--quiet")

    assert ran.code == 0
    assert json.loads((out / "conversion.json").read_text())["recipe"] == {
        "quant_type": "fp4",
        "double_quant": False,
        "block_size": 128,
        "dtype": "float16",
        "merge_precision": "reference",
        "keep": ["*.0.mlp.*", "o_proj"],
        "max_shard_size": 3_000_000,
    }


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--out", out, "--dry-run")

    assert (ran.code, ran.err) == (0, "")
    assert "model.layers.*.mlp.up_proj.weight" in ran.out
    assert "merge, rank 8, scaling 2, quantize" in ran.out
    assert "memory: at most " in ran.out
    assert ran.out.endswith("dry run: nothing was written\n")
    assert not out.parent.exists()


def test_a_dry_run_as_json_is_the_plan_as_one_object(run: Run, base: Path, adapter: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--dry-run", "--json")

    plan = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert plan["architecture"] == "LlamaForCausalLM"
    assert plan["counts"]["merged"] == 14
    assert {tensor["name"] for shard in plan["shards"] for tensor in shard["tensors"]} == set(
        load_file(base / "model.safetensors")
    )


def test_without_a_base_the_one_that_the_adapter_names_is_taken(
    run: Run, inputs: tuple[Path, Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(inputs[0], tmp_path / "models" / "base")
    adapter = copy(inputs[1], tmp_path / "lora")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    monkeypatch.chdir(tmp_path)

    ran = run("--adapter", "./lora", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "conversion.json").read_text())["origin"]["base_name"] == "models/base"


def test_an_adapter_that_names_no_base_asks_for_one(
    run: Run, inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    adapter = copy(inputs[1], tmp_path / "lora")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)

    ran = run("--adapter", adapter, "--out", out)

    assert ran == (2, "", f"error: {adapter}: does not name its base; give --base\n")


def test_a_terminal_gets_a_progress_bar(run: Run, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    ran = run("--base", base, "--out", out)

    assert ran.code == 0
    assert "sealing" in terminal.getvalue()
    assert "sealing" not in ran.out


def test_a_terminal_that_goes_meanwhile_is_no_reason_to_fail(
    run: Run, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, _: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")

    ran = run("--base", base, "--out", out)

    assert ran.code == 0
    assert ran.out.startswith(f"{out}: ")


# Processes of their own


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a cache that these tests share, so that transformers is asked once."""
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def start(command: Sequence[object], environment: dict[str, str], **settings: Any) -> Ran:
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        **settings,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_a_checkout_converts_by_cli_py_and_says_nothing_on_stderr(
    base: Path, adapter: Path, out: Path, environment: dict[str, str]
) -> None:
    ran = start([REPOSITORY / "cli.py", "--base", base, "--adapter", adapter, "--out", out], environment)

    assert (ran.code, ran.err) == (0, "")
    assert "14 merged, 14 quantized, 7 kept" in ran.out
    assert (out / "config.json").exists()


def test_the_package_converts_by_its_name(base: Path, out: Path, environment: dict[str, str]) -> None:
    ran = start(["-m", "converter", "--base", base, "--out", out, "--json"], environment, cwd=REPOSITORY)

    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["tensors"]["quantized"] == 14


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--base", "./nope", "--out", "out"], ["--nonsense"]])
def test_what_needs_no_library_imports_none(arguments: list[str], environment: dict[str, str]) -> None:
    program = f"""
import sys
from converter.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    print(sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""

    ran = start(["-c", program], environment, cwd=REPOSITORY)

    modules = set(json.loads(ran.err.splitlines()[-1].replace("'", '"')))
    assert "click" in modules
    heavy = {"torch", "numpy", "transformers", "bitsandbytes", "huggingface_hub", "peft", "numba", "rich", "psutil"}
    assert modules & heavy == set()


@pytest.fixture(scope="module")
def endless_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 13 GB, all zeros, that takes no room on disk."""
    folder = tmp_path_factory.mktemp("endless")
    small = save_base(folder / "small", "llama")
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_bytes((small / "config.json").read_bytes())
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "head_dim": 128}
    change_json(base / "config.json", **sizes, num_attention_heads=32, num_key_value_heads=32)
    hidden, inner = 4096, 11008
    shapes = {"model.embed_tokens.weight": (256, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (256, hidden)
    for layer in range(32):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{place}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{place}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start = end
        end += 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return base


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_midway_leaves_no_out_and_has_its_own_exit_code(
    endless_base: Path, out: Path, environment: dict[str, str], number: signal.Signals, code: int
) -> None:
    arguments = ["--base", endless_base, "--out", out, "--max-shard-size", "100MB", "--json"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "cli.py"), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + HANG
        while not list(out.parent.glob("out.partial/*.safetensors")):  # a shard is finished, others are to come
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

        process.send_signal(number)

        told, err = process.communicate(timeout=HANG)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert is_one_line(err.lstrip())
    assert json.loads(told) == {"error": err.strip().removeprefix("error: "), "exit_code": code}
    assert not out.exists()


# The Hub


@pytest.fixture
def hub(tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.setattr(converter.read.hub.errors, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    adapter = copy(tiny_adapter, tmp_path / "pushed")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="maker/base")
    with StandInHub({"maker/base": tiny_base, "maker/lora": adapter}) as server:
        server.use(monkeypatch, tmp_path / "hub")
        yield server


def test_a_dry_run_on_the_hub_downloads_no_shard(run: Run, hub: StandInHub, tiny_base: Path, tmp_path: Path) -> None:
    ran = run("--base", "maker/base", "--dry-run", "--json")

    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["counts"]["quantize"] == 28
    shards = [request for request in hub.asked(".safetensors") if not request.path.endswith(".json")]
    assert all(request.method == "HEAD" or request.range for request in shards)
    assert sum(request.sent for request in shards) < sum(path.stat().st_size for path in tiny_base.iterdir()) / 4
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_conversion_from_the_hub_equals_that_of_the_folders(
    run: Run, hub: StandInHub, tiny_base: Path, tiny_adapter: Path, out: Path, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    run("--base", tiny_base, "--adapter", tiny_adapter, "--out", local)

    ran = run("--adapter", "maker/lora", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    assert differences(out, local) == []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert contents(out)[name] == contents(local)[name]


def test_the_receipt_of_a_conversion_from_the_hub_names_the_commits(run: Run, hub: StandInHub, out: Path) -> None:
    ran = run("--base", "maker/base", "--adapter", "maker/lora", "--out", out)

    assert ran.code == 0
    origin = json.loads((out / "conversion.json").read_text())["origin"]
    assert (origin["base_name"], origin["adapter_name"]) == ("maker/base", "maker/lora")
    for key, repo in (("base_commit", "maker/base"), ("adapter_commit", "maker/lora")):
        assert origin[key] == hub.repositories[repo].branches["main"]
        assert origin[key] in (out / "README.md").read_text()
    assert set(origin["base"]) == {f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}


def test_a_conversion_from_the_hub_that_was_made_before_downloads_nothing(
    run: Run, hub: StandInHub, out: Path, tmp_path: Path
) -> None:
    run("--base", "maker/base", "--out", out)
    cache = tmp_path / "hub"
    cache.rename(tmp_path / "forgotten")
    hub.log.clear()

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 0
    assert "nothing to do" in ran.out
    assert not list(cache.rglob("*.safetensors"))


def test_another_commit_of_the_base_is_another_conversion(
    run: Run, hub: StandInHub, tiny_base: Path, out: Path, tmp_path: Path
) -> None:
    run("--base", "maker/base", "--out", out)
    base = copy(tiny_base, tmp_path / "second")
    shard = base / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    hub.push("maker/base", base)

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 2
    assert "--overwrite replaces it" in ran.err


def test_offline_the_cache_serves(run: Run, hub: StandInHub, out: Path, tmp_path: Path) -> None:
    run("--adapter", "maker/lora", "--out", out)
    hub.log.clear()

    ran = run("--adapter", "maker/lora", "--out", tmp_path / "again", "--offline")

    assert (ran.code, ran.err) == (0, "")
    assert contents(tmp_path / "again") == contents(out)
    assert not hub.log


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--base", "maker/base", "--offline"], "is not in the cache"),
        (["--base", "maker/gated"], "gated"),
        (["--base", "maker/nothing"], "maker/nothing: no such folder here, and on the Hub: "),
        (["--base", "maker/base", "--base-revision", "v9"], "v9"),
    ],
    ids=str,
)
def test_what_the_hub_does_not_have_for_us_ends_with_2_and_one_line(
    run: Run, hub: StandInHub, tiny_base: Path, out: Path, arguments: list[str], found: str
) -> None:
    hub.push("maker/gated", tiny_base)
    hub.gated.add("maker/gated")

    ran = run(*arguments, "--out", out)

    assert (ran.code, ran.out) == (2, "")
    assert is_one_line(ran.err)
    assert found in ran.err
    assert not out.parent.exists()


def test_a_hub_that_fails_ends_with_1(run: Run, hub: StandInHub, out: Path) -> None:
    hub.failures = 1_000

    ran = run("--base", "maker/base", "--out", out)

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert "503" in ran.err


# Several adapters


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "other", base, "llama", target_modules=["q_proj"])


def test_several_adapters_make_an_output_each_and_a_table(
    run: Run, base: Path, adapter: Path, other: Path, out: Path
) -> None:
    ran = run("--base", base, "--adapter", adapter, "--adapter", f"second={other}", "--out", out)

    assert (ran.code, ran.err) == (0, "")
    rows = [line.split() for line in ran.out.splitlines()]
    assert [row[:2] for row in rows[1:3]] == [[f"{out}/adapter", "made"], [f"{out}/second", "made"]]
    assert rows[-1][:2] == ["2", "made"]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "second"]


def test_one_bad_adapter_of_several_ends_with_1_and_says_which(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()

    ran = run("--base", base, "--adapter", adapter, "--adapter", tmp_path / "empty", "--out", out, "--json")

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert ran.err.startswith(f"error: {out}/empty: ")
    told = json.loads(ran.out)
    assert told["counts"] == {"made": 1, "refused": 1}
    assert [row["status"] for row in told["outputs"]] == ["made", "refused"]
    assert told["outputs"][0]["shared_bytes"] > 0


def test_a_strict_batch_with_one_bad_adapter_starts_nothing_and_ends_with_2(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()

    ran = run("--base", base, "--adapter", adapter, "--adapter", tmp_path / "empty", "--out", out, "--strict")

    assert ran.code == 2
    assert not out.exists()


@pytest.mark.parametrize("odd", ["\x1b]0;owned\x07", "a\nb", "\udcff", "\u202e"])
def test_no_name_reaches_the_terminal_as_it_is(odd: str, run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    out, there = tmp_path / f"out{odd}", copy(adapter, tmp_path / f"adapter{odd}")
    (tmp_path / f"empty{odd}").mkdir()
    several = ["--adapter", there, "--adapter", tmp_path / f"empty{odd}"]
    ran = [
        run("--base", base, "--adapter", there, "--out", out),
        run("--base", base, "--adapter", there, "--out", out),
        run("--base", base, *several, "--out", tmp_path / "several", "--dry-run", "-v"),
        run("--base", base, *several, "--out", tmp_path / "several"),
        run("verify", out),
        run("verify", tmp_path / "several" / there.name, "--json"),
    ]
    shard = next(out.glob("*.safetensors"))
    shard.rename(shard.with_name(f"more{odd}.safetensors"))
    ran.append(run("verify", out))

    assert [one.code for one in ran] == [0, 0, 1, 1, 0, 0, 1]
    for one in ran:
        assert all(line.isprintable() for line in (one.out + one.err).split("\n"))
    assert all(ascii(odd)[1:-1] in one.out + one.err for one in ran[:-2])


def test_json_is_json_where_a_config_has_an_infinity(run: Run, base: Path, tmp_path: Path) -> None:
    other = copy(base, tmp_path / "other")
    change_json(other / "config.json", time_step_limit=[0.0, float("inf")])

    ran = run("--base", other, "--dry-run", "--json")

    def constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    assert json.loads(ran.out, parse_constant=constant)["config"]["time_step_limit"] == [0.0, "Infinity"]


def test_adapters_of_one_name_are_refused_with_a_hint(run: Run, base: Path, adapter: Path, out: Path) -> None:
    ran = run("--base", base, "--adapter", adapter, "--adapter", adapter, "--out", out)

    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "give NAME=PATH" in ran.err


def test_a_file_of_jobs_is_done_in_slices(run: Run, base: Path, adapter: Path, other: Path, out: Path) -> None:
    jobs = out.parent / "jobs.jsonl"
    jobs.parent.mkdir()
    rows = [{"base": str(base), "adapter": str(a), "out": str(out / a.name)} for a in (adapter, other)]
    jobs.write_text("\n".join(map(json.dumps, rows)))

    assert run("batch", jobs, "--dry-run").code == 0
    assert not out.exists()
    assert run("batch", jobs, "--slice", "2/2").code == 0
    assert [path.name for path in out.iterdir()] == ["other"]
    ran = run("batch", jobs)
    assert ran.code == 0
    assert "1 made, 1 nothing to do" in ran.out.replace("1 nothing to do, 1 made", "1 made, 1 nothing to do")


@pytest.mark.parametrize("part", ["0/2", "3/2", "x", "1/0"])
def test_a_slice_that_is_none_is_refused(part: str, run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"base": str(base), "out": "z"}))
    ran = run("batch", tmp_path / "jobs.jsonl", "--slice", part)
    assert ran.code == 2
    assert is_one_line(ran.err)


def test_against_links_to_an_earlier_output(
    run: Run, base: Path, adapter: Path, other: Path, out: Path, tmp_path: Path
) -> None:
    run("--base", base, "--adapter", adapter, "--adapter", other, "--out", out)

    ran = run("--base", base, "--adapter", other, "--out", tmp_path / "later", "--against", out / "other")

    assert (ran.code, ran.err) == (0, "")
    assert any(shard.stat().st_nlink > 2 for shard in (tmp_path / "later").glob("*.safetensors"))
    assert differences(tmp_path / "later", out / "other") == []


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_where_no_job_can_start_a_batch_ends_with_2(
    option: tuple[str, ...], run: Run, base: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = ("--base", base, "--adapter", f"x={tmp_path / 'empty'}", "--adapter", f"y={tmp_path / 'none'}")

    ran = run(*options, "--out", out, *option)

    assert ran.code == 2
    assert [line.split(": ")[1] for line in ran.err.splitlines()] == [f"{out}/x", f"{out}/y"]
    assert not out.exists()
    assert not option or json.loads(ran.out)["counts"] == {"refused": 2}


def test_an_adapter_that_fails_on_the_way_ends_a_batch_with_1(
    run: Run, base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    huge = copy(adapter, tmp_path / "huge")
    file = huge / "adapter_model.safetensors"
    save_file({name: tensor.fill_(3e38) for name, tensor in load_file(file).items()}, file)

    ran = run("--base", base, "--adapter", adapter, "--adapter", huge, "--out", out)

    assert ran.code == 1
    assert is_one_line(ran.err)
    assert "1 made, 1 failed" in ran.out
    assert [path.name for path in out.iterdir()] == ["adapter"]


def test_a_file_of_jobs_that_is_not_understood_ends_with_2_and_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text('[[jobs]]\nadapter = "a"\nout = "z"\nquant = 4\n')
    ran = run("batch", tmp_path / "jobs.toml")
    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "job 1: 'quant' is not known" in ran.err


@pytest.mark.parametrize("named", [True, False], ids=["by a name", "against an output"])
def test_the_revision_of_an_adapter_is_not_lost_on_the_way_to_a_batch(
    named: bool, run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("converter.batch.batch.convert_batch", lambda jobs, *_, **__: asked.extend(jobs) or [])
    more = () if named else ("--against", tmp_path)

    run("--base", base, "--adapter", "x=org/a" if named else "org/a", "--adapter-revision", "v1", "--out", "z", *more)

    assert [job.adapter_revision for job in asked] == ["v1"]


def test_a_dry_run_of_several_says_what_they_will_take_together(
    run: Run, base: Path, adapter: Path, other: Path, out: Path
) -> None:
    several = ("--base", base, "--adapter", adapter, "--adapter", other, "--out", out, "--dry-run")

    text, found = run(*several).out, json.loads(run(*several, "--json").out)

    assert f"2 of {base} in one pass over it: write at most" in text
    assert "memory: at most" in text
    assert "time: about" in text
    (forecast,) = found["forecasts"]
    assert (forecast["outputs"], forecast["passes"]) == (2, 1)
    assert forecast["memory"] > 0
    assert forecast["estimate"]["seconds"] > 0
    assert not out.exists()


WITHOUT_MEMORY = """
import threading
import converter.cli.main

def run(*_, **__):
    raise MemoryError

threading.Thread(target=threading.Event().wait).start()
converter.cli.main._run = run
converter.cli.main.console()
"""
"""Too little memory to say what went wrong, while a thread waits for another that is gone."""


def test_a_command_without_memory_for_its_last_words_ends_all_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (1, "error: MemoryError\n")
