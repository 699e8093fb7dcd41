"""The memory of a conversion does not grow with the model, and stays below what the plan predicts.

What counts is anonymous memory: pages of files that were read or written are the system's, and go when others come.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from converter import Recipe, convert, plan_conversion
from tests.conftest import REPOSITORY
from tests.folders import change_json
from tests.models import save_adapter, save_base

HIDDEN, INNER = 1024, 2048
FEW, MANY = 3, 12
"""Layers of the small model and of the large one."""
TOLERANCE = 28_000_000
"""Bytes: what allocators keep, and names and figures of more tensors. The same run's peak differs by up to 20 MB where
bitsandbytes quantizes; the larger output has 49 MB more."""

PROGRAM = """
import json, sys, threading
from pathlib import Path
from converter import Recipe, Resources, convert, plan_conversion

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

small, base, adapter, out, resources, recipe = sys.argv[1:]
recipe, resources = Recipe(**json.loads(recipe)), Resources(**json.loads(resources))
convert(f"{small}/base", f"{small}/adapter", f"{out}.small", recipe, resources)  # what is loaded once, is loaded now
before = peak = anonymous()
ended = threading.Event()

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
report = convert(base, adapter, out, recipe, resources)
ended.set()
watcher.join()
sizes = sum(path.stat().st_size for path in report.out.glob("*.safetensors"))
print(json.dumps([peak - before, report.plan.memory, report.plan.base_bytes, sizes]))
"""


class Measured(NamedTuple):
    peak: int
    """Bytes above what was there before."""
    predicted: int
    base: int
    written: int


class Model(NamedTuple):
    base: Path
    adapter: Path


def make_model(folder: Path, layers: int) -> Model:
    """A base of 21 MB a layer, one shard a layer, with random weights that all layers share; and an adapter."""
    base, adapter = folder / "base", folder / "adapter"
    small = save_base(folder / "template", "llama")
    save_adapter(adapter, small, "llama")
    base.mkdir()
    (base / "config.json").write_bytes((small / "config.json").read_bytes())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 64}
    change_json(base / "config.json", **sizes, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    weights = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}_layernorm.weight": random(HIDDEN) for name in ("input", "post_attention")}
    factors = {}
    weight_map = {}
    for layer in range(-1, layers):
        tensors = {f"model.layers.{layer}.{name}": weight for name, weight in weights.items()}
        if layer < 0:
            tensors = {f"{name}.weight": random(256, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
            tensors["model.norm.weight"] = random(HIDDEN)
        for name, (rows, columns) in shapes.items() if layer >= 0 else ():
            module = f"base_model.model.model.layers.{layer}.{name}"
            factors |= {f"{module}.lora_A.weight": random(8, columns), f"{module}.lora_B.weight": random(rows, 8)}
        file = f"model-{layer + 2:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, base / file)
        weight_map |= dict.fromkeys(tensors, file)
    save_file(factors, adapter / "adapter_model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Model(base, adapter)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def models(place: Path) -> dict[int, Model]:
    """By number of layers."""
    small = save_base(place / "small" / "base", "llama")
    save_adapter(place / "small" / "adapter", small, "llama")
    made = {layers: make_model(place / str(layers), layers) for layers in (FEW, MANY)}
    # transformers is asked now, and the processes to come find its answers.
    for base in (small, *(model.base for model in made.values())):
        plan_conversion(base, None)
    return made


def measure(
    place: Path,
    model: Model,
    out: Path,
    resources: dict[str, object],
    recipe: dict[str, object],
    program: str = PROGRAM,
) -> Measured:
    arguments = [place / "small", model.base, model.adapter, out, json.dumps(resources), json.dumps(recipe)]
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return Measured(*json.loads(ran.stdout))


@pytest.mark.parametrize(
    ("resources", "recipe"),
    [
        ({"threads": 2}, {}),
        pytest.param(
            {"threads": 1, "kernels": False, "memory": 120_000_000},
            {"merge_precision": "reference"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["kernels", "bitsandbytes"],
)
def test_four_times_the_model_takes_the_same_memory_and_no_more_than_predicted(
    place: Path, models: dict[int, Model], tmp_path: Path, resources: dict[str, object], recipe: dict[str, object]
) -> None:
    one, four = (measure(place, models[layers], tmp_path / str(layers), resources, recipe) for layers in (FEW, MANY))

    assert four.base > 3.5 * one.base
    assert four.written > one.written + 1.7 * TOLERANCE
    assert four.peak <= one.peak + TOLERANCE
    assert one.peak <= one.predicted
    assert four.peak <= four.predicted


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "int8", "fp8"])
def test_four_times_a_quantized_base_takes_the_same_memory_and_no_more_than_predicted(
    place: Path, models: dict[int, Model], tmp_path: Path, quant_type: str
) -> None:
    measured = []
    for layers in (FEW, MANY):
        base = tmp_path / f"base{layers}"
        convert(models[layers].base, None, base, Recipe(quant_type=quant_type))
        model = Model(base, models[layers].adapter)
        measured.append(measure(place, model, tmp_path / str(layers), {"threads": 2}, {"rounding": "adapter"}))

    one, four = measured
    assert four.written > 2.5 * one.written
    assert four.peak <= one.peak + TOLERANCE
    assert one.peak <= one.predicted
    assert four.peak <= four.predicted


BATCH = PROGRAM.replace("convert, plan_conversion", "convert, convert_batch, Job, BatchOptions").replace(
    "report = convert(base, adapter, out, recipe, resources)",
    """jobs = [Job(Path(f"{out}/{n}"), adapter, base, recipe) for n in range(int(out.rpartition("-")[2]))]
outcomes = convert_batch(jobs, BatchOptions(resources))
assert all(outcome.status == "made" for outcome in outcomes), outcomes""",
)
BATCH = BATCH[: BATCH.index("sizes = ")] + "print(json.dumps([peak - before, resources.memory, 0, 0]))\n"


@pytest.mark.slow
def test_eight_adapters_stay_within_the_memory_that_one_was_given(
    place: Path, models: dict[int, Model], tmp_path: Path
) -> None:
    resources: dict[str, object] = {"threads": 2, "memory": 120_000_000}
    for count in (1, 8):
        measured = measure(place, models[FEW], tmp_path / f"out-{count}", resources, {}, BATCH)
        assert measured.peak <= measured.predicted, count
