"""The figures of an output are those of both models in full, loaded as everybody loads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoTokenizer

from converter import ConversionRefused, Evaluation, Progress, QualityGates, Recipe, convert, evaluate
from converter.errors import AdapterMismatch, BadCheckpoint, BadRecipe, Interrupted, Undecided
from tests.architectures import save_tiny
from tests.conftest import REPOSITORY
from tests.folders import change_json, copy
from tests.layers.models import whole_model

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
TEXT = REPOSITORY / "converter" / "gates.py"
WINDOW = 256


class Plain(NamedTuple):
    """Figures computed from the logits of whole models."""

    perplexity: float
    other: float
    divergence: float
    agreement: float


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(BASE, ADAPTER, tmp_path_factory.mktemp("made") / "out", Recipe(merge_precision="reference")).out


def token_windows(size: int = WINDOW) -> list[Tensor]:
    tokens = AutoTokenizer.from_pretrained(BASE)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    return [window[None] for window in tokens.split(size)]


@torch.no_grad()
def plain_figures(judged: Any, other: Any) -> Plain:
    surprise = other_surprise = divergence = agreed = count = 0.0
    for window in token_windows():
        q, p = (model(input_ids=window, use_cache=False).logits[0, :-1].double() for model in (judged, other))
        surprise += float(cross_entropy(q, window[0, 1:], reduction="sum"))
        other_surprise += float(cross_entropy(p, window[0, 1:], reduction="sum"))
        divergence += float(kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))
        agreed += int((q.argmax(-1) == p.argmax(-1)).sum())
        count += len(q)
    return Plain(math.exp(surprise / count), math.exp(other_surprise / count), divergence / count, agreed / count)


def merged() -> Any:
    """The 16-bit model as PEFT merges it."""
    return PeftModel.from_pretrained(whole_model(BASE, torch.bfloat16), ADAPTER).merge_and_unload()


def test_the_figures_are_those_of_whole_models(out: Path) -> None:
    loaded: Any = whole_model(out, torch.bfloat16)
    expected = plain_figures(loaded.dequantize().float(), merged().float())

    found = evaluate(out, TEXT, BASE, ADAPTER, window=WINDOW)

    assert found.comparison is not None
    assert found.windows == len(token_windows())
    assert found.tokens == sum(window.shape[1] - 1 for window in token_windows())
    assert found.perplexity.value == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.comparison.perplexity.value == pytest.approx(expected.other, rel=1e-6)
    assert found.comparison.ratio.value == pytest.approx(expected.perplexity / expected.other, rel=1e-6)
    assert found.comparison.divergence.value == pytest.approx(expected.divergence, rel=1e-5)
    assert found.comparison.agreement.value == expected.agreement
    assert 0 < expected.divergence < 1
    assert 0.5 < expected.agreement < 1


def test_bitsandbytes_own_forward_in_bfloat16_gives_nearly_the_same(out: Path) -> None:
    """What a server computes is rounded to bfloat16 at each step: perplexity moves by less than 1 %, KL by 5 %."""
    expected = plain_figures(whole_model(out, torch.bfloat16), merged())

    for dtype in ("float32", "bfloat16"):
        found = evaluate(out, TEXT, BASE, ADAPTER, window=WINDOW, dtype=dtype)

        assert found.comparison is not None
        assert found.perplexity.value == pytest.approx(expected.perplexity, rel=0.01)
        assert found.comparison.perplexity.value == pytest.approx(expected.other, rel=0.01)
        assert found.comparison.divergence.value == pytest.approx(expected.divergence, rel=0.05)


def numbers(found: Evaluation) -> list[float | None]:
    """All figures and their standard errors."""
    assert found.comparison is not None
    estimates = [found.perplexity, *vars(found.comparison).values()]
    return [float(found.tokens), float(found.windows), *(part for one in estimates for part in vars(one).values())]


def test_memory_and_documents_change_nothing(out: Path, tmp_path: Path) -> None:
    """Activations on disk, small tiles of the vocabulary, and windows that are documents of their own."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    windows = [window[0].tolist() for window in token_windows(64)]
    parts = [tokenizer.decode(window) for window in windows]
    assert [tokenizer(part).input_ids for part in parts] == windows
    (tmp_path / "parts.jsonl").write_text("\n".join(json.dumps({"part": part}) for part in parts))
    usual = evaluate(out, TEXT, BASE, ADAPTER, window=64)

    small = evaluate(out, TEXT, BASE, ADAPTER, window=64, memory=1, scratch=tmp_path)
    apart = evaluate(out, tmp_path / "parts.jsonl", BASE, ADAPTER, field="part", window=64)

    assert numbers(small) == pytest.approx(numbers(usual), rel=1e-9)
    assert apart == usual
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.jsonl"]


