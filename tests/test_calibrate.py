"""Codes that a text chooses: better than the nearest ones, the same bytes every time, and every refusal says why."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from converter import Evaluation, Job, Recipe, Resources, convert, convert_batch, evaluate, plan_conversion, verify
from converter.calibration import SELF, Calibration
from converter.cli.commands import cli
from converter.cli.show.plan import plan_text
from converter.errors import BadRecipe, ConversionRefused, InputChanged, Interrupted, NoEffect, Undecided, Unsupported
from converter.observer import Progress
from tests.architectures import save_tiny
from tests.conftest import REPOSITORY
from tests.folders import contents
from tests.layers.models import whole_model

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
TEXT = REPOSITORY / "converter" / "recipe.py"
OTHER_TEXT = REPOSITORY / "converter" / "gates.py"
WINDOW, TOKENS = 128, 1500
ONE = Resources(threads=1, journal_seconds=0.0)


def recipe(**choices: object) -> Recipe:
    return Recipe(calibration=Calibration.of(TEXT, window=WINDOW, tokens=TOKENS), **choices)  # type: ignore[arg-type]


def divergence(out: Path, base: Path = BASE, adapter: Path | None = ADAPTER) -> float:
    """From the merged model, on a text that calibrated nothing."""
    found: Evaluation = evaluate(out, OTHER_TEXT, base, adapter, window=WINDOW, max_tokens=1500)
    assert found.comparison is not None
    return float(found.comparison.divergence.value)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4, made on two threads."""
    place = tmp_path_factory.mktemp("made") / "out"
    return convert(BASE, ADAPTER, place, recipe(), Resources(threads=2), calibrate=TEXT).out


FORMATS: dict[str, dict[str, object]] = {
    "fp4": {"quant_type": "fp4"},
    "int8": {"quant_type": "int8"},
    "w4a16": {"quant_type": "w4a16", "group_size": 32},
    "w8a16": {"quant_type": "w8a16", "group_size": 32},
    "nf4, without double quant": {"double_quant": False, "block_size": 32},
}


def test_a_calibrated_output_is_closer_to_the_merged_model(out: Path, tmp_path: Path) -> None:
    plain = convert(BASE, ADAPTER, tmp_path / "plain").out

    assert divergence(out) < 0.8 * divergence(plain)


IN_EACH_COMMIT = {"int8", "w4a16"}
"""One that gets other codes alone, one that has scales a group; the others go the same ways."""


