"""Other people's regular expressions: what they mean to PEFT, within limits of time and memory."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import BadAdapter
from converter.merge.files import CONFIG
from converter.merge.keys import PREFIX
from converter.merge.patterns import SECONDS, Pattern, Patterns
from tests.limits import cpu_below
from tests.merge.adapters import MODULE, factors, opened, refusal, save
from tests.merge.test_options import REAL_EXPRESSIONS

ENDLESS = [r"(\w|\w\w)+[!?]{2}", r"((\w|\w\w)+)+[!?]{2}", r"(?=(\w|\w\w)+[!?]{2}).*"]
OPTIONS: dict[str, Any] = {
    "target_modules": lambda text: text,
    "exclude_modules": lambda text: text,
    "rank_pattern": lambda text: {text: 4},
    "alpha_pattern": lambda text: {text: 4},
    "modules_to_save": lambda text: [text],
    "layers_pattern": lambda text: text,
}


def whole(expression: str) -> Pattern:
    return Pattern("target_modules", expression, expression, whole=True)


def matched(expression: str, texts: Iterable[str], *, seconds: float = SECONDS) -> list[bool]:
    """Which of the texts the expression is all of."""
    pattern, texts = whole(expression), list(texts)
    patterns = Patterns("config", [pattern], seconds)
    patterns.learn(texts)
    return [patterns.match(pattern, text) for text in texts]


@pytest.mark.parametrize(
    "expression",
    [
        *REAL_EXPRESSIONS,
        r"model\.layers\.0.self-attn",
        "^model.layers.0.self_attn.q_proj",
        r".{0,2000000000}q_proj{1,999999999}",
        "a{2000000000}|.*q_proj",
        "(?:(?:(?:a{1000}){1000}){1000}){1000}|.*_proj",
        r"(?>x{1,3}y{9999999,})|.*",
        r".*q_proj\{0}",
        "q_proj{e}",
        "[q[:^punct:]]+",
        r"(?i).*Q_PROJ",
        "",
    ],
    ids=lambda text: text[:40],
)
def test_an_expression_matches_what_pythons_own_does(expression: str) -> None:
    texts = [MODULE, "model.vision.layers.0.q_proj", "q_proj", "q_proj{e}", "q_proj{0}", f"{MODULE}\n", "é\ud800", ""]

    with pytest.warns() if "[[" in expression else pytest.MonkeyPatch.context():
        expected = [re.fullmatch(expression, text) is not None for text in texts]

    assert matched(expression, texts) == expected


pieces = st.sampled_from(["a", "b", ".", r"\.", "-", "_", "^", "(a|b)", "[ab]", "a?", r"\d", "0"])
texts_of_pieces = st.lists(st.sampled_from(["a", "b", ".", "-", "_", "0", "\n"]), max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(written=st.lists(pieces, max_size=5).map("".join), texts=st.lists(texts_of_pieces, min_size=1, max_size=8))
def test_names_and_expressions_match_what_pythons_own_do(written: str, texts: list[str]) -> None:
    pattern = Pattern("rank_pattern", written, rf"(.*\.)?({written})$")
    patterns = Patterns("config", [pattern])

    found = [patterns.match(pattern, text) for text in texts]

    assert found == [re.match(pattern.expression, text) is not None for text in texts]


def test_an_expression_that_lists_every_module_of_a_large_model_is_accepted() -> None:
    every = "|".join(rf"model\.layers\.{layer}\.self_attn\.q_proj" for layer in range(4_000))

    assert matched(every, ["model.layers.3999.self_attn.q_proj", "model.layers.4000.self_attn.q_proj"]) == [True, False]


def test_more_names_than_are_matched_here_are_all_matched(tmp_path: Path) -> None:
    names = {f"model.layers.{number}.self_attn.q_proj": 4 for number in range(1_500)}
    adapter = opened(save(tmp_path / "adapter", r=8, rank_pattern=names))

    assert adapter.options.scaling("model.layers.1499.self_attn.q_proj") == (4, 2.0)
    assert adapter.options.scaling("model.layers.1500.self_attn.q_proj") == (8, 1.0)


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_endless_expression_is_refused_in_time(expression: str) -> None:
    with cpu_below(5), pytest.raises(BadAdapter) as caught:
        matched(expression, ["a" * 300 + "!"], seconds=0.2)

    assert str(caught.value) == f"config: target_modules {expression!r} takes longer than 0.2 s to match"


def test_of_several_expressions_the_endless_one_is_named() -> None:
    several = [whole("(a|b)+"), whole(ENDLESS[0]), whole("[c]")]
    patterns = Patterns("config", several, seconds=0.2)

    with pytest.raises(BadAdapter, match=re.escape(repr(ENDLESS[0]))):
        patterns.learn(["a" * 300 + "!"])


@pytest.mark.parametrize("option", OPTIONS)
def test_an_endless_expression_in_any_option_is_refused_in_time(option: str, tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{'a' * 300}!.lora_{half}.weight": value for half, value in zip("AB", factors().values(), strict=True)
    }
    folder = save(tmp_path / "adapter", tensors, **{option: OPTIONS[option](ENDLESS[0])})

    with cpu_below(10):
        message = refusal(folder, BadAdapter, seconds=0.2)

    assert message == f"{CONFIG}: {option} {ENDLESS[0]!r} takes longer than 0.2 s to match"


def test_the_time_is_shared_by_all_texts() -> None:
    with pytest.raises(BadAdapter, match="takes longer than"):
        matched(ENDLESS[0], (f"{'a' * 22}{number}!" for number in range(10_000)), seconds=0.3)


@pytest.mark.parametrize("expression", ["(", "[a", "(?P<x>a)(?P<x>b)", "x{99999999999999}", "(?:" * 600 + ")" * 600])
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_not_an_expression_is_refused(option: str, expression: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", **{option: OPTIONS[option](expression)})

    message = refusal(folder, BadAdapter)

    assert message.startswith(f"{CONFIG}: {option} {expression[:60]!r} is not a regular expression: ")


def test_the_time_is_that_for_reading_the_expressions_too(tmp_path: Path) -> None:
    slow = "[\x00-\U0010ffff]"
    folder = save(tmp_path / "adapter", rank_pattern={f"(?i:{slow * 200}{number})": 4 for number in range(300)})

    with cpu_below(20):
        assert refusal(folder, BadAdapter, seconds=0.2).endswith(" takes longer than 0.2 s to match")


def test_an_expression_that_would_take_all_memory_is_refused() -> None:
    with cpu_below(60), pytest.raises(BadAdapter) as caught:
        Patterns("config", [whole("(?:ab|cd)" * 3_000_000)], seconds=50)

    assert str(caught.value).endswith(" is not a regular expression: it takes too much memory")
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_DFL
