"""Quantized bases are like all others: memory, resuming, batches, verifying; and what is wrong with one is found."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Job, Recipe, Resources, convert, convert_batch, plan_conversion, verify
from converter.cli.show.summary import summary
from converter.errors import BadCheckpoint, BadRecipe, ConversionRefused, Interrupted, Unsupported
from tests.folders import change_json, change_tensor, contents, copy
from tests.models import save_adapter
from tests.quantized import KINDS, same_bytes, save_pair
from tests.reference import differences, tensors_of

WIDE = {"hidden_size": 256, "intermediate_size": 1024}
"""Large enough for several tiles and shards."""
SMALL_SHARDS = 1_000_000
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By kind: a base and an adapter."""
    return {kind: save_pair(tmp_path_factory.mktemp("pair"), kind, sizes=WIDE) for kind in ("nf4", "int8")}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(kind: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    recipe = Recipe(quant_type=KINDS[kind][1].quant_type, max_shard_size=SMALL_SHARDS)
    resources = Resources(threads=1, journal_seconds=0.0)
    expected = contents(convert(*pairs[kind], tmp_path / "whole", recipe).out)
    tiles = itertools.count()
    with pytest.raises(Interrupted):
        convert(
            *pairs[kind], tmp_path / "out", recipe, resources, stop=lambda: signal.SIGTERM if next(tiles) == 9 else None
        )

    left: list[str] = []
    out = convert(*pairs[kind], tmp_path / "out", recipe, resources, progress=lambda told: left.append(told.stage)).out

    assert contents(out) == expected
    planned = len(list(plan_conversion(*pairs[kind], None, recipe).plan.tensors()))
    assert 0 < left.count("converting") < planned


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_batch_makes_what_single_conversions_make_and_shares_what_no_adapter_touches(
    kind: str, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    base, first = pairs[kind]
    other = save_adapter(
        tmp_path / "other", base.with_name("base-16"), "llama", scale=0.1, target_modules=["q_proj", "k_proj"]
    )
    adapters, recipe = [first, other], KINDS[kind][1]

    outcomes = convert_batch([Job(tmp_path / f"batch{n}", one, base, recipe) for n, one in enumerate(adapters)])

    assert [outcome.status for outcome in outcomes] == ["made", "made"]
    assert all(outcome.shared_bytes > 0 for outcome in outcomes)
    for number, adapter in enumerate(adapters):
        alone = convert(base, adapter, tmp_path / f"alone{number}", recipe).out
        assert differences(tmp_path / f"batch{number}", alone) == []
        assert verify(tmp_path / f"batch{number}", base, adapter).problems == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_verify_makes_every_tensor_again_from_the_quantized_base_and_finds_what_was_changed(
    kind: str, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    out = convert(*pairs[kind], tmp_path / "out", KINDS[kind][1]).out
    found = verify(out, *pairs[kind])
    assert found.problems == []
    assert found.recomputed == len(list(plan_conversion(*pairs[kind], None, KINDS[kind][1]).plan.tensors()))

    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    for name in (Q_PROJ, UP_PROJ):  # one that was merged, one that was copied
        tensors[name].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})

    problems = verify(out, *pairs[kind]).problems
    assert {f"{name}: differs from what base and adapter give" for name in (Q_PROJ, UP_PROJ)} <= set(problems)


def test_another_quantized_base_of_the_same_size_is_noticed(pairs: dict[str, Pair], tmp_path: Path) -> None:
    base, adapter = pairs["nf4"]
    out = convert(base, adapter, tmp_path / "out").out
    other = copy(base, tmp_path / "other")
    change_tensor(other / "model.safetensors", UP_PROJ, lambda codes: codes[:1].bitwise_xor_(1))

    assert f"{UP_PROJ}: differs from what base and adapter give" in verify(out, other, adapter).problems
    assert not convert(other, adapter, out, overwrite=True).nothing_to_do


def test_a_budget_is_kept_by_smaller_tiles_and_one_that_is_too_small_is_refused(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    base, adapter = pairs["nf4"]
    expected = contents(convert(base, adapter, tmp_path / "whole").out)
    some = Resources(memory=95_000_000, threads=2, tile_weights=(1 << 14, 1 << 22))

    report = convert(base, adapter, tmp_path / "out", Recipe(), some)

    assert report.plan.memory <= 95_000_000
    assert contents(report.out) == expected
    with pytest.raises(BadRecipe, match=r"`memory` 65,000,000: .* bytes are needed, because of model\.layers"):
        plan_conversion(base, adapter, None, Recipe(), Resources(memory=65_000_000, threads=2))


@pytest.mark.parametrize("block", [32, 128, 4096])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_any_block_size_is_read_and_written_as_bitsandbytes_does(block: int, double: bool, tmp_path: Path) -> None:
    _, adapter = save_pair(tmp_path)
    recipe = Recipe(block_size=block, double_quant=double)
    base = convert(tmp_path / "base-16", None, tmp_path / "blocks", recipe).out
    nearest = Recipe(block_size=block, double_quant=double, rounding="nearest")

    out = convert(base, adapter, tmp_path / "out", nearest).out

    before, after, factors = tensors_of(base), tensors_of(out), tensors_of(adapter)
    state = bitsandbytes.functional.QuantState.from_dict(
        {name.removeprefix(f"{Q_PROJ}."): part for name, part in before.items() if name.startswith(f"{Q_PROJ}.")},
        device=torch.device("cpu"),
    )
    shape, state.shape = state.shape, torch.Size((1, 64 * 64))
    weight = bitsandbytes.functional.dequantize_4bit(before[Q_PROJ], state).view(shape).float()
    a, b = (factors[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
    codes, _ = bitsandbytes.functional.quantize_4bit(weight + (b @ a) * 2.0, blocksize=block, quant_type="nf4")
    assert same_bytes(after[Q_PROJ], codes)
    assert same_bytes(after[UP_PROJ], before[UP_PROJ])


def test_a_base_that_gives_its_own_codes_again_is_not_spoken_of(pairs: dict[str, Pair]) -> None:
    for kind, pair in pairs.items():
        notes = plan_conversion(*pair, None, KINDS[kind][1]).plan.notes
        assert not any("their own codes" in note for note in notes)


def test_a_base_that_something_else_rounded_is_named_before_it_starts(pairs: dict[str, Pair], tmp_path: Path) -> None:
    base = copy(pairs["nf4"][0], tmp_path / "base")
    file = base / "model.safetensors"
    tensors = load_file(file)
    codes = tensors["model.layers.0.self_attn.k_proj.weight"]
    # bitsandbytes gives every block's largest value the first code or the last; here none has either.
    high, low = ((half.clamp(1, 14)) for half in (codes >> 4, codes & 15))
    tensors["model.layers.0.self_attn.k_proj.weight"] = high << 4 | low
    save_file(tensors, file, metadata={"format": "pt"})

    notes = plan_conversion(base, pairs["nf4"][1]).plan.notes

    assert any(
        "1 of 8 weights of the base that were tried don't give their own codes when they are quantized again "
        "(model.layers.0.self_attn.k_proj.weight)" in note
        for note in notes
    )


def test_the_summary_says_what_survived_and_recommends_the_sixteen_bit_base_where_little_did(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, scale=0.001)

    kept = summary(convert(base, adapter, tmp_path / "kept"), 1.0)
    lost = summary(convert(base, adapter, tmp_path / "lost", Recipe(rounding="nearest")), 1.0)

    advice = "merge it into the 16-bit model that the base was made from"
    assert "survival of the delta: mean 0." in kept
    assert advice not in kept
    assert advice in lost


def test_rounding_for_the_adapter_may_be_asked_for_on_a_sixteen_bit_base(tmp_path: Path) -> None:
    _, adapter = save_pair(tmp_path, scale=0.001)
    base = tmp_path / "base-16"

    kept = convert(base, adapter, tmp_path / "kept", Recipe(rounding="adapter"))
    usual = convert(base, adapter, tmp_path / "usual")

    untouched = [name for name in tensors_of(usual.out) if name.startswith(UP_PROJ)]
    for name in untouched:
        assert same_bytes(tensors_of(kept.out)[name], tensors_of(usual.out)[name])
    assert not same_bytes(tensors_of(kept.out)[Q_PROJ], tensors_of(usual.out)[Q_PROJ])
    assert verify(kept.out, base, adapter).problems == []


# What is wrong with a base


def _drop(name: str) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        del tensors[name]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    return damage


def _change(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    return lambda base: change_tensor(base / "model.safetensors", name, change)


def _state(**changes: object) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        tensors, name = load_file(base / "model.safetensors"), f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    return damage


def _config(**quantization: object) -> Callable[[Path], None]:
    return lambda base: change_json(base / "config.json", quantization_config=quantization)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_drop(f"{Q_PROJ}.absmax"), BadCheckpoint, r"q_proj\.weight\.absmax: missing"),
        (_drop(f"{Q_PROJ}.nested_absmax"), BadCheckpoint, r"q_proj\.weight\.nested_absmax: missing"),
        (_drop(Q_PROJ), BadCheckpoint, r"q_proj\.weight: missing, but the weight has a quant state"),
        (_state(shape=[64, 2**30]), BadCheckpoint, r"q_proj\.weight\.absmax: U8 .*, expected U8 \[1073741824\]"),
        (_state(blocksize=63), BadCheckpoint, "blocks of 63 values"),
        (_state(nested_offset=float("inf")), BadCheckpoint, "quant_state"),
        (_state(shape=[128, 512]), BadCheckpoint, r"q_proj\.weight"),
        (_change(f"{Q_PROJ}.quant_map", lambda values: values.mul_(2)), BadCheckpoint, "not the values of nf4"),
        (
            _change(f"{Q_PROJ}.nested_absmax", lambda values: values.fill_(float("nan"))),
            BadCheckpoint,
            r"q_proj\.weight\.absmax: holds a NaN or an infinity",
        ),
        (
            _change(f"{UP_PROJ}.nested_absmax", lambda values: values.fill_(float("inf"))),
            BadCheckpoint,
            r"up_proj\.weight\.absmax: holds a NaN or an infinity",
        ),
        (_config(quant_method="gptq", bits=4), Unsupported, "gptq"),
        (_config(quant_method=["bitsandbytes"]), Unsupported, "bitsandbytes"),
        (_config(), BadCheckpoint, "quant_state.* but its config.json no quantization_config; restore that"),
    ],
    ids=[
        "no absmax", "no nested absmax", "no codes", "a huge shape", "blocks of 63", "an infinite offset",
        "another shape", "another map", "a NaN", "an infinity in what is copied", "another method", "a list",
        "no method",
    ],
)  # fmt: skip
def test_a_damaged_base_is_refused_by_name_and_nothing_is_left(
    damage: Callable[[Path], None],
    error: type[ConversionRefused],
    message: str,
    pairs: dict[str, Pair],
    tmp_path: Path,
) -> None:
    base = copy(pairs["nf4"][0], tmp_path / "base")
    damage(base)

    with pytest.raises(error, match=message):
        convert(base, pairs["nf4"][1], tmp_path / "out")

    assert {path.name for path in tmp_path.iterdir()} == {"base"}
