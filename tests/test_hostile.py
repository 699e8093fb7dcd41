"""Hostile inputs, as a user meets them: refused in one line with exit code 2 and nothing written, or accepted.

What single parsers make of them is in test_read.py, test_adapter.py, test_match.py and test_architecture.py; files of
the Hub are in test_hub.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter
from converter.cli.main import main
from converter.errors import BadOutput, ConverterError, InputChanged, WriteFailed
from converter.observer import Progress
from converter.seal.destination import Destination
from tests.conftest import REPOSITORY
from tests.folders import change_json, contents, copy, flip_bit, write_sums
from tests.limits import HANG, cpu_below, no_hang
from tests.models import save_originals

CONFIG, INDEX, ADAPTER_CONFIG = "config.json", "model.safetensors.index.json", "adapter_config.json"
SHARD, WEIGHTS = "model.safetensors", "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB")
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TOKEN = "hf_" + "SecretSecretSecretSecret" + "1234567890"

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_originals(tmp_path_factory.mktemp("originals"))
    for base in ("base", "sharded"):
        shutil.copyfile(REPOSITORY / "fixtures" / "tiny-base" / "tokenizer.json", folder / base / "tokenizer.json")
    return folder


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Path:
    """base, sharded and adapter, to be damaged; and nothing else."""
    return copy(originals, tmp_path / "place")


pytestmark = pytest.mark.usefixtures("signal_handlers")


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a folder: kinds, sizes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns)
    return found


def converted(place: Path, capfd: pytest.CaptureFixture[str], *options: str, base: str = "base") -> tuple[int, str]:
    """Exit code and error of a conversion; a refusal is checked for what is true of every refusal."""
    before = tree(place)
    capfd.readouterr()
    with no_hang(), cpu_below(20), pytest.raises(SystemExit) as ended:
        main([f"--base={place / base}", f"--adapter={place / 'adapter'}", f"--out={place / 'out'}", *options])
    said = capfd.readouterr()
    code = int(str(ended.value.code))
    if code != 0:
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.err.rstrip("\n").isprintable()
        assert len(said.err) < 2_500
        assert "(-v shows where)" not in said.err  # foreseen
        assert tree(place) == before
    return code, said.err


def opened(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(file: Path, header: object, body: bytes = b"", *, length: int | None = None) -> None:
    """Write a safetensors file, right or wrong: `header` as JSON, or as it is where it is bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def header(change: Callable[[dict[str, Any]], object], *, file: str = f"base/{SHARD}") -> Damage:
    """Change a file's header in place, or for what is returned."""

    def damage(place: Path) -> None:
        entries, body = opened(place / file)
        put(place / file, change(entries) or entries, body)

    return damage


def q_proj(**changes: object) -> Damage:
    return header(lambda entries: entries[Q_PROJ].update(changes))


def named(name: str) -> Damage:
    """The base has one more tensor, without elements, of this name."""
    return header(lambda entries: entries.update({name: empty_tensor([0])}))


def empty_tensor(shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}


def whole(file: str, raw: bytes) -> Damage:
    return lambda place: (place / file).write_bytes(raw)


def settings(file: str, **changes: object) -> Damage:
    return lambda place: change_json(place / file, **changes)


