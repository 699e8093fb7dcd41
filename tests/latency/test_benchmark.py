"""Real models through transformers, and what surrounds vLLM. No time is held against a bound."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from converter import Combination, Recipe, convert
from converter.compare import Sources
from converter.errors import BadRecipe, ConversionFailed, ConversionRefused, Interrupted, Unsupported
from converter.latency.benchmark import Opening, Setting, benchmark_output
from converter.latency.in_transformers import InTransformers
from converter.latency.in_vllm import InVllm
from converter.latency.measure import MERGED, OUTPUT, UNMERGED, Server, Variant, Workload
from converter.observer import Observer
from tests.conftest import REPOSITORY
from tests.models import save_adapter

BASE, ADAPTER = REPOSITORY / "fixtures" / "tiny-base", REPOSITORY / "fixtures" / "tiny-adapter"
SHORT = Workload(prompt_tokens=5, new_tokens=4, rounds=1, requests=2)
ALL = {UNMERGED, MERGED, OUTPUT}


def through_transformers(setting: Setting) -> Server:
    return InTransformers(setting.dtype, setting.device, setting.tick)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(BASE, ADAPTER, tmp_path_factory.mktemp("made") / "out").out


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A command that stands in for vLLM's."""
    source = Path(__file__).with_name("stand_in.py").read_text()
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{source}")
    program.chmod(0o755)
    return program


def by_stand_in(program: Path, *arguments: str) -> Opening:
    return lambda setting: InVllm(str(program), setting.dtype, setting.room, setting.tick, arguments)


def asked_of(program: Path) -> list[list[str]]:
    return [json.loads(line) for line in program.with_name("asked.jsonl").read_text().splitlines()]


def test_all_three_generate_through_transformers(out: Path, tmp_path: Path) -> None:
    found = benchmark_output(out, Sources(BASE, ADAPTER), SHORT, [through_transformers], scratch=tmp_path)

    (server,) = found.servers
    assert (found.output, found.workload) == ("nf4", SHORT)
    assert (server.through, server.device, server.why_not) == ("transformers", "cpu", {})
    assert server.version.count(".") == 2
    assert server.latencies.keys() == server.ratios.keys() == ALL
    for of in server.latencies.values():
        for figure in (of.first_token, of.token, of.rate):
            assert 0 < figure.least <= figure.median <= figure.most < math.inf
    assert server.ratios[MERGED] == {"first_token": 1, "token": 1, "rate": 1}
    assert list(tmp_path.iterdir()) == [], "the merged model is still there"


def test_the_adapter_that_is_served_beside_its_base_is_in_effect(out: Path, tmp_path: Path) -> None:
    merged = convert(BASE, ADAPTER, tmp_path / "merged", Recipe("none")).out
    prompts = [list(range(start, start + 12)) for start in (40, 300, 900)]

    with InTransformers("bfloat16", "cpu", lambda: None).opened(Variant(UNMERGED, BASE, ADAPTER)) as session:
        answers = [list(session.generate(prompt, 6)) for prompt in prompts]

    assert [len(answer) for answer in answers] == [6, 6, 6]
    first = [answer[0] for answer in answers]
    assert first == [next_token(merged, prompt) for prompt in prompts]
    assert first != [next_token(BASE, prompt) for prompt in prompts]


def next_token(folder: Path, prompt: list[int]) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.inference_mode():
        return int(model(torch.tensor([prompt])).logits[0, -1].argmax())


def test_the_models_reach_vllm_with_the_arguments_that_they_need(out: Path, vllm: Path) -> None:
    found = benchmark_output(out, Sources(BASE, ADAPTER), SHORT, [by_stand_in(vllm, "--enforce-eager")])

    (server,) = found.servers
    assert (server.through, server.version, server.why_not) == ("vllm", "0.0.0", {})
    assert server.latencies.keys() == ALL
    asked = asked_of(vllm)
    assert [words[:2] for words in asked] == [["serve", words[1]] for words in asked]
    assert [words[1] for words in asked][::2] == [str(BASE), str(out)]
    common = ["--served-model-name", "model", "--host", "127.0.0.1", "--port"]
    for words in asked:
        assert words[2:7] == common
        assert words[8:12] == ["--dtype", "bfloat16", "--max-model-len", "9"]
        assert words[-1] == "--enforce-eager"
    module = json.dumps({"name": "adapter", "path": str(ADAPTER)})
    assert asked[0][12:-1] == ["--enable-lora", "--lora-modules", module, "--max-lora-rank", "8"]
    assert asked[1][12:-1] == asked[2][12:-1] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fail"], "it ended: ValueError: Unknown quantization method: bitsandbytes."),
        (["--refuse"], "/v1/completions: 404: The model `model` does not exist."),
        (["--old"], "this vLLM doesn't say which tokens it sends: 0.11 and later do"),
    ],
)
def test_what_vllm_says_against_a_model_is_passed_on(arguments: list[str], said: str, out: Path, vllm: Path) -> None:
    with pytest.raises(ConversionFailed, match="nothing could be measured: ") as refused:
        benchmark_output(out, Sources(BASE, ADAPTER), SHORT, [by_stand_in(vllm, *arguments)])

    assert f"vllm, {MERGED}: {said}" in str(refused.value)


