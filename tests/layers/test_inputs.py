"""Second moments of a layer's inputs are those of the whole model, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from converter import Inputs, make_plan
from converter.layers.activations import Activations
from converter.layers.inputs import groups_of, moments_of
from converter.layers.layered import LayeredModel
from converter.layers.weights import Weights
from converter.threads import one_thread, pool, use_one_thread
from tests.architectures import save_tiny
from tests.layers.models import SIXTEEN_BIT, token_windows, whole_model

LENGTHS = [[40, 37], [40, 40], [33]]
"""Of the windows of each batch; what is beyond them is padding."""


@contextmanager
def layered(base: Path) -> Iterator[LayeredModel]:
    with Inputs(base, None) as inputs, Activations(10_000_000) as activations:
        plan = make_plan(inputs.base, None, SIXTEEN_BIT)
        yield LayeredModel.of(Weights(plan, inputs.base.folder, None), token_windows(), activations)


def advanced(model: LayeredModel, number: int) -> None:
    for batch in range(len(LENGTHS)):
        model.keep(batch, model.hidden_after(number, batch))


def of_whole_model(base: Path, module: str) -> Tensor:
    """Of the module's inputs: the mean of x · xᵀ over all tokens but padding."""
    seen: list[Tensor] = []
    model = whole_model(base)
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for tokens in token_windows():
            model(input_ids=tokens, use_cache=False)
    # Experts get all tokens of a batch in one row.
    shaped = [given.reshape(*tokens.shape, -1) for given, tokens in zip(seen, token_windows(), strict=True)]
    windows = [window for given in shaped for window in given]
    lengths = [length for of_batch in LENGTHS for length in of_batch]
    x = torch.cat([window[:length] for window, length in zip(windows, lengths, strict=True)]).double()
    return x.T @ x / len(x)


def test_modules_that_get_the_same_input_are_together_in_the_order_of_their_calls(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with layered(base) as model, model.filled(0):
        modules = model.linear_weights(0).values()
        groups = groups_of(model, 0, modules)

    inside = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    assert inside == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2_moe"])
def test_second_moments_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name)
    with layered(base) as model:
        for number in range(2):
            with model.filled(number), one_thread():
                for group in groups_of(model, number, model.linear_weights(number).values()):
                    found = moments_of(model, number, group[0], LENGTHS, None)
                    assert found is not None
                    expected = of_whole_model(base, group[0])
                    assert torch.equal(found.second, found.second.T)
                    assert torch.allclose(found.second.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
                advanced(model, number)


@pytest.mark.parametrize("threads", [2, 3])
def test_their_bits_dont_depend_on_the_number_of_threads(threads: int, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with layered(base) as model, model.filled(0), pool(threads, "layer", use_one_thread) as workers:
        module = groups_of(model, 0, model.linear_weights(0).values())[-1][0]
        with one_thread():
            alone = moments_of(model, 0, module, LENGTHS, None)
        together = [moments_of(model, 0, module, LENGTHS, workers) for _ in range(5)]

    assert alone is not None
    assert all(one is not None and torch.equal(one.second, alone.second) for one in together)


def test_a_layer_takes_other_weights_in_the_place_of_its_own(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    with layered(base) as model, model.filled(0):
        before = model.hidden_after(0, 0)
        tensor, module = next(iter(model.linear_weights(0).items()))
        model.put({tensor: torch.zeros(model.module(module).weight.shape)})
        after = model.hidden_after(0, 0)

    assert before.shape == after.shape
    assert not torch.equal(before, after)
