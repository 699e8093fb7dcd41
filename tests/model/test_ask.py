from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converter import errors
from converter.model import ask
from converter.model.ask import _Child
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from tests.limits import no_hang


@pytest.fixture
def base(tiny_base: Path) -> Checkpoint:
    return Checkpoint(LocalFolder(tiny_base))


def question(base: Checkpoint) -> dict[str, object]:
    shapes = {tensor.name: tensor.shape for tensor in base}
    return {"question": "describe", "config": base.config, "shapes": shapes, "quantize": True, "dtype": "bfloat16"}


def test_a_process_of_its_own_gives_the_answers_that_this_one_would(base: Checkpoint) -> None:
    child = _Child()
    here = ask.answer(json.loads(json.dumps(question(base))))

    there = child.ask(json.dumps(question(base)))
    again = child.ask(json.dumps(question(base)))

    child.end()
    assert here == there == again


def test_a_refusal_comes_back_from_the_process_as_the_same_error(base: Checkpoint) -> None:
    child = _Child()
    unknown = question(base) | {"config": base.config | {"architectures": ["NoSuchModel"]}}

    with pytest.raises(errors.Unsupported, match="has no 'NoSuchModel'"):
        child.ask(json.dumps(unknown))

    child.end()


def test_a_process_that_dies_is_a_refusal_and_no_hang(base: Checkpoint) -> None:
    child = _Child()
    child._process.send_signal(signal.SIGABRT)

    with pytest.raises(errors.BadCheckpoint, match="transformers failed on it"):
        child.ask("{}")

    child.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_somebody_ends_is_no_fault_of_the_base(number: signal.Signals, base: Checkpoint) -> None:
    child = _Child()
    child._process.send_signal(number)

    with pytest.raises(errors.ConversionFailed, match=f"was ended by {number.name}"):
        child.ask("{}")

    child.end()


def test_a_question_that_takes_too_long_is_the_fault_of_the_base(
    base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "SECONDS", 0)
    child = _Child()

    with pytest.raises(errors.BadCheckpoint, match="transformers failed on it"):
        child.ask(json.dumps(question(base)))

    child.end()


def test_a_process_that_died_of_one_question_is_not_asked_the_next(
    base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "_child", None)
    raw = json.dumps(question(base))
    first = ask._ask_child(raw)
    assert ask._child is not None
    ask._child._process.kill()
    with pytest.raises(errors.ConverterError):
        ask._child.ask(raw)

    assert ask._ask_child(raw) == first

    ask.dismiss()


def test_a_config_that_would_take_all_memory_is_refused(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "MEMORY", 600_000_000)
    settings = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "attention_types": [[["x"], 10**11]]}
    child = _Child()

    with no_hang(), pytest.raises(errors.BadCheckpoint, match=r"config\.json: transformers .*MemoryError"):
        child.ask(json.dumps(question(base) | {"config": settings}))

    assert child.ask(json.dumps(question(base)))
    child.end()


def test_an_answer_is_remembered_by_config_and_versions(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {tensor.name: tensor.shape for tensor in base}
    monkeypatch.setattr(ask, "_known", {})  # other tests may have asked already
    first = ask.describe(base.config, shapes, quantize=True, dtype="bfloat16")
    monkeypatch.setattr(ask, "_known", {})
    monkeypatch.setattr(ask, "answer", lambda _: pytest.fail("asked again"))

    second = ask.describe(base.config, shapes, quantize=True, dtype="bfloat16")

    assert first == second
    with pytest.raises(BaseException, match="asked again"):
        ask.describe(base.config, shapes, quantize=True, dtype="float16")
    monkeypatch.setattr(ask, "version", lambda name: f"another {name}")
    with pytest.raises(BaseException, match="asked again"):
        ask.describe(base.config, shapes, quantize=True, dtype="bfloat16")


def test_a_conversion_of_a_known_checkpoint_imports_neither_transformers_nor_bitsandbytes(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from converter import convert; "
        f"convert({str(tiny_base)!r}, {str(tiny_adapter)!r}, sys.argv[1]); "
        "print(sorted({'transformers', 'bitsandbytes', 'huggingface_hub', 'peft'} & sys.modules.keys()))"
    )

    run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)

    assert (run.stdout, run.stderr) == ("[]\n", "")