def test_a_server_that_cannot_be_run_is_told_and_the_other_is_measured(out: Path, vllm: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text("nothing")

    servers = [by_stand_in(tmp_path / "vllm"), by_stand_in(vllm)]
    one, other = benchmark_output(out, Sources(BASE, ADAPTER), SHORT, servers).servers

    assert one.why_not == dict.fromkeys(ALL, f"{tmp_path / 'vllm'}: Permission denied")
    assert (one.latencies, one.ratios) == ({}, {})
    assert other.latencies.keys() == ALL


def test_ranks_are_rounded_up_to_those_that_vllm_takes(out: Path, vllm: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 20}}))

    with InVllm(str(vllm), "bfloat16", 9, lambda: None).opened(Variant(UNMERGED, BASE, adapter)):
        pass

    (words,) = asked_of(vllm)
    assert words[words.index("--max-lora-rank") + 1] == "32"


def test_several_adapters_are_measured_merged_only(vllm: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", BASE, "llama")
    recipe = Recipe(combine=Combination("cat", (0.5, 0.5)))
    made = convert(BASE, [ADAPTER, other], tmp_path / "out", recipe).out

    (server,) = benchmark_output(made, Sources(BASE, (ADAPTER, other)), SHORT, [by_stand_in(vllm)]).servers

    assert server.latencies.keys() == {MERGED, OUTPUT}
    assert server.why_not == {UNMERGED: "several adapters become one when they are merged"}


def test_of_a_base_alone_nothing_is_unmerged(vllm: Path, tmp_path: Path) -> None:
    made = convert(BASE, None, tmp_path / "out", Recipe("int8")).out

    found = benchmark_output(made, Sources(BASE), SHORT, [by_stand_in(vllm)])

    assert found.output == "int8"
    assert found.servers[0].why_not == {UNMERGED: "there is no adapter"}


def test_what_transformers_says_against_a_model_is_passed_on(tmp_path: Path) -> None:
    broken = shutil.copytree(BASE, tmp_path / "broken")
    (broken / "model-00002-of-00003.safetensors").write_bytes(b"nothing")
    server = InTransformers("bfloat16", "cpu", lambda: None)

    def load(variant: Variant) -> None:
        with server.opened(variant):
            pass

    with pytest.raises(Exception, match="Error") as said:
        load(Variant(OUTPUT, broken))
    assert "\n" not in str(said.value)
    dead = InTransformers("bfloat16", "cpu", lambda: None, program="import sys; sys.exit('no memory')")
    with pytest.raises(Exception, match="the process ended with 1: no memory"), dead.opened(Variant(OUTPUT, BASE)):
        pass


@pytest.mark.parametrize("which", ["transformers", "vllm"])
def test_an_end_may_be_asked_for_while_a_model_is_loaded(which: str, out: Path, vllm: Path) -> None:
    """The stop comes once the models are made, so it is asked for when measuring begins."""
    measuring: list[str] = []
    opening = through_transformers if which == "transformers" else by_stand_in(vllm)

    def stop() -> int | None:
        return signal.SIGTERM if len(measuring) > 0 else None

    observer = Observer(lambda how_far: measuring.extend(["now"] * (how_far.stage == "measuring")), stop)

    with pytest.raises(Interrupted, match="SIGTERM while latency was measured") as ended:
        benchmark_output(out, Sources(BASE, ADAPTER), SHORT, [opening], observer=observer)
    assert ended.value.exit_code == 143


def refusals(out: Path, folder: Path) -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    def run(out: Path = out, against: Any = Sources(BASE, ADAPTER), workload: Workload = SHORT) -> None:
        benchmark_output(out, against, workload, [through_transformers])

    untold = shutil.copytree(out, folder / "untold")
    config = json.loads((untold / "config.json").read_text())
    del config["vocab_size"]
    (untold / "config.json").write_text(json.dumps(config))
    return {
        "room": (
            lambda: run(workload=Workload(prompt_tokens=500, new_tokens=50)),
            BadRecipe,
            "`prompt_tokens` and `new_tokens` 550: the model takes at most 512 tokens",
        ),
        "vocabulary": (lambda: run(untold), Unsupported, "untold: config.json has no vocab_size"),
        "no folder": (lambda: run(folder / "nowhere"), ConversionRefused, "nowhere"),
        "receipt": (lambda: run(against=Sources()), ConversionFailed, "has no name in the receipt"),
        "adapter": (lambda: run(against=Sources(ADAPTER, BASE)), ConversionRefused, "swap `base` and `adapter`"),
    }


@pytest.mark.parametrize("case", ["room", "vocabulary", "no folder", "receipt", "adapter"])
def test_what_cannot_be_measured_is_refused(case: str, out: Path, tmp_path: Path) -> None:
    measure, kind, said = refusals(out, tmp_path)[case]

    with pytest.raises(kind, match=said):
        measure()
