"""Folders that hold no adapter of PEFT, or more than one: named as what they are, with the step that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.errors import BadAdapter, Unsupported
from converter.merge.files import CONFIG, PICKLED, WEIGHTS
from converter.plan.adapters import open_adapter
from tests.hub_server import StandInHub
from tests.merge.adapters import opened, placed, refusal, save


def folder_of(place: Path, names: list[str]) -> Path:
    """A folder with these files, and folders where a name ends with a slash."""
    place.mkdir()
    for name in names:
        path = place / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"{}")
    return place


FORMATS = {
    "MLX without a config": (["adapters.safetensors"], "an adapter of MLX that lacks adapter_config.json or adapters."),
    "MLX's checkpoints": ([CONFIG, "0000100_adapters.safetensors"], "an adapter of MLX that lacks adapter_config.json"),
    "MLX of 2023": (
        [CONFIG, "adapters.npz"],
        "an adapter of MLX that lacks adapter_config.json or adapters.safetensors",
    ),
    "FSDP": (["__0_0.distcp", ".metadata"], "the shards of a distributed checkpoint (FSDP); put them together with"),
    "FSDP, with a config": ([CONFIG, "__0_0.distcp"], "the shards of a distributed checkpoint (FSDP); put them"),
    "around FSDP": (["pytorch_model_fsdp_0/", "trainer_state.json"], "the shards of a distributed checkpoint (FSDP)"),
    "DeepSpeed": (["zero_to_fp32.py", "latest"], "a checkpoint of DeepSpeed; run its zero_to_fp32.py, load what that"),
    "around DeepSpeed": (["global_step100/", CONFIG], "a checkpoint of DeepSpeed; run its zero_to_fp32.py, load what"),
    "diffusers": (["pytorch_lora_weights.safetensors"], "a LoRA of diffusers, for a model of images, which this tool"),
    "torchtune": ([CONFIG, "adapter_model.pt"], "an adapter in torchtune's own format; give `allow_pickle` to read"),
    "llama.cpp": (["lora-f16.gguf"], "an adapter for llama.cpp; give the one of PEFT that it was made from"),
    "several files": ([CONFIG, f"{WEIGHTS}.index.json"], "an adapter in several files, which PEFT never writes; join"),
    "a whole model": (["config.json", "model.safetensors"], "a whole model, no adapter; give it as `base`"),
    "pickled": (
        [CONFIG, PICKLED],
        "only pickled weights (adapter_model.bin); give `allow_pickle` to read them without",
    ),
    "nothing": (["README.md"], f"no {CONFIG}"),
    "no weights": ([CONFIG, "training_args.bin"], f"no {WEIGHTS}"),
    "no config": ([WEIGHTS], f"no {CONFIG}"),
}


@pytest.mark.parametrize(("names", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_folder_without_pefts_files_is_refused_as_what_it_is(names: list[str], expected: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter", names)

    assert refusal(folder, BadAdapter).startswith(expected)


def test_of_a_folder_around_adapters_the_adapters_are_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dpo", ["README.md", f"reference/{CONFIG}", f"policy/{CONFIG}", "runs/x"])

    message = refusal(folder, BadAdapter)

    assert message == f"no adapter itself, but its folders are: policy, reference; give one of them, as {folder}/policy"


def test_of_a_repository_around_adapters_the_adapters_are_listed_and_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(
        tmp_path / "dpo", ["README.md", f"reference/{CONFIG}", f"policy/{CONFIG}", f"policy/{WEIGHTS}", "runs/x"]
    )
    with StandInHub({"maker/dpo": folder}) as server:
        server.use(monkeypatch, tmp_path / "cache")
        with pytest.raises(BadAdapter) as caught:
            open_adapter("maker/dpo")

    assert str(caught.value).endswith(
        "no adapter itself, but its folders are: policy, reference; download one of them, as "
        "`hf download maker/dpo --include 'policy/*' --local-dir DIR`, and give DIR/policy"
    )


INTO_THE_FILE = (
    "put its tensors into the adapter's file, with modules_to_save, or move it elsewhere to convert without it"
)
A_VALUE_HEAD = "a value head is not part of any merged model; move it elsewhere to convert without it"
TRAINED_BESIDE = {
    "value_head.safetensors": A_VALUE_HEAD,
    "v_head.bin": A_VALUE_HEAD,
    "non_lora_trainables.bin": "give `allow_pickle` to take them, or move it elsewhere to convert without them",
    "non_lora_state_dict.bin": INTO_THE_FILE,
    "vit.safetensors": INTO_THE_FILE,
    "new_embeddings.safetensors": INTO_THE_FILE,
    "trainable_params.bin": INTO_THE_FILE,
    "mm_projector.pt": INTO_THE_FILE,
    "head.pth": INTO_THE_FILE,
    "ema.ckpt": INTO_THE_FILE,
}


@pytest.mark.parametrize(("name", "step"), TRAINED_BESIDE.items())
def test_weights_beside_an_adapter_are_never_left_out_in_silence(name: str, step: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    (folder / name).write_bytes(b"x")

    assert refusal(folder, Unsupported) == (
        f"{name} lies beside the adapter, and what was trained with it may be there: {step}"
    )


TRAINERS_FILES = """
    optimizer.pt optimizer.bin scheduler.pt scaler.pt rng_state_0.pth rng_state.pth random_states_0.pkl
    training_args.bin trainer_state.json adapter_model.bin adapter_model.pt
    sentencepiece.bpe.model tokenizer.model README.md
"""


def test_what_a_trainer_leaves_beside_an_adapter_does_no_harm(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    for name in TRAINERS_FILES.split():
        (folder / name).write_bytes(b"x")

    assert opened(folder).notes == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin"]
)
def test_that_a_whole_model_beside_an_adapter_is_left_out_is_said(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    (folder / name).write_bytes(b"x")

    assert placed(folder).notes == [f"{folder}: {name}, of a whole model, lies beside the adapter and is left out"]
