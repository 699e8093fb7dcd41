"""The process: its exit codes, its signals, and what it imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from converter import plan_conversion
from converter.cli.main import main
from tests.cli.conftest import is_one_line, start
from tests.conftest import REPOSITORY
from tests.folders import change_json
from tests.limits import HANG
from tests.models import save_base


@click.command()
@click.option("--json", is_flag=True)
@click.option("--verbose", "-v", is_flag=True)
def buggy(**_: bool) -> None:
    """A command with a bug."""
    raise ValueError("a bad\nthing")


@pytest.mark.parametrize("more", [[], ["--json"], ["-v"]])
def test_a_bug_is_one_line_too_and_ends_with_1(
    more: list[str], capfd: pytest.CaptureFixture[str], signal_handlers: None
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(more, buggy)

    out, err = capfd.readouterr()
    line = err.splitlines()[-1]
    assert ended.value.code == 1
    assert re.fullmatch(r"error: ValueError in test_main.py:\d+: a bad\\nthing \(-v shows where\)", line)
    assert (err.count("\n") == 1) == (more != ["-v"])
    assert ("Traceback" in err) == (more == ["-v"])
    assert more != ["--json"] or json.loads(out) == {"error": line.removeprefix("error: "), "exit_code": 1}


def test_a_checkout_converts_by_cli_py_and_says_nothing_on_stderr(base: Path, adapter: Path, out: Path) -> None:
    ran = start([REPOSITORY / "cli.py", "--base", base, "--adapter", adapter, "--out", out])

    assert (ran.code, ran.err) == (0, "")
    assert "14 merged, 14 quantized, 7 kept" in ran.out
    assert (out / "config.json").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--base", "./nope", "--out", "out"], ["--nonsense"]])
def test_what_needs_no_library_imports_none(arguments: list[str]) -> None:
    program = f"""
import sys
from converter import plan_conversion
from converter.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    print(sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""

    ran = start(["-c", program], cwd=REPOSITORY)

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
    plan_conversion(base, None)  # its answers are remembered: to ask in a process of its own takes longer
    return base


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_midway_leaves_no_out_and_has_its_own_exit_code(
    endless_base: Path, out: Path, number: signal.Signals, code: int
) -> None:
    arguments = ["--base", endless_base, "--out", out, "--max-shard-size", "100MB", "--json"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "cli.py"), *map(str, arguments)],
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


LAST_WORDS = """
import click, threading
from converter.cli.main import console

class Last(click.Command):
    def main(self, *_, **__):
        raise type("Last", (BaseException,), {})

threading.Thread(target=threading.Event().wait).start()
console(Last("last"))
"""
"""What no handler expects is raised, while a thread waits for another that is gone."""


def test_a_command_whose_last_words_fail_ends_all_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LAST_WORDS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (1, "error: Last\n")


INTERRUPTED_IMPORT = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
for _ in range(1000):  # the handler runs between two instructions
    pass
raise ImportError("cannot load module more than once per process")
"""


@pytest.mark.parametrize("module", ["click", "converter.errors", "torch", "rich"])
def test_ctrl_c_while_libraries_are_imported_prints_one_line_and_no_traceback(
    module: str, base: Path, tmp_path: Path
) -> None:
    """A copy of the package, beside a library during whose import the signal comes."""
    shutil.copytree(REPOSITORY / "converter", tmp_path / "converter")
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.write_text(INTERRUPTED_IMPORT)
    program = "from converter.cli.main import console; console()"

    ran = subprocess.run(
        [sys.executable, "-c", program, "--base", base, "--out", tmp_path / "out", "--progress=bar"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )

    assert ran.returncode == 130
    assert ran.stderr.strip() == "error: SIGINT: nothing was written to OUT"
    assert not (tmp_path / "out").exists()