def test_without_a_base_only_the_perplexity_is_measured(out: Path) -> None:
    compared = evaluate(out, TEXT, BASE, ADAPTER, window=WINDOW)

    alone = evaluate(out, TEXT, window=WINDOW)

    assert alone == replace(compared, comparison=None)


def test_a_16_bit_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    made = convert(BASE, ADAPTER, tmp_path / "out", Recipe(quant_type="none")).out

    found = evaluate(made, TEXT, BASE, ADAPTER, max_tokens=600)

    assert found.comparison is not None
    assert found.comparison.ratio.value == 1.0
    assert found.comparison.divergence.value == pytest.approx(0.0, abs=1e-12)
    assert found.comparison.agreement.value == 1.0


def test_the_16_bit_model_is_merged_as_the_receipt_says(tmp_path: Path) -> None:
    made = convert(BASE, ADAPTER, tmp_path / "out", Recipe(quant_type="none", scale=0.5)).out

    found = evaluate(made, TEXT, BASE, ADAPTER, max_tokens=600)
    (made / "conversion.json").unlink()
    without = evaluate(made, TEXT, BASE, ADAPTER, max_tokens=600)

    assert found.comparison is not None
    assert without.comparison is not None
    assert found.comparison.divergence.value == pytest.approx(0.0, abs=1e-12)
    assert without.comparison.divergence.value > 1e-4


def test_max_tokens_ends_the_text_early(out: Path) -> None:
    found = evaluate(out, TEXT, window=100, max_tokens=250)

    assert found.windows == 3
    assert found.tokens == 3 * 99


def test_messages_are_what_the_chat_template_makes_of_them(out: Path, tmp_path: Path) -> None:
    chatty = copy(out, tmp_path / "chatty")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    change_json(chatty / "tokenizer_config.json", chat_template=template)
    messages = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "os.getcwd()"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    (tmp_path / "plain.txt").write_text("<user>import os\n<assistant>os.getcwd()\n")

    chat = evaluate(chatty, tmp_path / "chat.jsonl", field="messages")

    assert chat == evaluate(chatty, tmp_path / "plain.txt")
    with pytest.raises(ConversionRefused, match="messages that the chat template can't render"):
        evaluate(out, tmp_path / "chat.jsonl", field="messages")


def test_progress_is_told_and_an_end_may_be_asked_for(out: Path) -> None:
    heard: list[Progress] = []

    evaluate(out, TEXT, BASE, ADAPTER, max_tokens=600, progress=heard.append)

    stages = list(dict.fromkeys(one.stage for one in heard))
    assert stages[-2:] == ["evaluating", "comparing"]
    done = [one.done for one in heard if one.stage == "evaluating"]
    assert done == sorted(done)
    assert done[-1] == heard[-1].total
    with pytest.raises(Interrupted, match="SIGTERM while it was evaluated"):
        evaluate(out, TEXT, stop=lambda: 15)