def weight_map(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(place: Path) -> None:
        index = json.loads((place / "sharded" / INDEX).read_text())
        change(index["weight_map"])
        (place / "sharded" / INDEX).write_text(json.dumps(index))

    return damage


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(place: Path) -> None:
        tensors = load_file(place / "adapter" / WEIGHTS)
        change(tensors)
        save_file(tensors, place / "adapter" / WEIGHTS)

    return damage


def linked(file: str, target: str) -> Damage:
    def damage(place: Path) -> None:
        (place / file).unlink(missing_ok=True)
        (place / file).symlink_to(target)

    return damage


def sparse(file: str, size: int) -> Damage:
    """A file of a size that takes no disk."""

    def damage(place: Path) -> None:
        with (place / file).open("wb") as stream:
            stream.truncate(size)

    return damage


def shift(entries: dict[str, Any], name: str, by: int) -> None:
    entries[name]["data_offsets"] = [offset + by for offset in entries[name]["data_offsets"]]


def first_and_last(entries: dict[str, Any]) -> tuple[str, str]:
    ordered = sorted((n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"][0])
    return ordered[0], ordered[-1]


def append(file: str, raw: bytes) -> Damage:
    return lambda place: (place / file).write_bytes((place / file).read_bytes() + raw)


def cut(file: str, by: int) -> Damage:
    return lambda place: os.truncate(place / file, (place / file).stat().st_size - by)


def duplicate_key(place: Path) -> None:
    entries, body = opened(place / "base" / SHARD)
    again = json.dumps({Q_PROJ: entries[Q_PROJ]})[1:]
    put(place / "base" / SHARD, json.dumps(entries)[:-1].encode() + b", " + again.encode(), body)


def a_shard(place: Path) -> Path:
    return min((place / "sharded").glob("model-*.safetensors"))


def shard_outside(place: Path) -> None:
    shard = a_shard(place)
    shard.rename(place / "outside.safetensors")
    shard.symlink_to(place / "outside.safetensors")


def same_tensor_twice(place: Path) -> None:
    first, second = sorted((place / "sharded").glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file({**tensors, name: value}, second)


def _map_name(change: Callable[[str], str]) -> Damage:
    def first(names: dict[str, str]) -> None:
        tensor = min(names)
        names[tensor] = change(names[tensor])

    return weight_map(first)


class Touch:
    """What a pickle does when it is loaded, or would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/nobody-unpickles-this",)


def only_pickles(folder: str, name: str) -> Damage:
    def damage(place: Path) -> None:
        for file in (place / folder).glob("*.safetensors"):
            file.unlink()
        (place / folder / name).write_bytes(pickle.dumps(Touch()))

    return damage


def code_in(file: str, module: str, auto_map: object) -> Damage:
    """A config that names Python code, which would leave a file behind if anyone imported it."""

    def damage(place: Path) -> None:
        folder = (place / file).parent
        (folder / f"{module}.py").write_text(f"open({str(place / 'imported')!r}, 'w')\n")
        if not (place / file).exists():
            (place / file).write_text("{}")
        change_json(place / file, auto_map=auto_map)

    return damage


REFUSED: dict[str, tuple[str, Damage, str]] = {
    # row by row: which base is converted, what is done to it, what is said
    "an empty shard": ("base", whole(f"base/{SHARD}", b""), "model.safetensors: 0 bytes, too short"),
    "a shard of seven bytes": ("base", whole(f"base/{SHARD}", b"\0" * 7), "model.safetensors: 7 bytes, too short"),
    "a header length of 2^64-1": ("base", lambda p: put(p / "base" / SHARD, {}, length=2**64 - 1), "expected at most"),
    "a header length over 100 MB": ("base", sparse(f"base/{SHARD}", 200 << 20), "does not begin with '{'"),
    "a header longer than the file": ("base", lambda p: put(p / "base" / SHARD, {}, length=9), "truncated?"),
    "a header of 26 MB": (
        "base",
        lambda p: put(p / "base" / SHARD, b"{" + b" " * 26_000_000 + b"}"),
        "header of 26,000,002 bytes, expected at most 25,000,000",
    ),
    "tensors that overlap": ("base", header(lambda e: shift(e, first_and_last(e)[1], -2)), "overlaps"),
    "a hole between tensors": ("base", header(lambda e: shift(e, first_and_last(e)[1], 2)), "leaves a hole"),
    "a hole before the first tensor": (
        "base",
        header(lambda e: [shift(e, n, 2) for n in e if n != "__metadata__"] and None),
        "leaves a hole before it",
    ),
    "bytes after the last tensor": ("base", append(f"base/{SHARD}", b"rest"), "truncated or padded?"),
    "a body that is cut off": ("base", cut(f"base/{SHARD}", 100), "truncated or padded?"),
    "a shape that is not the span's": ("base", q_proj(shape=[64, 65]), "q_proj.weight' spans 8,192 bytes"),
    "an end before its begin": ("base", q_proj(data_offsets=[9, 1]), "q_proj.weight' has the offsets [9, 1]"),
    "negative offsets": ("base", q_proj(data_offsets=[-8192, 0]), "q_proj.weight' has the offsets [-8192, 0]"),
    "a negative size": ("base", q_proj(shape=[-64, -64]), "q_proj.weight' has the shape [-64, -64]"),
    "sizes with a fraction": ("base", q_proj(shape=[64.0, 64]), "q_proj.weight' has the shape [64.0, 64]"),
    "an unknown dtype": ("base", q_proj(dtype="F7"), "q_proj.weight' has the unknown dtype 'F7'"),
    "a header without a bottom": ("base", lambda p: put(p / "base" / SHARD, DEEP), "nested too deeply"),
    "a header that is not UTF-8": ("base", lambda p: put(p / "base" / SHARD, b'{"\xff": 1}'), "not valid JSON"),
    "metadata that are not strings": (
        "base",
        header(lambda e: e.update(__metadata__={"format": 1})),
        "__metadata__ is not a mapping of strings",
    ),
    "a product of 2^74": ("base", q_proj(shape=[2**32, 2**32, 2**10]), "q_proj.weight' spans 8,192 bytes"),
    "a product that wraps to the right size": (
        "base",
        q_proj(shape=[4_294_967_298, 4_294_967_298, 4_611_686_018_427_387_905 << 10]),
        "q_proj.weight' has the shape",
    ),
    "a tensor that is named twice": ("base", duplicate_key, "q_proj.weight' occurs twice"),
    "space before the header": (
        "base",
        lambda p: put(p / "base" / SHARD, b" " + json.dumps(opened(p / "base" / SHARD)[0]).encode()),
        "does not begin with '{'",
    ),
    "a tensor of thousand dimensions": (
        "base",
        header(lambda e: e.update(x=empty_tensor([0] * 1000))),
        "'x' has the shape",
    ),
    "a name that turns direction": ("base", named("model\u202egpj.exe"), r"'model\u202egpj.exe' is empty, too long or"),
    "a name of ten thousand characters": ("base", named("x" * 10_000), "is empty, too long or not printable"),
    "a name with NUL": ("base", named("x\0y"), r"'x\x00y' is empty, too long or not printable"),
    "a name that clears the screen": ("base", named("\x1b[2J"), r"'\x1b[2J' is empty, too long or not printable"),
    "a name with a line break": ("base", named("x\nerror: all is well"), "is empty, too long or not printable"),
    "a tensor without a name": ("base", named(""), "'' is empty, too long or not printable"),
    "a weight map that leaves the folder": ("sharded", _map_name(lambda s: f"../base/{s}"), "expected a file inside"),
    "a weight map with an absolute path": ("sharded", _map_name(lambda s: f"/etc/{s}"), "expected a file inside"),
    "a weight map with a backslash": ("sharded", _map_name(lambda s: f"..\\{s}"), "expected a file inside the folder"),
    "a weight map with NUL": ("sharded", _map_name(lambda s: f"\0{s}"), "which is not a plain file of the folder"),
    "a weight map to another kind of file": ("sharded", _map_name(lambda _: "../../etc/passwd"), "expected a .safeten"),
    "a shard that is a link out of the folder": ("sharded", shard_outside, "is a link to"),
    "a weight map that is a list": (
        "sharded",
        lambda p: change_json(p / "sharded" / INDEX, weight_map=["model.safetensors"]),
        "no weight_map",
    ),
    "a tensor in two shards": ("sharded", same_tensor_twice, "is in two shards, model-0"),
    "a shard that is missing": ("sharded", lambda p: a_shard(p).unlink(), "which is not a plain file of the folder"),
    "a shard that is cut off": (
        "sharded",
        lambda p: os.truncate(a_shard(p), a_shard(p).stat().st_size - 1),
        "truncated or padded?",
    ),
    "weights that are a link to a file of the system": ("base", linked(f"base/{SHARD}", "/etc/passwd"), "is a link to"),
    "weights that are a link to a folder": ("base", linked(f"base/{SHARD}", "/etc"), "is a link to"),
    "weights that are a link to nothing": ("base", linked(f"base/{SHARD}", "nothing"), "is a link to"),
    "weights that are a link to a device": ("base", linked(f"base/{SHARD}", "/dev/zero"), "is a link to"),
    "a config that is a link out of the folder": (
        "base",
        linked(f"base/{CONFIG}", "../adapter/x"),
        "config.json is a link to ../adapter/x",
    ),
    "a config that names code": (
        "base",
        code_in(f"base/{CONFIG}", "evil", {"AutoModelForCausalLM": "evil.Model"}),
        "config.json names Python code of the base (auto_map)",
    ),
    "a config that names code of another repository": (
        "base",
        settings(f"base/{CONFIG}", auto_map={"AutoConfig": "somebody/evil--evil.Config"}),
        "config.json names Python code of the base (auto_map)",
    ),
    "a tokenizer that names code": (
        "base",
        code_in("base/tokenizer_config.json", "evil", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        "tokenizer_config.json names Python code (evil.py)",
    ),
    "a tokenizer that names code in the old way": (
        "base",
        code_in("base/tokenizer_config.json", "evil", ["evil.Tokenizer", None]),
        "tokenizer_config.json names Python code (evil.py)",
    ),
    "a tokenizer that names code of another repository": (
        "base",
        code_in("base/tokenizer_config.json", "evil", {"AutoTokenizer": ["somebody/evil--evil.Tokenizer", None]}),
        "tokenizer_config.json names Python code (somebody/evil--evil.Tokenizer)",
    ),
    "a processor that names code": (
        "base",
        code_in("base/preprocessor_config.json", "evil", {"AutoProcessor": "evil.Processor"}),
        "preprocessor_config.json names Python code (evil.py)",
    ),
    "a config without a bottom": ("base", whole(f"base/{CONFIG}", DEEP), "config.json: nested too deeply"),
    "a config that is nested 500 deep": (
        "base",
        lambda p: change_json(p / "base" / CONFIG, note=json.loads("[" * 500 + "]" * 500)),
        "config.json: nested too deeply",
    ),
    "an index without a bottom": ("sharded", whole(f"sharded/{INDEX}", DEEP), "index.json: nested too deeply"),
    "an adapter's config without a bottom": (
        "base",
        whole(f"adapter/{ADAPTER_CONFIG}", DEEP),
        "adapter_config.json: nested too deeply",
    ),
    "an adapter's tokenizer without a bottom": (
        "base",
        whole("adapter/tokenizer.json", DEEP),
        "tokenizer.json: not a tokenizer",
    ),
    "a NaN in a config": (
        "base",
        settings(f"base/{CONFIG}", rms_norm_eps=float("nan")),
        "config.json: not valid JSON: NaN is not a value",
    ),
    "less than no layers": ("base", settings(f"base/{CONFIG}", num_hidden_layers=-1), "model.layers.0.mlp.down_proj"),
    "a vocabulary of 2^40": ("base", settings(f"base/{CONFIG}", vocab_size=2**40), "but the config makes it ["),
    "a billion layers": (
        "base",
        settings(f"base/{CONFIG}", num_hidden_layers=10**9),
        "num_hidden_layers 1,000,000,000",
    ),
    "a class name of a megabyte": (
        "base",
        settings(f"base/{CONFIG}", architectures=["x" * 1_000_000]),
        "config.json: transformers",
    ),
    "pickled weights": ("base", only_pickles("base", "pytorch_model.bin"), "only pickled weights (.bin)"),
    "an adapter's pickled weights": ("base", only_pickles("adapter", "adapter_model.bin"), "only pickled weights (ad"),
    "a NaN in a factor": (
        "base",
        adapter_tensors(lambda t: t[B].view(-1)[5].fill_(torch.nan)),
        "holds a NaN or an inf",
    ),
    "an infinity in a factor": ("base", adapter_tensors(lambda t: t[A].view(-1)[5].fill_(torch.inf)), "holds a NaN or"),
    "an alpha that is NaN": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", lora_alpha=float("nan")),
        "NaN is not a value",
    ),
    "an alpha that is infinite": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", lora_alpha=float("inf")),
        "lora_alpha 'inf' for model.layers.0",
    ),
    "a factor without the other": ("base", adapter_tensors(lambda t: t.pop(B)), "q_proj: has lora_A, but no lora_B"),
    "a delta for a layer that is not there": (
        "base",
        adapter_tensors(lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in (A, B)})),
        "layers.9.self_attn.q_proj: in the adapter, but the base has no such module; the nearest name there is mod",
    ),
    "a delta for a path": (
        "base",
        adapter_tensors(lambda t: t.update({k.replace("model.layers.0", "../../etc"): t.pop(k) for k in (A, B)})),
        "../../etc.self_attn.q_proj: in the adapter, but the base has no such module",
    ),
    "factors of another rank": (
        "base",
        adapter_tensors(lambda t: t.update({A: torch.zeros(4, 64)})),
        "lora_A is [4, 64] and lora_B [64, 8]: their ranks differ",
    ),
    "factors for another model": (
        "base",
        adapter_tensors(lambda t: t.update({B: torch.ones(32, 8)})),
        "lora_B·lora_A is [32, 64], the base's weight [64, 64]: was the adapter trained on another base?",
    ),
    "another kind of adapter": ("base", settings(f"adapter/{ADAPTER_CONFIG}", peft_type="EVIL"), "peft_type 'EVIL'"),
    "a kind of adapter of a megabyte": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", peft_type="x" * 1_000_000),
        "this tool merges LORA",
    ),
    "a rank of nothing": ("base", settings(f"adapter/{ADAPTER_CONFIG}", r=0, rank_pattern={}), "rank 0 for"),
    "targets that match nothing": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", target_modules=["nothing"]),
        "but its target_modules don't name it",
    ),
    "an option that changes the mathematics": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", use_dora=True),
        "use_dora is true, but the file lacks lora_magnitude_vector",
    ),
    "an option that nobody knows": (
        "base",
        settings(f"adapter/{ADAPTER_CONFIG}", use_evil={"a": [1]}),
        "use_evil = ",
    ),
    "a merged model for an adapter": (
        "base",
        lambda p: (shutil.rmtree(p / "adapter"), shutil.copytree(p / "base", p / "adapter")),
        "a whole model, no adapter; give it as --base",
    ),
    "a sparse config of 60 MB": ("base", sparse(f"base/{CONFIG}", 60_000_000), "config.json has 60,000,000 bytes"),
    "a sparse index of 60 MB": ("sharded", sparse(f"sharded/{INDEX}", 60_000_000), "index.json has 60,000,000 bytes"),
    "a sparse adapter config of 60 MB": (
        "base",
        sparse(f"adapter/{ADAPTER_CONFIG}", 60_000_000),
        "adapter_config.json has 60,000,000 bytes",
    ),
    "a sparse tokenizer of 10 GB": (
        "base",
        sparse("base/tokenizer.json", 10_000_000_000),
        "tokenizer.json",
    ),
    "a sparse tokenizer of the adapter's": (
        "base",
        sparse("adapter/tokenizer.json", 10_000_000_000),
        "tokenizer.json",
    ),
    "a hundred sparse vocabularies": (
        "base",
        lambda p: [sparse(f"base/vocab-{number}.txt", 150_000_000)(p) for number in range(100)],
        "and other files beside the weights have more than 200,000,000 bytes",
    ),
    "a sparse adapter": ("base", sparse(f"adapter/{WEIGHTS}", 10_000_000_000), "does not begin with '{'"),
    "a tokenizer whose ids are infinite": (
        "base",
        whole("adapter/tokenizer.json", b'{"model": {"vocab": {"a": 1e999}}}'),
        "tokenizer.json: not a tokenizer",
    ),
    "a tokenizer without a vocabulary": (
        "base",
        whole("adapter/tokenizer.json", b'{"model": {"vocab": null}}'),
        "tokenizer.json: not a tokenizer",
    ),
    "a config that grows when it is indented": (
        "base",
        lambda p: change_json(p / "base" / CONFIG, note=json.loads("[" * 60 + "0,0," * 200_000 + "0" + "]" * 60)),
        "config.json has more than 5,000,000 bytes when it is indented",
    ),
    "ten million values in a config": (
        "base",
        lambda p: change_json(p / "base" / CONFIG, note=[0] * 10_000_000),
        "config.json",
    ),
}


@pytest.mark.parametrize(("base", "damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_in_one_line_and_nothing_is_written(
    base: str, damage: Damage, words: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(place)

    code, said = converted(place, capfd, base=base)

    assert (code, words in said) == (2, True), said


def a_pickle_beside(place: Path) -> None:
    (place / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    (place / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Touch()))


ACCEPTED: dict[str, Damage] = {
    "a kind of quantization of a megabyte": settings(
        f"base/{CONFIG}", quantization_config={"quant_method": "x" * 1_000_000}
    ),
    "a quantization that no tensor has": settings(f"base/{CONFIG}", quantization_config={"quant_method": "gptq"}),
    "an entry with a field that nobody knows": q_proj(note="evil", code={"run": ["evil"]}),
    "a tensor without elements": named("nothing"),
    "a tensor that is named like a path": named("../../etc/passwd"),
    "a tensor that is named in Chinese": named("权重"),
    "a tensor of 2^62 rows without elements": header(lambda e: e.update(x=empty_tensor([2**62, 0], "F32"))),
    "a tensor of 2^62 columns without rows": header(lambda e: e.update(x=empty_tensor([0, 2**62], "F16"))),
    "a pickle beside the weights": a_pickle_beside,
    "ten thousand patterns": settings(
        f"adapter/{ADAPTER_CONFIG}", rank_pattern={f"x{number}": 8 for number in range(10_000)}
    ),
    "an expression that takes years": settings(f"adapter/{ADAPTER_CONFIG}", rank_pattern={"(a+)+$": 4}),
    "a mapping to code, of the adapter": settings(
        f"adapter/{ADAPTER_CONFIG}", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}
    ),
    "a kernel of somebody's": settings(f"base/{CONFIG}", _attn_implementation="somebody/evil", use_kernels=True),
    "layers that are an empty text": settings(f"adapter/{ADAPTER_CONFIG}", layers_to_transform=""),
    "a hundred thousand targets": settings(
        f"adapter/{ADAPTER_CONFIG}",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        + [f"layers.{number}.nothing" for number in range(300_000)],
    ),
}


@pytest.mark.parametrize("damage", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_it_is_accepted_and_changes_no_other_tensor(
    damage: Damage, place: Path, capfd: pytest.CaptureFixture[str], reference: dict[str, torch.Tensor]
) -> None:
    damage(place)
    before = tree(place)

    code, said = converted(place, capfd)

    assert (code, said) == (0, "")
    made = load_file(place / "out" / SHARD)
    assert all(torch.equal(made[name], value) for name, value in reference.items())
    after = tree(place)
    assert {name for name in after if name not in before} == {"out"} | {f"out/{n}" for n in os.listdir(place / "out")}
    assert {n for n in os.listdir(place / "out") if n.endswith((".bin", ".py"))} == set()
    assert {name: after[name] for name in before} == before


@pytest.fixture(scope="module")
def reference(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the undamaged inputs give."""
    out = tmp_path_factory.mktemp("reference") / "out"
    converter.convert(originals / "base", originals / "adapter", out)
    tensors: dict[str, torch.Tensor] = load_file(out / SHARD)
    return tensors


def test_code_that_inputs_name_is_never_run_even_where_it_is_allowed_to_be_copied(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code_in(f"base/{CONFIG}", "evil", {"AutoModelForCausalLM": "evil.Model"})(place)
    code_in("base/tokenizer_config.json", "evil", {"AutoTokenizer": ["evil.Tokenizer", None]})(place)
    settings(f"adapter/{ADAPTER_CONFIG}", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})(place)
    monkeypatch.chdir(place / "base")
    monkeypatch.syspath_prepend(str(place / "base"))

    code, said = converted(place, capfd, "--trust-remote-code")

    assert (code, said) == (0, "")
    assert (place / "out" / "evil.py").read_bytes() == (place / "base" / "evil.py").read_bytes()
    assert not (place / "imported").exists()
    assert "evil" not in sys.modules


def test_an_adapter_that_names_a_base_in_the_home_of_nobody_is_refused(place: Path) -> None:
    change_json(place / "adapter" / ADAPTER_CONFIG, base_model_name_or_path="~nobody-of-this-name/x")

    with pytest.raises(converter.errors.ConversionRefused, match="~nobody-of-this-name/x"):
        converter.convert(None, place / "adapter", place / "out")


# Values, and files that change


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
def test_a_base_with_a_value_that_is_not_finite_fails_with_1_and_leaves_nothing(
    value: float, name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(place / "base" / SHARD)
    tensors[name].view(-1)[7] = value
    save_file(tensors, place / "base" / SHARD)

    code, said = converted(place, capfd)

    assert code == 1
    assert name in said


def test_a_base_that_its_adapter_cancels_but_for_rounding_gets_a_receipt_that_is_json(place: Path) -> None:
    factors, tensors = load_file(place / "adapter" / WEIGHTS), load_file(place / "base" / SHARD)
    factors[A].zero_()[0, 0] = 1 / 3
    factors[B].zero_()[0, 0] = 1 / 7
    tensors = {name: value.float() for name, value in tensors.items()}
    tensors[Q_PROJ].zero_()[0, 0] = (factors[B] @ factors[A])[0, 0] * -2
    save_file(factors, place / "adapter" / WEIGHTS)
    save_file(tensors, place / "base" / SHARD)

    out = converter.convert(
        place / "base", place / "adapter", place / "out", converter.Recipe(merge_precision="reference")
    ).out

    receipt = json.loads((out / "conversion.json").read_text(), parse_constant=pytest.fail)
    assert receipt["tensors"][Q_PROJ]["error"] == "Infinity"


class Change(Exception):
    """What a test does to an input while it is read went wrong."""


@pytest.mark.parametrize("by", ["bytes", "the whole"])
@pytest.mark.parametrize("file", ["a shard", "the adapter"])
def test_a_file_that_shrinks_while_it_is_read_fails_with_1_and_leaves_nothing(by: str, file: str, place: Path) -> None:
    path = max((place / "sharded").glob("model-*.safetensors")) if file == "a shard" else place / "adapter" / WEIGHTS
    size = 0 if by == "the whole" else path.stat().st_size - 9_000
    before = set(os.listdir(place))

    def shrink(progress: Progress) -> None:
        if progress.stage == "converting" and path.stat().st_size > size:
            os.truncate(path, size)

    with pytest.raises(InputChanged) as failed:
        converter.convert(place / "sharded", place / "adapter", place / "out", progress=shrink)

    assert failed.value.exit_code == 1
    assert path.name in str(failed.value)
    assert set(os.listdir(place)) == before


@pytest.mark.parametrize("file", ["a shard", "the adapter"])
@pytest.mark.parametrize("how", ["in place", "by another"])
def test_a_file_that_changes_after_it_was_planned_with_fails_with_1_and_leaves_nothing(
    file: str, how: str, place: Path
) -> None:
    path = a_shard(place) if file == "a shard" else place / "adapter" / WEIGHTS
    write_sums(place / "sharded")
    other = place / "other"
    shutil.copyfile(path, other)
    flip_bit(other)
    before = set(os.listdir(place))

    def change(progress: Progress) -> None:
        # The first of the shards is hashed by then, and the adapter was checked when it was opened.
        if progress.stage == "checking" and progress.done == progress.total:
            if how == "in place":
                path.write_bytes(other.read_bytes())
            else:
                shutil.copyfile(other, place / "new").rename(path)

    with pytest.raises(InputChanged, match=f"{path.name}: changed while it was being read"):
        converter.convert(place / "sharded", place / "adapter", place / "out", progress=change)

    assert set(os.listdir(place)) == before


# Things that are not files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 107 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


THINGS: dict[str, Callable[[Path], object]] = {
    "pipe": fifo,
    "socket": unix_socket,
    "device": device,
    "folder": lambda path: path.mkdir(),
    "link to a pipe": lambda path: (fifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "link to a file outside": lambda path: path.symlink_to("/etc/passwd"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


def raised_by(action: Callable[[], object]) -> BaseException | None:
    """What an action raises; it must not hang."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG)
    assert not thread.is_alive(), "it hangs"
    return raised[0] if raised else None


@pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
@pytest.mark.parametrize("name", [f"sharded/{CONFIG}", f"sharded/{INDEX}", f"adapter/{ADAPTER_CONFIG}",
                                  f"adapter/{WEIGHTS}", "sharded/shard"])  # fmt: skip
def test_what_is_not_a_file_in_the_place_of_one_that_is_needed_is_refused_without_waiting(
    name: str, make: Callable[[Path], object], place: Path
) -> None:
    path = a_shard(place) if name == "sharded/shard" else place / name
    path.unlink()
    make(path)

    raised = raised_by(lambda: converter.convert(place / "sharded", place / "adapter", place / "out"))

    assert isinstance(raised, ConverterError)
    assert raised.exit_code == 2
    assert str(raised).isprintable()
    assert not (place / "out").exists()
    assert not (place / "out.partial").exists()


@pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"])
def test_what_is_not_a_file_in_the_place_of_one_that_is_copied_is_left_out(
    name: str, make: Callable[[Path], object], place: Path
) -> None:
    (place / "base" / name).unlink(missing_ok=True)
    make(place / "base" / name)

    raised = raised_by(lambda: converter.convert(place / "base", place / "adapter", place / "out"))

    assert raised is None
    assert name not in os.listdir(place / "out")
    assert not any("root:" in raw.decode("latin-1") for file, raw in contents(place / "out").items() if file != SHARD)


@pytest.mark.parametrize("name", [f"LICENSE\n{'0' * 64}  {SHARD}", "LICENSE\x1b[2J", "LICENSE\udcff", "NOTICE\u202e"])
def test_a_file_whose_name_is_no_line_of_text_is_not_copied(name: str, place: Path) -> None:
    (place / "base" / name).write_text("")
    assert raised_by(lambda: converter.convert(place / "base", place / "adapter", place / "out")) is None
    assert name not in os.listdir(place / "out")
    sums = (place / "out" / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in sums} == set(os.listdir(place / "out")) - {"SHA256SUMS", "README.md"}


# OUT, and what lies in its place


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


STAGED = [".lock", SHARD, *(name + end for name in (".journal", CONFIG) for end in ("", ".unfinished"))]
STAGED += [f"{name}.unfinished" for name in (SHARD, "README.md", "conversion.json", "tokenizer.json")]


def staging_of_somebody(place: Path, name: str, plant: Callable[[Path], object]) -> None:
    (place / "out.partial").mkdir()
    (place / "out.partial" / ".lock").touch()
    (place / "out.partial" / name).unlink(missing_ok=True)
    plant(place / "out.partial" / name)


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_that_waits_in_the_staging_folder_is_not_written_through(
    name: str, kind: str, place: Path, victim: Path
) -> None:
    staging_of_somebody(place, name, lambda p: p.symlink_to(victim) if kind == "symbolic" else p.hardlink_to(victim))

    raised = raised_by(lambda: converter.convert(place / "base", place / "adapter", place / "out"))

    assert victim.read_text() == "precious"
    assert raised is None or isinstance(raised, BadOutput | WriteFailed)
    if raised is None:
        assert all(not path.is_symlink() for path in (place / "out").iterdir())


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("make", [fifo, lambda path: path.mkdir()], ids=["pipe", "folder"])
def test_what_is_not_a_file_in_the_staging_folder_makes_nobody_wait(
    name: str, make: Callable[[Path], object], place: Path
) -> None:
    staging_of_somebody(place, name, make)

    raised = raised_by(lambda: converter.convert(place / "base", place / "adapter", place / "out"))

    assert raised is None or isinstance(raised, BadOutput | WriteFailed)


def test_a_link_in_the_place_of_the_staging_folder_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (place / "out.partial").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BadOutput, match=r"out\.partial: exists and is not a staging folder"):
        converter.convert(place / "base", place / "adapter", place / "out")

    assert os.listdir(tmp_path / "elsewhere") == []


def test_an_out_that_is_a_link_is_where_the_link_leads_and_stays_a_link(place: Path, tmp_path: Path) -> None:
    (place / "out").symlink_to(tmp_path / "volume" / "out")

    converter.convert(place / "base", place / "adapter", place / "out")

    assert (place / "out").is_symlink()
    assert (tmp_path / "volume" / "out" / SHARD).is_file()
    assert os.listdir(tmp_path / "volume") == ["out"]


@pytest.mark.parametrize("target", ["/etc", "/etc/passwd"])
def test_an_out_that_is_a_link_to_what_is_not_ours_is_refused(target: str, place: Path) -> None:
    (place / "out").symlink_to(target)

    with pytest.raises(BadOutput):
        converter.convert(place / "base", place / "adapter", place / "out", overwrite=True)


RECEIPTS: dict[str, Callable[[Path], object]] = {
    "without a bottom": lambda path: path.write_bytes(DEEP),
    "of 60 MB": lambda path: (path.write_bytes(b""), os.truncate(path, 60_000_000)),
    "that is a pipe": fifo,
    "that is a link": lambda path: path.symlink_to("/etc/passwd"),
    "with paths for names": lambda path: path.write_text(
        json.dumps({"format": 2, "fingerprint": "x", "files": {"../../victim": {"bytes": 1}, "/etc/passwd": {}}})
    ),
}


@pytest.mark.parametrize("plant", RECEIPTS.values(), ids=RECEIPTS.keys())
def test_a_strange_receipt_in_out_is_no_licence_to_touch_anything_else(
    plant: Callable[[Path], object], place: Path, victim: Path
) -> None:
    (place / "out").mkdir()
    (place / "out" / "kept").write_text("kept")
    plant(place / "out" / "conversion.json")

    raised = raised_by(lambda: converter.convert(place / "base", place / "adapter", place / "out"))

    assert isinstance(raised, BadOutput)
    assert (place / "out" / "kept").read_text() == "kept"
    assert victim.read_text() == "precious"


def test_a_receipt_with_paths_for_names_does_not_lead_out_of_a_folder_that_is_filled_in_place(
    place: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "out"
    out.mkdir()
    RECEIPTS["with paths for names"](out / "conversion.json")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    destination = Destination(out, inputs=[], overwrite=True)

    converter.convert(place / "base", place / "adapter", out, overwrite=True)

    assert destination.staging == out / ".partial"
    assert victim.read_text() == "precious"
    assert SHARD in os.listdir(out)


# Whole runs, in processes of their own: what they may use, read and say

MEASURED = """
import os, re, resource, sys
from converter.cli.main import main
try:
    main(sys.argv[1:])
finally:
    # Not ru_maxrss of this process, to which the memory of the one that started it counts.
    own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024
    print(sum(os.times()[:4]), peak, file=sys.stderr)
"""


def measured(place: Path, *options: str) -> tuple[int, str, float, int]:
    """Exit code, error, seconds of the processor's time and peak memory in MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, f"--base={place / 'base'}", f"--out={place / 'out'}", *options],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=REPOSITORY,
    )
    said, _, figures = run.stderr.strip().rpartition("\n")
    seconds, peak = figures.split()
    return run.returncode, said, float(seconds), int(peak)


def empty_entries(count: int) -> bytes:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number:x}":{entry}' for number in range(count)) + "}").encode()


BOMBS: dict[str, tuple[bytes, str]] = {
    "more tensors than there may be": (empty_entries(430_000), "more than 3,000,000 values"),
    "a few more tensors than there may be": (empty_entries(201_000), "201,000 tensors, expected at most 200,000"),
    "as many objects as fit": (b'{"a":[' + b"{}," * 8_200_000 + b"{}]}", "more than 3,000,000 values"),
    "as many values as there may be": (
        ("{" + ",".join(f'"{number:x}":1' for number in range(2_270_000)) + "}").encode(),
        "tensors, expected at most 200,000",
    ),
    "one name as long as the header": (b'{"' + b"x" * 24_000_000 + b'": 1}', "empty, too long or not printable"),
    "metadata as long as the header": (b'{"__metadata__": {"x": "' + b"[" * 24_000_000 + b'"}}', "3,000,000 values"),
}


@pytest.mark.parametrize(("raw", "words"), BOMBS.values(), ids=BOMBS.keys())
def test_a_header_made_to_take_time_and_memory_gets_less_than_10_seconds_of_the_processor_and_a_gigabyte(
    raw: bytes, words: str, place: Path
) -> None:
    put(place / "base" / SHARD, raw)

    code, said, seconds, peak = measured(place)

    assert (code, words in said) == (2, True), said
    assert seconds < 10
    assert peak < 1_000


@pytest.mark.slow
def test_a_config_as_large_as_it_may_be_gets_less_than_half_a_minute_of_the_processor_and_2_gigabytes(
    place: Path,
) -> None:
    change_json(place / "base" / CONFIG, note={f"{number:x}": number for number in range(200_000)})

    code, said, seconds, peak = measured(place)

    assert code == 0, said
    assert seconds < 30
    assert peak < 2_000


@pytest.fixture
def loose_pipe() -> Iterator[int]:
    """A pipe that nobody writes to and nobody closes."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]], ids=["refused", "trusted"])
def test_standard_input_is_never_read_not_even_to_ask_whether_code_is_trusted(
    trust: list[str], place: Path, loose_pipe: int, tmp_path: Path
) -> None:
    change = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    code_in(f"base/{CONFIG}", "evil", change)(place)
    command = [sys.executable, "-m", "converter", f"--base={place / 'base'}", f"--out={place / 'out'}", *trust]

    run = subprocess.run(command, stdin=loose_pipe, capture_output=True, text=True, timeout=HANG, cwd=REPOSITORY)

    assert run.returncode == (0 if trust else 2), run.stderr
    assert not (place / "imported").exists()


TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


@pytest.mark.parametrize(
    "options", [["-v"], ["--dry-run", "--json"], ["--adapter=nobody/nothing", "--offline"],
                ["-v", "--adapter=place/nothing"]],
    ids=" ".join,
)  # fmt: skip
def test_a_token_of_the_hub_is_nowhere_in_what_is_said_or_written(options: list[str], place: Path) -> None:
    code_in("base/tokenizer_config.json", "evil", {})(place)
    command = [sys.executable, "-m", "converter", f"--base={place / 'base'}", f"--out={place / 'out'}", *options]

    environment = os.environ | dict.fromkeys(TOKENS, TOKEN)
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=REPOSITORY, env=environment)

    assert run.returncode == (2 if "othing" in " ".join(options) else 0), run.stderr
    assert "Secret" not in run.stdout + run.stderr
    written = contents(place / "out") if (place / "out").exists() else {}
    assert not any(TOKEN.encode() in raw for raw in written.values())
    cached = [path for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in cached)