@pytest.mark.parametrize(
    "name", [name if name in IN_EACH_COMMIT else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)
def test_so_it_is_in_each_format(name: str, tmp_path: Path) -> None:
    choices = FORMATS[name]
    plain = convert(BASE, ADAPTER, tmp_path / "plain", Recipe(**choices)).out  # type: ignore[arg-type]
    calibrated = convert(BASE, ADAPTER, tmp_path / "out", recipe(**choices), calibrate=TEXT).out

    assert divergence(calibrated) < 0.9 * divergence(plain)
    assert {name: value.dtype for name, value in tensors(calibrated).items()} == {
        name: value.dtype for name, value in tensors(plain).items()
    }


def test_only_codes_and_scales_differ_from_an_output_that_is_not_calibrated(out: Path, tmp_path: Path) -> None:
    plain = tensors(convert(BASE, ADAPTER, tmp_path / "plain").out)

    different = {name for name, value in tensors(out).items() if not torch.equal(value, plain[name])}

    assert different
    assert all(re.search(r"_proj\.weight($|\.(absmax|nested_absmax|quant_state))", name) for name in different)
    assert {name: value.shape for name, value in tensors(out).items() if "quant_state" not in name} == {
        name: value.shape for name, value in plain.items() if "quant_state" not in name
    }
    assert plain.keys() == tensors(out).keys()


def test_any_number_of_threads_and_a_resumed_run_give_the_same_bytes(out: Path, tmp_path: Path) -> None:
    made: list[str] = []

    def stop() -> int | None:
        return signal.SIGTERM if len(made) > 12 else None

    def hear(progress: Progress) -> None:
        made.append(progress.name)

    place = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(BASE, ADAPTER, place, recipe(), ONE, calibrate=TEXT, progress=hear, stop=stop)
    assert not place.exists()
    later: list[str] = []
    convert(BASE, ADAPTER, place, recipe(), ONE, calibrate=TEXT, progress=lambda progress: later.append(progress.name))

    weights = {name for name in made if name.endswith("weight")}
    assert weights
    assert not weights & {*later}, "what was made is not made again"
    assert contents(place) == contents(out)


def test_without_the_kernels_the_weights_are_the_same(out: Path, tmp_path: Path) -> None:
    plainly = convert(BASE, ADAPTER, tmp_path / "out", recipe(), Resources(kernels=False), calibrate=TEXT).out

    assert contents(plainly)["model.safetensors"] == contents(out)["model.safetensors"]


OWN = Recipe(calibration=Calibration(SELF, tokens=2000, window=24, seed=3))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a text that the model writes, on two threads."""
    place = tmp_path_factory.mktemp("made") / "own"
    return convert(BASE, ADAPTER, place, OWN, Resources(threads=2), calibrate="self").out


def test_a_text_that_the_model_writes_brings_an_output_closer_too(out: Path, own: Path, tmp_path: Path) -> None:
    plain = convert(BASE, ADAPTER, tmp_path / "plain").out
    chance = replace(OWN, calibration=Calibration(SELF, tokens=2000, window=24, seed=4))
    other = convert(BASE, ADAPTER, tmp_path / "other", chance, calibrate="self").out

    assert divergence(own) < 0.8 * divergence(plain)
    assert divergence(other) < 0.8 * divergence(plain)
    assert contents(other)["model.safetensors"] != contents(own)["model.safetensors"]


def test_what_the_model_wrote_is_kept_for_the_next_run_and_the_bytes_are_the_same(own: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"

    def made_until(count: int, stage: str) -> list[Progress]:
        heard: list[Progress] = []

        def stop() -> int | None:
            return signal.SIGTERM if sum(one.stage == stage for one in heard) > count else None

        with pytest.raises(Interrupted):
            convert(BASE, ADAPTER, place, OWN, ONE, calibrate="self", progress=heard.append, stop=stop)
        return heard

    first, second = made_until(20, "sampling"), made_until(1, "converting")
    assert {one.stage for one in first} == {"sampling"}
    assert {one.stage for one in second} > {"sampling"}, "nothing was there, so it is written anew"
    later: list[Progress] = []
    convert(BASE, ADAPTER, place, OWN, ONE, calibrate="self", progress=later.append)

    assert "sampling" not in {one.stage for one in later}
    assert contents(place) == contents(own)


def test_the_receipt_of_such_an_output_has_the_seed_and_verify_needs_no_text(own: Path) -> None:
    stated = json.loads((own / "conversion.json").read_text())["recipe"]["calibration"]

    assert (stated["text"], stated["seed"], stated["tokens"], stated["window"]) == ("self", 3, 2000, 24)
    assert "2000 tokens that the merged model wrote" in (own / "README.md").read_text()
    assert verify(own, BASE, ADAPTER).is_good
    assert verify(own, BASE, ADAPTER, sample=0.1).is_good
    with pytest.raises(BadRecipe, match="but one that the model wrote: leave it out"):
        verify(own, BASE, ADAPTER, calibrate=TEXT)
    other = replace(OWN, calibration=Calibration(SELF, tokens=2000, window=24))
    with pytest.raises(ConversionRefused, match="overwrite"):
        convert(BASE, ADAPTER, own, other, calibrate="self")


def test_the_plan_says_how_often_the_base_is_read_to_write_a_text() -> None:
    with_text = plan_conversion(BASE, ADAPTER, recipe=recipe(), calibrate=TEXT)
    found = plan_conversion(BASE, ADAPTER, recipe=OWN, calibrate="self")
    told = plan_text(found)

    assert found.estimate.passes == 24
    assert 0 < found.estimate.write_text < found.estimate.seconds
    assert "writing the text reads the base 24 times" in told
    assert found.as_json()["estimate"]["passes"] == 24
    assert found.plan.memory > with_text.plan.memory
    assert with_text.estimate.passes == 0
    assert "reads the base" not in plan_text(with_text)
    assert "passes" not in with_text.as_json()["estimate"]


def test_it_loads_and_the_model_is_the_one_that_was_measured(out: Path) -> None:
    loaded = whole_model(out, torch.bfloat16)

    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(3, 60)[None]).logits

    assert bool(logits.isfinite().all())


def test_the_receipt_says_by_which_text_and_another_text_is_another_output(out: Path) -> None:
    stated = json.loads((out / "conversion.json").read_text())["recipe"]["calibration"]

    assert stated == {
        "text": Calibration.of(TEXT).text,
        "field": None,
        "tokens": TOKENS,
        "window": WINDOW,
        "damping": 0.01,
        "scales": "inputs",
        "sweeps": 2,
    }
    card = (out / "README.md").read_text()
    assert f"{TOKENS} tokens of a text whose sha256 begins with {Calibration.of(TEXT).text[:12]}" in card
    again = convert(BASE, ADAPTER, out, recipe(), calibrate=TEXT)
    assert again.nothing_to_do
    other = replace(recipe(), calibration=Calibration.of(OTHER_TEXT, window=WINDOW, tokens=TOKENS))
    with pytest.raises(ConversionRefused, match="overwrite"):
        convert(BASE, ADAPTER, out, other, calibrate=OTHER_TEXT)


def test_the_receipt_says_what_is_left_of_each_weights_outputs(out: Path) -> None:
    receipt = json.loads((out / "conversion.json").read_text())

    quantized = {name: of for name, of in receipt["tensors"].items() if of["action"] == "quantize"}
    assert all(0 < of["output_error"] < of["error"] for of in quantized.values()), "that is what codes are chosen for"
    assert not any("output_error" in of for of in receipt["tensors"].values() if of["action"] != "quantize")
    errors = [of["output_error"] for of in quantized.values()]
    assert receipt["summary"]["output_error"]["worst"] == max(errors)
    assert receipt["summary"]["output_error"]["mean"] == pytest.approx(sum(errors) / len(errors))


def test_weights_that_no_layer_calls_are_counted_and_have_no_output_error(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen2_moe", vocab_size=1536)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, base)
    place, settings = tmp_path / "out", ["--calibrate-tokens", "128", "--calibrate-window", "64"]

    form = ["--format", "w4a16", "--group-size", "32"]

    ran = invoke(["--base", str(base), "--out", str(place), *form, "--calibrate", str(TEXT), *settings])

    tensors = json.loads((place / "conversion.json").read_text())["tensors"]
    quantized = {name for name, of in tensors.items() if of["action"] == "quantize"}
    left = {name for name in quantized if "output_error" not in tensors[name]}
    assert ran.exit_code == 0, ran.output
    assert left == {name for name in quantized if ".experts." in name}, "which are one tensor to the model"
    assert (
        f"{len(left)} of the quantized weights have the nearest codes: no layer calls them with the text" in ran.output
    )
    assert "error of outputs, on the text: mean 0.0" in ran.output


def test_verify_makes_it_again_by_the_same_text(out: Path, tmp_path: Path) -> None:
    assert verify(out, BASE, ADAPTER, calibrate=TEXT).is_good
    assert verify(out, BASE, ADAPTER, calibrate=TEXT, sample=0.1).is_good
    assert verify(out).is_good
    with pytest.raises(Undecided, match=r"give its file as `calibrate`"):
        verify(out, BASE, ADAPTER)
    with pytest.raises(Undecided, match="not the text of the recipe"):
        verify(out, BASE, ADAPTER, calibrate=OTHER_TEXT)
    plain = convert(BASE, ADAPTER, tmp_path / "plain").out
    with pytest.raises(BadRecipe, match="no text calibrated this output"):
        verify(plain, BASE, ADAPTER, calibrate=TEXT)

    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    (shard,) = damaged.glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0x11
    shard.write_bytes(raw)
    found = verify(damaged, BASE, ADAPTER, calibrate=TEXT)
    assert any("differs" in problem for problem in found.problems)


def test_a_quantized_base_is_calibrated_where_the_adapter_changes_it(tmp_path: Path) -> None:
    quantized = convert(BASE, None, tmp_path / "base").out
    plain = convert(quantized, ADAPTER, tmp_path / "plain").out
    calibrated = convert(quantized, ADAPTER, tmp_path / "out", recipe(), calibrate=TEXT).out

    assert divergence(calibrated) < divergence(plain)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_other_architectures_are_calibrated(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", name, vocab_size=1536)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, base)
    calibrated = convert(base, None, tmp_path / "out", recipe(), calibrate=TEXT).out
    plain = convert(base, None, tmp_path / "plain").out

    figures = [
        evaluate(one, OTHER_TEXT, base, window=WINDOW, max_tokens=1500).comparison for one in (calibrated, plain)
    ]

    assert all(one is not None for one in figures)
    ours, nearest = (one.divergence.value for one in figures if one is not None)
    assert ours < nearest
    assert verify(calibrated, base, calibrate=TEXT).is_good


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(cli, arguments, obj=lambda: None)


def long_windows() -> Recipe:
    return Recipe(calibration=Calibration.of(TEXT, window=513))


def tiny_change(folder: Path) -> Path:
    """The adapter with next to nothing of its change."""
    place = folder / "tiny-change"
    shutil.copytree(ADAPTER, place)
    config = json.loads((place / "adapter_config.json").read_text())
    config["lora_alpha"] = config["lora_alpha"] * 1e-8
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def refused(tmp_path: Path, act: Callable[[Path], object], error: type[Exception], message: str) -> None:
    place = tmp_path / "refused"
    with pytest.raises(error, match=message):
        act(place)
    assert not place.exists()
    assert not (tmp_path / "refused.partial").exists()


def test_what_cant_be_calibrated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    encoder = save_tiny(tmp_path / "t5", "t5", vocab_size=1536)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, encoder)
    recurrent = save_tiny(tmp_path / "recurrent", "recurrent_gemma", vocab_size=1536)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, recurrent)
    cases: list[tuple[Callable[[Path], object], type[Exception], str]] = [
        (lambda out: convert(BASE, ADAPTER, out, Recipe(quant_type="fp8"), calibrate=TEXT), BadRecipe, "only nf4"),
        (lambda out: convert(BASE, ADAPTER, out, recipe(), calibrate=OTHER_TEXT), InputChanged, "the same file again"),
        (
            lambda out: convert(BASE, ADAPTER, out, calibrate=TEXT, recipe=long_windows()),
            BadRecipe,
            "`calibrate_window` 513: the model takes at most 512",
        ),
        (
            lambda out: convert(BASE, tiny_change(tmp_path), out, recipe(), calibrate=TEXT),
            NoEffect,
            "convert without `calibrate`",
        ),
        (lambda out: convert(BASE, ADAPTER, out, recipe()), BadRecipe, "give its file as `calibrate`"),
        (lambda out: convert(BASE, ADAPTER, out, calibrate=tmp_path / "no"), BadRecipe, "give a file of text"),
        (lambda out: convert(BASE, ADAPTER, out, calibrate=empty), ConversionRefused, "no two tokens"),
        (lambda out: convert(encoder, None, out, calibrate=TEXT), Unsupported, "a layer at a time"),
        (lambda _: convert(BASE, ADAPTER, "s3://bucket/x", calibrate=TEXT), BadRecipe, "convert to a folder"),
        (
            lambda out: convert_batch([Job(out, ADAPTER, BASE, recipe(), text=TEXT)]),
            BadRecipe,
            "convert each adapter by itself",
        ),
        (lambda out: convert(recurrent, None, out, calibrate="self"), Unsupported, "so it can't write a text"),
        (
            lambda out: convert(
                BASE, ADAPTER, out, Recipe(calibration=Calibration(SELF, window=513)), calibrate="self"
            ),
            BadRecipe,
            "`calibrate_window` 513: the model takes at most 512",
        ),
        (lambda out: convert(BASE, ADAPTER, out, OWN, calibrate=TEXT), BadRecipe, "give `calibrate` self"),
        (lambda out: convert(BASE, ADAPTER, out, recipe(), calibrate="self"), BadRecipe, "give its file"),
        (lambda _: convert(BASE, ADAPTER, "s3://bucket/x", calibrate="self"), BadRecipe, "convert to a folder"),
        (lambda out: convert_batch([Job(out, ADAPTER, BASE, OWN)]), BadRecipe, "convert each adapter by itself"),
        (lambda _: Calibration.of(TEXT, seed=1), BadRecipe, "only `calibrate` self draws by chance"),
        (lambda _: Calibration(SELF, field="text"), BadRecipe, "there is no file"),
        (lambda _: Calibration(SELF, seed=-1), BadRecipe, "a whole number from 0 on"),
        (lambda _: Calibration("selfie"), BadRecipe, "the sha256 of a text, or self"),
        (lambda _: Calibration.of(TEXT, tokens=5), BadRecipe, "at least 128"),
        (lambda _: Calibration.of(TEXT, damping=0.0), BadRecipe, "above 0"),
    ]
    for act, error, message in cases:
        refused(tmp_path, act, error, message)


def test_the_plan_counts_the_memory_of_a_layer_and_the_time_of_the_text() -> None:
    plain = plan_conversion(BASE, ADAPTER).plan
    dry_run = plan_conversion(BASE, ADAPTER, recipe=recipe(), calibrate=TEXT)
    calibrated = dry_run.plan

    assert dry_run.estimate.calibrate > 0
    assert dry_run.estimate.seconds > dry_run.estimate.calibrate
    assert calibrated.memory > plain.memory
    assert all(len(one.tiles) == 2 for one in calibrated.tensors() if one.action == "quantize")


def test_the_command_line_calibrates_one_output(tmp_path: Path) -> None:
    common = ["--base", str(BASE), "--out", str(tmp_path / "out"), "--calibrate", str(TEXT)]
    settings = ["--calibrate-tokens", "1000", "--calibrate-window", "64", "--calibrate-field", "text"]

    done = invoke([*common, "--adapter", str(ADAPTER), *settings[:4], "-q"])
    several = invoke([*common, "--adapter", f"a={ADAPTER}", "--adapter", f"b={ADAPTER}"])
    itself = ["--base", str(BASE), "--out", str(tmp_path / "own"), "--adapter", str(ADAPTER), "--calibrate", "self"]
    own = invoke([*itself, "--calibrate-tokens", "256", "--calibrate-window", "8", "--calibrate-seed", "7", "-q"])
    without = invoke(["--base", str(BASE), "--out", str(tmp_path / "other"), *settings])

    assert done.exit_code == 0, done.output
    stated = json.loads((tmp_path / "out" / "conversion.json").read_text())["recipe"]["calibration"]
    assert (stated["tokens"], stated["window"]) == (1000, 64)
    assert own.exit_code == 0, own.output
    stated = json.loads((tmp_path / "own" / "conversion.json").read_text())["recipe"]["calibration"]
    assert (stated["text"], stated["tokens"], stated["window"], stated["seed"]) == ("self", 256, 8, 7)
    assert "--calibrate goes with one output" in several.output
    assert "has no meaning without --calibrate" in without.output