def test_an_interrupted_run_is_resumed_with_the_same_figures_and_leaves_nothing(out: Path, tmp_path: Path) -> None:
    usual = evaluate(out, TEXT, BASE, ADAPTER, window=64)

    def run(until: int | None = None) -> tuple[Evaluation | None, list[str]]:
        heard: list[str] = []

        def hear(progress: Progress) -> None:
            if progress.stage == "evaluating":
                heard.append(progress.name)

        def stop() -> int | None:
            return 15 if until is not None and len(heard) > until else None

        try:
            found = evaluate(out, TEXT, BASE, ADAPTER, window=64, scratch=tmp_path, progress=hear, stop=stop)
        except Interrupted:
            return None, heard
        return found, heard

    whole = len(run()[1])
    assert [*tmp_path.iterdir()] == []
    assert run(until=whole // 2)[0] is None
    files = sorted(tmp_path.iterdir())
    assert files
    assert all(re.fullmatch(r"evaluation-[0-9a-f]{32}-\d+\.layers", path.name) for path in files)
    again, heard = run(until=whole // 4)
    assert again is None
    raw = bytearray(files[0].read_bytes())
    raw[-1] ^= 1
    files[0].write_bytes(raw)
    found, heard = run()

    assert found == usual
    assert 0 < len(heard) < whole, "what was damaged is run again, and nothing else"
    assert [*tmp_path.iterdir()] == []


def test_what_was_kept_of_another_text_is_not_taken(out: Path, tmp_path: Path) -> None:
    asked = 0

    def stop() -> int | None:
        nonlocal asked
        asked += 1
        return 15 if asked > 3 else None

    with pytest.raises(Interrupted):
        evaluate(out, TEXT, window=64, max_tokens=600, scratch=tmp_path, stop=stop)
    left = sorted(tmp_path.iterdir())
    other = REPOSITORY / "converter" / "recipe.py"

    found = evaluate(out, other, window=64, max_tokens=600, scratch=tmp_path)

    assert left
    assert found == evaluate(out, other, window=64, max_tokens=600)
    assert sorted(tmp_path.iterdir()) == left


# Gates


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        (QualityGates(1.5, 0.5, 0.5), []),
        (QualityGates(max_perplexity_ratio=0.5), ["perplexity ratio"]),
        (QualityGates(max_kl=0.001), ["KL divergence"]),
        (QualityGates(min_top1=0.999), ["top-1 agreement"]),
        (QualityGates(0.5, 0.001, 0.999), ["perplexity ratio", "KL divergence", "top-1 agreement"]),
    ],
)
def test_gates_name_the_figures_that_miss_them(gates: QualityGates, missed: list[str], out: Path) -> None:
    found = evaluate(out, TEXT, BASE, ADAPTER, max_tokens=600, gates=gates)

    assert [one.rpartition(" ")[0].partition(" 0")[0].partition(" 1")[0] for one in found.missed] == missed
    assert found.is_good == (not missed)


def test_a_figure_that_is_no_number_reaches_no_gate() -> None:
    missed = QualityGates(2, 2, 0.1).misses(ratio=math.nan, divergence=math.nan, agreement=math.nan)

    assert missed == ["perplexity ratio nan, above 2", "KL divergence nan, above 2", "top-1 agreement nan, below 0.1"]


@pytest.mark.parametrize(("name", "value"), [("max_kl", 0), ("max_perplexity_ratio", math.inf), ("min_top1", 1.5)])
def test_a_gate_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(BadRecipe, match=f"`{name}` .*: expected a number above 0"):
        QualityGates(**{name: value})


# Refusals


def refusals(out: Path, folder: Path) -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    short, other = folder / "short.txt", save_tiny(folder / "other", "llama", vocab_size=2048)
    short.write_text("")
    whole = convert(BASE, None, folder / "whole").out
    untold = copy(out, folder / "untold")
    bare = copy(out, folder / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    return {
        "gate": (lambda: evaluate(out, TEXT, gates=QualityGates(max_kl=1)), BadRecipe, "needs `base` or `adapter`"),
        "window": (lambda: evaluate(out, TEXT, window=513), BadRecipe, "`window` 513: the model takes at most 512"),
        "small window": (lambda: evaluate(out, TEXT, window=1), BadRecipe, "`window` 1: expected at least 2"),
        "dtype": (lambda: evaluate(out, TEXT, dtype="int8"), BadRecipe, "`dtype` int8: expected one of float32"),
        "nothing": (lambda: evaluate(out, short), ConversionRefused, "short.txt: no two tokens"),
        "tokenizer": (lambda: evaluate(bare, TEXT), BadCheckpoint, "bare: its tokenizer can't be loaded"),
        "receipt": (lambda: evaluate(untold, TEXT, compare=True), Undecided, "has no name in the receipt"),
        "vocabulary": (
            lambda: evaluate(whole, TEXT, other, max_tokens=50),
            AdapterMismatch,
            "whole: its head has 1,536 tokens, that of .*other 2,048",
        ),
    }


@pytest.mark.parametrize(
    "case", ["gate", "window", "small window", "dtype", "nothing", "tokenizer", "receipt", "vocabulary"]
)
def test_what_cannot_be_measured_is_refused(case: str, out: Path, tmp_path: Path) -> None:
    measure, kind, said = refusals(out, tmp_path)[case]

    with pytest.raises(kind, match=said):
        measure()
