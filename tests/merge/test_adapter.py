"""An adapter's files: what is refused, and in which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from converter.errors import BadAdapter, Unsupported
from converter.merge.files import CONFIG, WEIGHTS
from converter.merge.keys import PREFIX
from tests.merge.adapters import MODULE, A, B, factors, misplaced, opened, placed, refusal, save


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("qalora_bits", 4),
        ("an_option_of_next_year", 0.5),
    ],
)
def test_an_option_that_is_not_understood_is_refused_by_name(option: str, value: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", **{option: value})

    message = refusal(folder, Unsupported)

    shown = repr(str(value)[:60])
    assert message == f"{CONFIG}: {option} = {shown} is not an option that this tool understands"


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_option_that_says_nothing_is_accepted(value: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", an_option_of_next_year=value, use_dora=value)

    adapter = opened(folder)

    assert list(adapter.modules) == [MODULE]


@pytest.mark.parametrize("init", ["pissa_niter_4", "lora_ga", "corda", "loftq", "PiSSA", 7])
def test_an_initialisation_that_may_change_the_base_is_refused_with_the_way_out(init: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", init_lora_weights=init)

    message = refusal(folder, Unsupported)

    assert message == (
        f"{CONFIG}: init_lora_weights {init!r} may change the base that the adapter was trained on; convert the "
        "adapter to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
    )


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_leaves_the_base_alone_is_accepted(init: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", init_lora_weights=init)

    assert list(opened(folder).modules) == [MODULE]


@pytest.mark.parametrize("kind", ["lora", None, 3, ["LORA"], "NEXT_YEARS"])
def test_other_kinds_of_adapter_are_refused(kind: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", peft_type=kind)

    assert refusal(folder, Unsupported) == (
        f"{CONFIG}: peft_type {kind!r}; this tool merges LORA and what PEFT merges one module at a time"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": 0}, f"rank 0 for {MODULE}, expected a positive integer"),
        ({"r": -4}, f"rank -4 for {MODULE}, expected a positive integer"),
        ({"r": None}, f"rank None for {MODULE}, expected a positive integer"),
        ({"r": 4.0}, f"rank 4.0 for {MODULE}, expected a positive integer"),
        ({"r": True}, f"rank True for {MODULE}, expected a positive integer"),
        ({"r": 10**400}, f"rank {10**400} for {MODULE}, expected a positive integer"),
        ({"rank_pattern": {"q_proj": "4"}}, f"rank '4' for {MODULE}, expected a positive integer"),
        ({"lora_alpha": None}, f"lora_alpha 'None' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": math.nan}, "not valid JSON: NaN is not a value"),
        ({"lora_alpha": math.inf}, f"lora_alpha 'inf' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": -math.inf}, f"lora_alpha '-inf' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": 10**400}, f"lora_alpha '1{'0' * 59}' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": 1e300}, f"lora_alpha '1e+300' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": -(2**128)}, f"lora_alpha '-{2**128}' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": "16"}, f"lora_alpha '16' for {MODULE}, expected a number that float32 can hold"),
        ({"lora_alpha": True}, f"lora_alpha 'True' for {MODULE}, expected a number that float32 can hold"),
        (
            {"alpha_pattern": {"q_proj": None}},
            f"lora_alpha 'None' for {MODULE}, expected a number that float32 can hold",
        ),
        ({"use_rslora": "false"}, "use_rslora 'false', expected true or false"),
        ({"bias": "some"}, "bias 'some', expected none, all or lora_only"),
        ({"bias": None}, "bias None, expected none, all or lora_only"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not a mapping"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is not a mapping"),
        ({"target_modules": 7}, "target_modules is not a list of names"),
        ({"target_modules": ["q_proj", 7]}, "target_modules is not a list of names"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules is not a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is not a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform is not a list of numbers"),
        ({"layers_to_transform": {"1": 2}}, "layers_to_transform is not a list of numbers"),
        ({"layers_pattern": [7]}, "layers_pattern is not a list of names"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_nonsensical_option_is_refused_with_what_was_expected(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "adapter", **changes)

    assert refusal(folder, BadAdapter) == f"{CONFIG}: {expected}"


def test_a_config_that_is_not_json_is_refused_as_the_adapters_fault(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    (folder / CONFIG).write_text('{"r": ')

    assert CONFIG in refusal(folder, BadAdapter)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {})

    assert refusal(folder, BadAdapter) == f"{WEIGHTS} holds no tensors"


def test_a_truncated_file_is_refused_as_the_adapters_fault(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-5])

    assert WEIGHTS in refusal(folder, BadAdapter)


NOT_MERGED = "this kind of tensor is not merged"


@pytest.mark.parametrize(
    ("ending", "part"),
    [
        ("lora_A.weight.extra", "lora_A.weight.extra"),
        ("lora_A.one.two.weight", "lora_A.one.two.weight"),
        ("lora_diag", "lora_diag"),
        ("base_layer.lora_C.weight", "base_layer.lora_C.weight"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_name(ending: str, part: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {**factors(), f"{PREFIX}{MODULE}.{ending}": torch.ones(4, 16)})

    assert misplaced(folder, Unsupported) == f"{MODULE}: {part}: {NOT_MERGED}"


@pytest.mark.parametrize(("present", "missing"), [(A, "B"), (B, "A")])
def test_half_a_pair_is_refused(present: str, missing: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {present: factors()[present]})

    assert misplaced(folder, BadAdapter) == (
        f"{MODULE}: has lora_{'AB'['BA'.index(missing)]}, but no lora_{missing}: half of a pair is lost"
    )


def test_a_factor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    double = A.replace("lora_A.weight", "lora_A.default.weight")
    folder = save(tmp_path / "adapter", {**factors(), double: torch.ones(4, 16)})

    message = refusal(folder, BadAdapter)

    assert message in {f"{key!r}: the module has this tensor twice" for key in (A, double)}


def test_a_replacement_in_two_spellings_is_refused(tmp_path: Path) -> None:
    keys = [f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}model.embed_tokens.base_layer.weight"]
    folder = save(tmp_path / "adapter", {key: torch.ones(4, 4) for key in keys})

    message = refusal(folder, BadAdapter)

    assert message in {f"{key!r}: the adapter has 'model.embed_tokens.weight' twice" for key in keys}


@pytest.mark.parametrize("shape", [(0, 16), (0,)], ids=str)
def test_an_empty_factor_is_refused_as_what_it_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {A: torch.ones(shape), B: torch.ones(8, 4)})

    assert refusal(folder, BadAdapter) == (
        f"{A!r}: empty, as a ZeRO-3 run saves it when its parameters were not gathered"
    )


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (factors(rank=8), f"{MODULE}: rank 8 in the file, 4 in {CONFIG}"),
        (
            {A: torch.ones(4, 16), B: torch.ones(8, 2)},
            f"{MODULE}: lora_A is [4, 16] and lora_B [8, 2]: their ranks differ",
        ),
    ],
    ids=["not the config's rank", "two ranks"],
)
def test_factors_that_do_not_fit_together_are_refused(
    tensors: dict[str, Tensor], expected: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "adapter", tensors)

    assert misplaced(folder, BadAdapter) == expected


@pytest.mark.parametrize("shape", [(64,), (4, 4, 4), (1, 4, 4, 4)], ids=str)
def test_factors_that_are_not_matrices_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {**factors(), A: torch.ones(shape)})

    assert misplaced(folder, Unsupported) == f"{A}: {len(shape)} dimensions; LoRA on this layer has 2"


@pytest.mark.parametrize(
    ("dtype", "spelled"), [(torch.int8, "I8"), (torch.int64, "I64"), (torch.float64, "F64"), (torch.bool, "BOOL")]
)
def test_a_dtype_that_no_adapter_is_trained_in_is_refused(dtype: torch.dtype, spelled: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", {**factors(), A: torch.ones(4, 16, dtype=dtype)})

    assert refusal(folder, BadAdapter) == f"{A!r}: dtype {spelled}, expected F32, F16, BF16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [A, B])
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(
    name: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = factors(dtype=dtype)
    tensors[name][-1, -1] = value
    adapter = opened(save(tmp_path / "adapter", tensors))

    with pytest.raises(BadAdapter) as caught:
        adapter.check_finite()

    assert str(caught.value) == f"{tmp_path / 'adapter'}: {name!r} holds a NaN or an infinity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_and_the_smallest_finite_values_are_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    limits = torch.finfo(dtype)
    tensors = factors(dtype=dtype)
    tensors[A][0, :4] = torch.tensor([limits.max, limits.min, limits.smallest_normal, -0.0], dtype=dtype)
    adapter = opened(save(tmp_path / "adapter", tensors))

    assert len(adapter.check_finite()) == 64


def test_the_digest_tells_adapters_apart_by_a_single_value_or_option(tmp_path: Path) -> None:
    changed = factors()
    changed[B][3, 3] += 1
    folders = [
        save(tmp_path / "one"),
        save(tmp_path / "value", changed),
        save(tmp_path / "option", lora_alpha=9),
        save(tmp_path / "dtype", factors(dtype=torch.bfloat16)),
    ]

    digests = {opened(folder).check_finite() for folder in folders}

    assert len(digests) == len(folders)


def test_the_digest_is_the_same_wherever_the_adapter_lies(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other")

    assert opened(one).check_finite() == opened(other).check_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("infix", ["", ".default", ".policy"])
def test_factors_are_accepted_in_every_dtype_and_with_the_adapters_name_in_the_key(
    infix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {key.replace(".weight", f"{infix}.weight"): value for key, value in factors(dtype=dtype).items()}

    change = placed(save(tmp_path / "adapter", tensors)).deltas[f"{MODULE}.weight"]

    assert (change.shape, change.as_json()) == ((8, 16), {"lora": {"module": MODULE, "rank": 4, "scaling": 2.0}})


def test_a_saved_layer_inside_a_wrapper_loses_the_wrappers_name(tmp_path: Path) -> None:
    tensors = {**factors(), f"{PREFIX}{MODULE}.base_layer.bias": torch.ones(8)}

    adapter = opened(save(tmp_path / "adapter", tensors, bias="lora_only"))

    assert list(adapter.replacements) == [f"{MODULE}.bias"]


def test_what_does_not_touch_the_merge_may_say_anything(tmp_path: Path) -> None:
    harmless = {
        "task_type": "CAUSAL_LM",
        "auto_mapping": {"base_model_class": "X"},
        "peft_version": "99.0",
        "base_model_name_or_path": "some/base",
        "revision": "main",
        "inference_mode": False,
        "lora_dropout": 0.5,
        "megatron_core": "megatron.core",
        "runtime_config": {"ephemeral_gpu_offload": True},
        "eva_config": {"rho": 2.0},
        "qalora_group_size": 32,
        "fan_in_fan_out": True,
    }

    adapter = opened(save(tmp_path / "adapter", **harmless))

    assert (adapter.base_name, adapter.base_revision) == ("some/base", "main")
    assert adapter.notes == []


def test_an_adapter_of_the_first_pefts_is_accepted_as_todays_peft_accepts_it(tmp_path: Path) -> None:
    first = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "modules_to_save": None}

    adapter = opened(save(tmp_path / "adapter", **first))

    assert list(adapter.modules) == [MODULE]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "kpm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
    ],
)
def test_what_an_initialisation_left_in_the_config_is_noted(option: str, value: object, tmp_path: Path) -> None:
    adapter = opened(save(tmp_path / "adapter", **{option: value}))

    [note] = adapter.notes
    assert note.startswith(f"{tmp_path / 'adapter'}: adapter_config.json: {option} is given, but init_lora_weights")
    assert note.endswith("that this initialisation had changed and that was saved, give that base")


@pytest.mark.parametrize("value", [None, "", 7, ["x"]])
def test_a_base_that_is_not_named_is_none(value: object, tmp_path: Path) -> None:
    adapter = opened(save(tmp_path / "adapter", base_model_name_or_path=value, revision=value))

    assert (adapter.base_name, adapter.base_revision) == (None, None)


def test_an_adapter_that_peft_saved_with_every_default_is_accepted(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(16, 8))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")

    adapter = opened(tmp_path / "adapter")

    assert list(adapter.modules) == ["q_proj"]


def test_zeros_are_told_from_values(tmp_path: Path) -> None:
    tensors = factors()
    tensors[B].zero_()
    adapter = opened(save(tmp_path / "adapter", tensors))

    zero = {name: adapter.is_zero(tensor) for name, tensor in adapter.tensors.items()}

    assert zero == {A: False, B: True}


def test_equal_tensors_are_told_from_different_ones(tmp_path: Path) -> None:
    one = torch.arange(16.0).reshape(4, 4)
    changed = one.clone()
    changed[3, 3] = 0
    variants = {"same": one.clone(), "changed": changed, "turned": one.reshape(2, 8).clone(), "cast": one.bfloat16()}
    tensors = {f"{PREFIX}{name}.weight": value for name, value in {"one": one, **variants}.items()}
    adapter = opened(save(tmp_path / "adapter", tensors))

    equal = {
        name: adapter.same_bytes(adapter.replacements["one.weight"], adapter.replacements[f"{name}.weight"])
        for name in variants
    }

    assert equal == {"same": True, "changed": False, "turned": False, "cast": False}
