"""Asking transformers in a process of its own: the same answers, and no hang, however that process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from converter import errors, plan_conversion
from converter.model.answers import answer
from converter.model.ask import Questions, TransformersProcess
from converter.read.checkpoint import Checkpoint
from converter.read.folder import LocalFolder
from tests.limits import no_hang

pytestmark = pytest.mark.usefixtures("cold_cache")


@pytest.fixture
def base(tiny_base: Path) -> Checkpoint:
    return Checkpoint(LocalFolder(tiny_base))


@pytest.fixture(scope="module")
def living() -> Iterator[TransformersProcess]:
    process = TransformersProcess()
    yield process
    process.end()


def question(base: Checkpoint, **changes: Any) -> str:
    shapes = {tensor.name: tensor.shape for tensor in base}
    asked = {"question": "describe", "config": base.config, "shapes": shapes, "quantize": True, "dtype": "bfloat16"}
    return json.dumps(asked | changes)


def short(base: Checkpoint) -> str:
    """A question that is answered soon: neither bitsandbytes nor a model is needed."""
    return json.dumps({"question": "reads_alike", "config": base.config, "other": base.config})


DYING = """
import os, sys
for question in sys.stdin:
    if question.strip().isdigit():
        os.kill(os.getpid(), int(question))
    print('{{"answer": ' + str(os.getpid()) + '}}', flush=True)
"""
"""It dies of a question that is the number of a signal; any other is answered by the process's own id."""


@pytest.fixture
def dying() -> Iterator[TransformersProcess]:
    process = TransformersProcess(program=DYING)
    yield process
    process.end()


def test_a_process_of_its_own_gives_the_answers_that_this_one_would(
    base: Checkpoint, living: TransformersProcess
) -> None:
    here = answer(json.loads(question(base)))

    assert living.ask(question(base)) == here
    assert living.ask(question(base)) == here


def test_a_refusal_comes_back_from_the_process_as_the_same_error(base: Checkpoint, living: TransformersProcess) -> None:
    with pytest.raises(errors.Unsupported, match="has no 'NoSuchModel'"):
        living.ask(question(base, config=base.config | {"architectures": ["NoSuchModel"]}))


def test_a_process_that_dies_of_a_question_is_a_refusal_and_no_hang(dying: TransformersProcess) -> None:
    with no_hang(), pytest.raises(errors.BadCheckpoint, match="transformers failed on it"):
        dying.ask(str(signal.SIGABRT.value))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_somebody_ends_is_no_fault_of_the_base(
    number: signal.Signals, dying: TransformersProcess
) -> None:
    with no_hang(), pytest.raises(errors.ConversionFailed, match=f"was ended by {number.name}"):
        dying.ask(str(number.value))


def test_a_question_that_takes_too_long_is_the_fault_of_the_base(base: Checkpoint) -> None:
    process = TransformersProcess(seconds=0)

    with pytest.raises(errors.BadCheckpoint, match="transformers failed on it"):
        process.ask(question(base))

    process.end()


def test_a_process_that_died_of_one_question_is_not_asked_the_next(dying: TransformersProcess) -> None:
    dead = dying.ask("who?")
    with pytest.raises(errors.ConverterError):
        dying.ask(str(signal.SIGKILL.value))

    alive = dying.ask("who?")

    assert dead != alive == dying.pid


def test_what_is_ended_gives_its_process_back_and_can_be_asked_again(dying: TransformersProcess) -> None:
    first = dying.ask("who?")
    assert first == dying.pid

    dying.end()

    assert dying.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert dying.ask("who?") == dying.pid != first


def test_a_config_that_would_take_all_memory_is_refused(base: Checkpoint) -> None:
    settings = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "attention_types": [[["x"], 10**11]]}
    process = TransformersProcess(memory=600_000_000)

    with no_hang(), pytest.raises(errors.BadCheckpoint, match=r"config\.json: transformers .*MemoryError"):
        process.ask(question(base, config=settings))

    assert process.ask(short(base))
    process.end()


# What is remembered


def never(question: str) -> Any:
    pytest.fail("asked again")


def test_a_question_is_asked_once_by_any_process(base: Checkpoint) -> None:
    shapes = {tensor.name: tensor.shape for tensor in base}
    asked: list[str] = []

    def answered(question: str) -> Any:
        asked.append(question)
        return answer(json.loads(question))

    here = Questions(answered)
    first = here.describe(base.config, shapes, quantize=True, dtype="bfloat16")
    again = here.describe(base.config, shapes, quantize=True, dtype="bfloat16")
    elsewhere = Questions(never).describe(base.config, shapes, quantize=True, dtype="bfloat16")

    assert first == again == elsewhere
    assert len(asked) == 1


def test_another_question_or_another_version_is_asked_anew(base: Checkpoint) -> None:
    shapes = {tensor.name: tensor.shape for tensor in base}
    known = Questions().describe(base.config, shapes, quantize=True, dtype="bfloat16")

    with pytest.raises(BaseException, match="asked again"):
        Questions(never).describe(base.config, shapes, quantize=True, dtype="float16")
    for package in ("transformers", "bitsandbytes", "nf4-converter"):
        updated = Questions(never, lambda name, of=package: "999" if name == of else version(name))  # type: ignore[misc]
        with pytest.raises(BaseException, match="asked again"):
            updated.describe(base.config, shapes, quantize=True, dtype="bfloat16")

    assert Questions(never).describe(base.config, shapes, quantize=True, dtype="bfloat16") == known


def test_no_more_than_the_newest_answers_are_kept(cold_cache: Path) -> None:
    for number in range(70):
        Questions(lambda _: {}).check_loaders({"number": number}, {}, [])

    assert len(list((cold_cache / "nf4-converter" / "architectures").iterdir())) == 64
    assert Questions(never).check_loaders({"number": 69}, {}, []) == {}


def test_a_conversion_of_a_known_checkpoint_imports_neither_transformers_nor_bitsandbytes(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from converter import convert; "
        f"convert({str(tiny_base)!r}, {str(tiny_adapter)!r}, sys.argv[1]); "
        "print(sorted({'transformers', 'bitsandbytes', 'huggingface_hub', 'peft'} & sys.modules.keys()))"
    )

    plan_conversion(tiny_base, tiny_adapter)  # makes it known

    run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)

    assert (run.stdout, run.stderr) == ("[]\n", "")
