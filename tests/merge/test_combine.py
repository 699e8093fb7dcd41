"""Several adapters as one, against PEFT's `add_weighted_adapter` and `merge_and_unload`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from converter import Combination, Job, Recipe, convert, convert_batch, plan_conversion, verify
from converter.errors import BadAdapter, BadRecipe, ConversionRefused, Unsupported
from converter.merge.weighted import Pair, combined_factors, generator_of
from tests.folders import contents
from tests.merge.merges import REFERENCE, different, edit_config, save_tuned, save_vit
from tests.merge.test_kinds import lora
from tests.models import load, save_base
from tests.reference import tensors_of

WEIGHTS = (0.7, -0.4)


def save_two(folder: Path, base: Path, one: LoraConfig, other: LoraConfig) -> list[Path]:
    adapters = [folder / "one", folder / "other"]
    save_tuned(adapters[0], base, one, scale=0.05)
    save_tuned(adapters[1], base, other, scale=0.09)
    return adapters


def merged_by_peft(base: Path, adapters: Sequence[Path], combination: Combination, work: Path) -> dict[str, Tensor]:
    """Combined on the base in float32, for on another one PEFT rounds the factors; then saved, and merged as any is."""
    model: Any = PeftModel.from_pretrained(load(base, dtype=torch.float32), adapters[0], adapter_name="adapter0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"adapter{number}")
    model.add_weighted_adapter(
        [f"adapter{number}" for number in range(len(adapters))],
        list(combination.weights),
        "all",
        combination_type=combination.kind,
        svd_rank=combination.rank,
        density=combination.density,
        majority_sign_method=combination.majority_sign,
    )
    model.save_pretrained(work / "adapters", selected_adapters=["all"])
    merged: Any = PeftModel.from_pretrained(load(base, dtype=torch.bfloat16), work / "adapters" / "all")
    merged.merge_and_unload().save_pretrained(work / "merged")
    return tensors_of(work / "merged")


SAME = (lora(r=8), lora(r=8, use_rslora=True))
OTHER_RANKS = (lora(r=8), lora(r=4, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 20}))
COMBINATIONS: dict[str, tuple[tuple[LoraConfig, LoraConfig], Combination]] = {
    "cat": (SAME, Combination("cat", WEIGHTS)),
    "cat of other ranks": (OTHER_RANKS, Combination("cat", WEIGHTS)),
    "cat with an embedding": (
        (lora(target_modules=["embed_tokens", "q_proj"]), lora(target_modules=["embed_tokens"])),
        Combination("cat", WEIGHTS),
    ),
    "linear": (SAME, Combination("linear", WEIGHTS)),
    "linear with an embedding": (
        (lora(target_modules=["embed_tokens", "q_proj"]), lora(target_modules=["embed_tokens"])),
        Combination("linear", WEIGHTS),
    ),
    "svd": (OTHER_RANKS, Combination("svd", WEIGHTS)),
    "svd with an embedding": (
        (lora(target_modules=["embed_tokens", "q_proj"]), lora(target_modules=["embed_tokens"])),
        Combination("svd", WEIGHTS, rank=3),
    ),
    "ties": (SAME, Combination("ties", WEIGHTS, density=0.3)),
    "ties by frequency": (SAME, Combination("ties", WEIGHTS, density=0.3, majority_sign="frequency")),
    "ties_svd": (SAME, Combination("ties_svd", WEIGHTS, density=0.5)),
    "magnitude_prune": (SAME, Combination("magnitude_prune", WEIGHTS, density=0.4)),
    "magnitude_prune_svd": (SAME, Combination("magnitude_prune_svd", WEIGHTS, density=0.4)),
}
UNPRUNED = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
COMBINATIONS |= {f"{kind}, of all values": (SAME, Combination(kind, WEIGHTS, density=1.0)) for kind in UNPRUNED}  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_adapters_are_combined_to_pefts_bits(kind: str, tmp_path: Path) -> None:
    configs, combination = COMBINATIONS[kind]
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapters = save_two(tmp_path, base, *configs)

    convert(base, adapters, tmp_path / "out", replace(REFERENCE, combine=combination))

    theirs = merged_by_peft(base, adapters, combination, tmp_path / "theirs")
    assert different(tensors_of(tmp_path / "out"), theirs) == []
    assert different(theirs, tensors_of(base)) != []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "targets"), [("gpt2", ["c_attn", "c_fc"]), ("vit", ["projection"])])
def test_of_other_layers_the_sum_has_pefts_bits(name: str, targets: list[str], tmp_path: Path) -> None:
    makers = {"vit": lambda folder: save_vit(folder, torch.bfloat16)}
    base = makers[name](tmp_path / "base") if name in makers else save_base(tmp_path / "base", name, torch.bfloat16)
    configs = [lora(r=rank, task_type=None, target_modules=targets, fan_in_fan_out=name == "gpt2") for rank in (8, 4)]
    adapters = save_two(tmp_path, base, configs[0], configs[1])
    combination = Combination("cat", WEIGHTS)

    convert(base, adapters, tmp_path / "out", replace(REFERENCE, combine=combination))

    theirs = merged_by_peft(base, adapters, combination, tmp_path / "theirs")
    assert different(tensors_of(tmp_path / "out"), theirs) == []


def pairs_of(shape: tuple[int, int] = (40, 30), rank: int = 8) -> list[Pair]:
    generator = torch.Generator().manual_seed(3)
    return [
        Pair(torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator), 1.5, w)
        for w in WEIGHTS
    ]


def test_the_concatenated_factors_give_the_weighted_sum_of_the_deltas() -> None:
    pairs = pairs_of()

    a, b = combined_factors(pairs, Combination("cat", WEIGHTS), 16, generator_of(0, ""), turned=False)

    expected = sum((pair.b @ pair.a) * pair.scaling * pair.weight for pair in pairs)
    torch.testing.assert_close(b @ a, expected)


def test_dare_drops_a_share_by_chance_and_makes_up_for_it() -> None:
    [pair, _] = pairs_of((400, 300))
    combination = Combination("dare_linear", (1.0, 1.0), density=0.25)
    alone = [pair._replace(weight=1.0, scaling=1.0)]

    a, _ = combined_factors(alone, combination, 8, generator_of(5, "m"), turned=False)

    left = a != 0
    assert 0.2 < left.float().mean() < 0.3
    torch.testing.assert_close(a[left], pair.a[left] * 4)
    again, _ = combined_factors(alone, combination, 8, generator_of(5, "m"), turned=False)
    assert again.equal(a)
    for seed, module in ((6, "m"), (5, "n")):
        other, _ = combined_factors(alone, combination, 8, generator_of(seed, module), turned=False)
        assert not other.equal(a)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama", torch.bfloat16)
    return base, save_two(folder, base, *SAME)


def test_a_combination_is_part_of_recipe_receipt_and_fingerprint(
    inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = inputs
    combinations = [
        Combination("cat", WEIGHTS),
        Combination("cat", (0.7, 0.4)),
        Combination("dare_ties", WEIGHTS, density=0.5),
        Combination("dare_ties", WEIGHTS, density=0.5, seed=7),
    ]

    made = [
        convert(base, adapters, tmp_path / str(number), Recipe(combine=one)) for number, one in enumerate(combinations)
    ]

    assert len({report.fingerprint for report in made}) == len(combinations)
    again = convert(base, adapters, tmp_path / "again", Recipe(combine=combinations[3]))
    assert contents(tmp_path / "again") == contents(tmp_path / "3")
    assert again.fingerprint == made[3].fingerprint
    receipt = json.loads((tmp_path / "3" / "conversion.json").read_text())
    assert Recipe.from_json(receipt["recipe"]).combine == combinations[3]
    assert "| adapters combined | dare_ties, weights 0.7, -0.4 |" in (tmp_path / "3" / "README.md").read_text()


def test_a_combined_output_is_verified_with_its_adapters(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = inputs
    convert(base, adapters, tmp_path / "out", Recipe(combine=Combination("cat", WEIGHTS)))

    assert verify(tmp_path / "out", base, adapters).is_good
    assert not verify(tmp_path / "out", base, adapters[::-1]).is_good


def test_a_job_of_a_batch_may_combine(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = inputs
    recipe = Recipe(combine=Combination("cat", WEIGHTS))
    convert(base, adapters, tmp_path / "alone", recipe)

    [outcome] = convert_batch([Job(tmp_path / "out", tuple(adapters), base, recipe)])

    assert outcome.status == "made"
    assert different(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "alone")) == []


def test_a_dry_run_says_what_the_combined_adapter_is(inputs: tuple[Path, list[Path]]) -> None:
    base, adapters = inputs

    planned = plan_conversion(base, adapters, recipe=Recipe(combine=Combination("cat", WEIGHTS)))

    [change] = {tensor.change.label for tensor in planned.plan.tensors() if tensor.change is not None}
    assert change == "merge, rank 16, scaling 1"


# Refusals


REFUSED: dict[str, tuple[LoraConfig, Combination, type[ConversionRefused], str]] = {
    "DoRA": (lora(use_dora=True), Combination("cat", WEIGHTS), Unsupported, "other: has DoRA's lengths, which"),
    "a whole module": (
        lora(modules_to_save=["lm_head"]),
        Combination("cat", WEIGHTS),
        Unsupported,
        "other: replaces whole tensors, which",
    ),
    "tokens": (
        lora(trainable_token_indices=[3]),
        Combination("cat", WEIGHTS),
        Unsupported,
        r"embed_tokens: trainable_tokens_delta: only pairs of factors are combined",
    ),
    "PiSSA": (
        lora(init_lora_weights="pissa"),
        Combination("cat", WEIGHTS),
        Unsupported,
        "other: is merged by PEFT's own class",
    ),
    "other ranks": (
        lora(r=4),
        Combination("linear", WEIGHTS),
        BadRecipe,
        "`combine` linear needs adapters of one rank",
    ),
    "a rank too large": (lora(), Combination("svd", WEIGHTS, rank=65), BadRecipe, "`svd_rank` 65: .* has at most"),
    "three weights": (lora(), Combination("cat", (1, 2, 3)), BadRecipe, "3 `weight` for 2 adapters: give one for each"),
}


@pytest.mark.parametrize(("config", "combination", "kind", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_is_refused(
    inputs: tuple[Path, list[Path]],
    config: LoraConfig,
    combination: Combination,
    kind: type[ConversionRefused],
    expected: str,
    tmp_path: Path,
) -> None:
    base, [one, _] = inputs
    save_tuned(tmp_path / "other", base, config)

    with pytest.raises(kind, match=expected):
        convert(base, [one, tmp_path / "other"], tmp_path / "out", Recipe(combine=combination))

    assert not (tmp_path / "out").exists()


def test_an_adapter_that_lost_a_layer_is_refused_though_another_has_it(
    inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, [one, _] = inputs
    save_tuned(tmp_path / "other", base, lora(target_modules=["q_proj"], layers_to_transform=[0]))
    edit_config(tmp_path / "other", layers_to_transform=None)

    with pytest.raises(BadAdapter, match=r"layers\.1\.self_attn\.q_proj: target_modules names it, but the adapter's"):
        convert(base, [one, tmp_path / "other"], tmp_path / "out", Recipe(combine=Combination("cat", WEIGHTS)))


@pytest.mark.parametrize(
    ("recipe", "count", "expected"),
    [
        (Recipe(), 2, "several adapters become one output only by `combine`"),
        (Recipe(combine=Combination("cat", WEIGHTS)), 1, "2 `weight` for 1 adapters: give one for each"),
    ],
)
def test_several_adapters_and_combine_go_together(
    inputs: tuple[Path, list[Path]], recipe: Recipe, count: int, expected: str, tmp_path: Path
) -> None:
    base, adapters = inputs

    with pytest.raises(BadRecipe, match=expected):
        convert(base, adapters if count == 2 else adapters[0], tmp_path / "out", recipe)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "dog"}, "`combine` dog: expected one of cat, linear, svd"),
    "one weight": ({"weights": (1.0,)}, "`combine` takes two adapters or more"),
    "zero": ({"weights": (1.0, 0.0)}, "`weight` 0.0: expected a number that is not 0"),
    "NaN": ({"weights": (1.0, float("nan"))}, "`weight` nan: expected a number"),
    "no density": ({"kind": "ties"}, "`combine` ties prunes: give `density`"),
    "density": ({"kind": "ties", "density": 1.5}, "`density` 1.5: expected a share above 0, at most 1"),
    "density of cat": ({"density": 0.5}, "`density` has no meaning with `combine` cat"),
    "sign of dare": ({"kind": "dare_linear", "density": 0.5, "majority_sign": "frequency"}, "`majority_sign` has no"),
    "sign": ({"kind": "ties", "density": 0.5, "majority_sign": "x"}, "`majority_sign` x: expected total or frequency"),
    "rank of cat": ({"rank": 3}, "`svd_rank` has no meaning with `combine` cat"),
    "rank": ({"kind": "svd", "rank": 0}, "`svd_rank` 0: expected a positive number"),
    "seed of ties": ({"kind": "ties", "density": 0.5, "seed": 3}, "`seed` has no meaning with `combine` ties"),
    "seed": ({"kind": "dare_ties", "density": 0.5, "seed": -3}, "`seed` -3: expected a number from 0"),
}


@pytest.mark.parametrize(("stated", "expected"), WRONG.values(), ids=WRONG)
def test_a_combination_that_contradicts_itself_is_refused(stated: dict[str, Any], expected: str) -> None:
    whole = {"weights": WEIGHTS, **stated}
    with pytest.raises(BadRecipe, match=expected):
        Combination(**whole)
    with pytest.raises(BadRecipe, match=expected):
        Combination.from_json({"kind": "cat", **whole, "weights": list(whole["weights"])})


@pytest.mark.parametrize(
    "stated", [3, [], {"kind": "cat"}, {"kind": 3, "weights": [1, 2]}, {"kind": "cat", "weights": ["a", "b"]}, {"x": 1}]
)
def test_a_combination_in_json_is_a_table_of_its_names(stated: object) -> None:
    with pytest.raises(BadRecipe, match=r"combine|weight"):
        Combination.from_json(stated)
