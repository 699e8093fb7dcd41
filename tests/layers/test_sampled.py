"""Text that a model writes a layer at a time: what the whole model would write by the same chances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from converter import Inputs, make_plan
from converter.errors import Unsupported
from converter.layers.activations import Activations
from converter.layers.layered import LayeredModel
from converter.layers.sampled import Draw, Writing, first_tokens
from converter.layers.weights import Weights
from converter.threads import one_thread, pool, use_one_thread
from tests.architectures import save_tiny
from tests.layers.models import SIXTEEN_BIT, whole_model

WINDOWS, SIZE = 70, 12
"""More windows than a batch has, and more tokens than the sliding windows below."""
SLIDING = {"sliding_window": 5}
SOME = ("llama", "gpt2", "gemma3_text", "gpt_oss", "qwen2_moe", "bloom", "opt", "deepseek_v3")
MORE = ("mistral", "gemma2", "phi3", "qwen3", "cohere2", "mixtral", "gptj", "exaone4")


@contextmanager
def layered(base: Path) -> Iterator[LayeredModel]:
    with Inputs(base, None) as inputs, Activations(1_000_000) as activations:
        plan = make_plan(inputs.base, None, SIXTEEN_BIT)
        yield LayeredModel.of(Weights(plan, inputs.base.folder, None), [torch.tensor([[3, 4]])], activations)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def written(base: Path, budget: int = 10_000_000, threads: int = 1) -> Tensor:
    chances = generator()
    first = first_tokens(WINDOWS, None, 200, chances)
    with layered(base) as model, Activations(budget) as kept, one_thread():
        if threads > 1:
            with pool(threads, "layer", use_one_thread) as workers:
                found = Writing(model, kept, workers).windows(first, SIZE, chances)
        else:
            found = Writing(model, kept).windows(first, SIZE, chances)
        assert (kept.file_bytes > 0) == (budget < 1_000_000)
    return torch.tensor(found)


def by_the_whole_model(base: Path) -> Tensor:
    """Without a cache; the two batches draw one after the other."""
    model, chances = whole_model(base), generator()
    text = first_tokens(WINDOWS, None, 200, chances)[:, None]
    for _ in range(SIZE - 1):
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
        draw = Draw(WINDOWS)
        chance = torch.cat([torch.rand(many, 2, generator=chances, dtype=torch.float64) for many in (64, WINDOWS - 64)])
        draw.add(0, logits, chance)
        text = torch.cat([text, draw.tokens[:, None]], 1)
    return text


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_it_is_what_the_whole_model_would_write(name: str, tmp_path: Path) -> None:
    slides = name in ("gemma3_text", "gpt_oss", "mistral", "gemma2", "phi3", "cohere2", "exaone4")
    base = save_tiny(tmp_path / "base", name, **(SLIDING if slides else {}))

    found = written(base)

    assert torch.equal(found, by_the_whole_model(base))
    assert found.unique().numel() > 100, "it is drawn by chance"


def test_threads_and_memory_for_keys_and_values_change_nothing(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    expected = written(base)

    assert torch.equal(written(base, threads=3), expected)
    assert torch.equal(written(base, budget=200_000), expected)


@pytest.mark.parametrize("name", ["mamba2", "recurrent_gemma"])
def test_a_model_that_remembers_more_than_keys_and_values_is_refused(name: str, tmp_path: Path) -> None:
    why = "its layers remember more than keys and values, so it can't write a text"
    with layered(save_tiny(tmp_path / "base", name)) as model, pytest.raises(Unsupported, match=why):
        model.refuse_to_write()


def test_each_token_is_drawn_with_its_probability_whatever_the_tiles() -> None:
    windows = 40_000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0, 1.5])
    draw, chances = Draw(windows), generator()

    for start, end in ((0, 2), (2, 3), (3, 7)):
        chance = torch.rand(windows, 2, generator=chances, dtype=torch.float64)
        draw.add(start, logits[start:end].expand(windows, -1), chance)

    found = draw.tokens.bincount(minlength=7) / windows
    expected = logits.softmax(-1)
    error = (expected * (1 - expected) / windows).sqrt()
    assert bool(((found - expected).abs() < 4 * error).all()), "within four standard errors"


def test_windows_begin_as_the_tokenizer_begins_a_text_or_by_chance() -> None:
    assert first_tokens(3, 7, 100, generator()).tolist() == [7, 7, 7]
    drawn = first_tokens(1000, None, 100, generator())
    assert drawn.unique().numel() == 100
    assert torch.equal(drawn, first_tokens(1000, None, 100, generator()))
