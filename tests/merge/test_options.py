"""What an adapter's config says of a module: scaling and targeting are PEFT's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from converter.merge.keys import PREFIX
from tests.limits import cpu_below
from tests.merge.adapters import opened, save

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|k_proj)))"
)
REAL_EXPRESSIONS = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj",
    r"^(?!.*vision).*(?:q_proj|k_proj).*$",
    r"(?:.*\.)?(?:model\.)?layers\.\d+\.(?:\w+\.)*(?:q_proj|up_proj)",
    r"(.*\.)?layers\.(\d+|1[0-9]+)\.(\w+\.)*(q_proj)",
    UNSLOTH,
]
MODULES = [
    f"{prefix}layers.{layer}.{leaf}"
    for prefix in ("", "model.", "model.language_model.", "vision_tower.encoder.")
    for layer in (0, 1, 11)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.1.w1", "input_layernorm")
] + ["lm_head", "score", "model.embed_tokens", "model.norm", "transformer.h.1.attn.c_attn", "q_proj"]

# Scaling


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"model.layers.1.q_proj": 2}, "alpha_pattern": {"layers.0.q_proj": 5.5}},
        {"rank_pattern": {"^model.layers.1.q_proj": 2, r"layers\.\d+\.q_proj": 3}},
        {"alpha_pattern": {r"layers.[01].(q|v)_proj": 1, "v_proj": 7}},
        {"alpha_pattern": {"v_proj": 7, r"layers.[01].(q|v)_proj": 1}},
        {"alpha_pattern": {"(q|v)_proj": 7, "xq_proj": 6, "layers.0.q_proj": 5}},
    ],
    ids=str,
)
def test_the_scaling_is_that_of_a_peft_model(patterns: dict[str, Any], use_rslora: bool, tmp_path: Path) -> None:
    layers = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8), "xq_proj": nn.Linear(8, 8)})
        for _ in range(3)
    )
    model = nn.Module()
    model.add_module("model", nn.ModuleDict({"layers": layers}))
    config = LoraConfig(
        r=6, lora_alpha=7, use_rslora=use_rslora, target_modules=["q_proj", "v_proj", "xq_proj"], **patterns
    )
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "adapter")
    # Saving sorts the patterns, so that another one may come first than in training: what counts is the saved order.
    tuned: Any = PeftModel.from_pretrained(model, tmp_path / "adapter")

    adapter = opened(tmp_path / "adapter")

    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name: adapter.options.scaling(name) for name in expected} == expected
    assert adapter.modules.keys() == expected.keys()


@pytest.mark.parametrize("module", MODULES)
def test_the_first_pattern_that_matches_counts_as_in_peft(module: str, tmp_path: Path) -> None:
    patterns = [
        r"layers\.1\.mlp\.experts\.\d+\.w1",
        "^model.layers.1.*",
        "self_attn.q_proj",
        "q_proj",
        r"(k|v)_proj|up_proj",
        "lm.head",
        ".*norm$",
        r"vision_tower\..*",
    ]
    numbers = {pattern: float(number) for number, pattern in enumerate(patterns, start=1)}
    adapter = opened(save(tmp_path / "adapter", {f"{PREFIX}x.bias": torch.ones(4)}, r=1, alpha_pattern=numbers))

    _, scaling = adapter.options.scaling(module)

    assert scaling == numbers.get(get_pattern_key(patterns, module), 8)


# Targeting


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "lm_head"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"], "layers_to_transform": [0]},
    {"target_modules": []},
    {"target_modules": ["roj"]},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": 1},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": []},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
    {"target_modules": ["w1", "c_attn"], "layers_to_transform": [1], "layers_pattern": r"encoder.layers|h"},
    {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj", "k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r"vision_tower\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": "all-linear"},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": []},
    {"target_modules": ["lm_head", "q_proj", "score"], "modules_to_save": ["lm_head", "score"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn", "norm"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1"]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*q_proj"},
    *({"target_modules": expression} for expression in REAL_EXPRESSIONS),
    {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*", "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_targeting_agrees_with_peft(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**options)
    adapter = opened(save(tmp_path / "adapter", {f"{PREFIX}x.bias": torch.ones(4)}, **options))

    adapter.options.learn(MODULES)  # one process for all of them
    ours = {module: adapter.options.targets(module) for module in MODULES}

    assert ours == {module: bool(check_target_module_exists(config, module)) for module in MODULES}


parts = st.sampled_from(["model", "layers", "h", "0", "1", "12", "experts", "mlp", "q_proj", "xq_proj", "lm_head"])
paths = st.lists(parts, min_size=1, max_size=7).map(".".join)
names = st.lists(paths, min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    module=paths,
    target_modules=names,
    exclude_modules=st.none() | names,
    modules_to_save=st.none() | names,
    layers_to_transform=st.none() | st.integers(0, 1) | st.lists(st.integers(0, 12), max_size=2),
    layers_pattern=st.none() | st.just("layers") | st.lists(parts, max_size=2),
)
def test_targeting_agrees_with_peft_for_any_lists_of_names(
    tmp_path_factory: pytest.TempPathFactory, module: str, layers_pattern: Any, **options: Any
) -> None:
    if options["layers_to_transform"] not in (None, []):
        options["layers_pattern"] = layers_pattern
    config = LoraConfig(**options)
    folder = tmp_path_factory.getbasetemp() / "targeting"
    adapter = opened(save(folder, {f"{PREFIX}x.bias": torch.ones(4)}, **options))

    assert adapter.options.targets(module) == bool(check_target_module_exists(config, module))


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_names_every_module_but_the_excluded_ones(spelling: str, tmp_path: Path) -> None:
    adapter = opened(save(tmp_path / "adapter", target_modules=spelling, exclude_modules=["k_proj"]))

    assert adapter.options.targets("any.q_proj")
    assert not adapter.options.targets("any.k_proj")


def test_a_list_of_a_million_layers_is_looked_up_and_not_gone_through(tmp_path: Path) -> None:
    adapter = opened(save(tmp_path / "adapter", layers_to_transform=list(range(10_000, 1_000_000))))

    with cpu_below(5):
        assert not any(adapter.options.targets(f"model.layers.{number}.self_attn.q_proj") for number in range(5_000))
    assert adapter.options.targets("model.layers.10000.self_attn.q_proj")
