"""What is fuzzed: one function for each parser of files that somebody else wrote, and files that it understands."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import xxhash
from hypothesis import strategies as st

from converter.batch.job_file import read_jobs
from converter.errors import ConverterError
from converter.merge.adapter import Adapter
from converter.merge.files import CONFIG as ADAPTER_CONFIG
from converter.merge.files import WEIGHTS
from converter.merge.keys import PREFIX
from converter.merge.patterns import Pattern, Patterns
from converter.read.checkpoint import CONFIG, INDEX, SINGLE_FILE, Checkpoint
from converter.read.checksums import SUMS, read_sums
from converter.read.folder import LocalFolder
from converter.read.header import read_header
from converter.read.hub.record import digest_at_download
from converter.read.side_files import largest_token
from converter.seal.receipt import FORMAT, RECEIPT, read_receipt
from converter.write.journal import FORMAT as JOURNAL_FORMAT
from converter.write.journal import JOURNAL, Journal

SECONDS_OF_PATTERNS = 0.5
"""Instead of those that a user waits; an expression that takes them all is refused, and no find."""
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a" * 60)
JOB = {"plan": "p", "layout": "l", "base": "b", "adapter": None, "device": "cpu", "versions": {"torch": "2"}}


@dataclass(frozen=True)
class Target:
    """`parse` gives whether it understood the bytes; what isn't a `ConverterError` passes through, and is a crash."""

    parse: Callable[[bytes, Path], bool]
    seeds: tuple[bytes, ...]


def shard(header: object, body: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def parse_header(raw: bytes, scratch: Path) -> bool:
    (scratch / "header.safetensors").write_bytes(raw)
    with closing(LocalFolder(scratch)) as folder:
        return _understood(lambda: read_header(folder, "header.safetensors"))


def parse_index(raw: bytes, scratch: Path) -> bool:
    place = scratch / "base"
    if not place.exists():
        place.mkdir()
        (place / CONFIG).write_text("{}")
        for name in ("one", "two"):
            (place / f"{name}.safetensors").write_bytes(shard({name: _entry([4], 0, 4)}, b"0123"))
    (place / INDEX).write_bytes(raw)
    with closing(LocalFolder(place)) as folder:
        return _understood(lambda: Checkpoint(folder))


def parse_config(raw: bytes, scratch: Path) -> bool:
    place = scratch / "single"
    if not place.exists():
        place.mkdir()
        (place / SINGLE_FILE).write_bytes(shard({"one": _entry([4], 0, 4)}, b"0123"))
    (place / CONFIG).write_bytes(raw)
    with closing(LocalFolder(place)) as folder:
        return _understood(lambda: Checkpoint(folder))


def parse_adapter_config(raw: bytes, scratch: Path) -> bool:
    place = scratch / "adapter"
    if not place.exists():
        place.mkdir()
        names = (f"{PREFIX}{MODULES[0]}.lora_{half}.weight" for half in "AB")
        a, b = next(names), next(names)
        header = {a: _entry([8, 4], 0, 128, "F32"), b: _entry([4, 8], 128, 256, "F32")}
        (place / WEIGHTS).write_bytes(shard(header, b"\0" * 256))
    (place / ADAPTER_CONFIG).write_bytes(raw)

    def use() -> None:
        adapter = Adapter(folder, seconds=SECONDS_OF_PATTERNS)
        adapter.options.learn(MODULES)
        for module in MODULES:
            adapter.options.targets(module)
            adapter.options.is_saved_whole(module)
            adapter.options.scaling(module)
        adapter.check_finite()
        _ = adapter.base_name, adapter.base_revision

    with closing(LocalFolder(place)) as folder:
        return _understood(use)


def parse_patterns(raw: bytes, _: Path) -> bool:
    expression = raw.decode("utf-8", "replace")

    def use() -> None:
        pattern = Pattern("target_modules", expression, expression, whole=True)
        patterns = Patterns("config", [pattern], SECONDS_OF_PATTERNS)
        patterns.learn(MODULES)
        for module in MODULES:
            patterns.match(pattern, module)

    return _understood(use)


def parse_receipt(raw: bytes, scratch: Path) -> bool:
    place = scratch / "out"
    place.mkdir(exist_ok=True)
    (place / RECEIPT).write_bytes(raw)
    return read_receipt(place) is not None


def parse_journal(raw: bytes, scratch: Path) -> bool:
    """Lines are given their digests here: otherwise nothing would come past them."""
    place = scratch / "staging"
    place.mkdir(exist_ok=True)
    lines = raw.splitlines(keepends=True)
    (place / JOURNAL).write_bytes(b"".join(f"{xxhash.xxh3_64_hexdigest(line)} ".encode() + line for line in lines))
    entries: list[str] = []

    def use() -> None:
        journal = Journal(place, JOB)
        entries.extend(journal.entries)
        journal.close()

    return _understood(use) and bool(entries)


def parse_sums(raw: bytes, scratch: Path) -> bool:
    place = scratch / "sums"
    place.mkdir(exist_ok=True)
    (place / SUMS).write_bytes(raw)
    with closing(LocalFolder(place)) as folder:
        return _understood(lambda: read_sums(folder))


def parse_record(raw: bytes, scratch: Path) -> bool:
    """What `hf download` writes of a file that it brought."""
    place = scratch / "downloaded"
    records = place / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True, exist_ok=True)
    (place / SINGLE_FILE).touch()
    os.utime(place / SINGLE_FILE, (0, 0))
    (records / f"{SINGLE_FILE}.metadata").write_bytes(raw)
    with closing(LocalFolder(place)) as folder:
        return digest_at_download(folder.path, SINGLE_FILE) is not None


def parse_tokenizer(raw: bytes, _: Path) -> bool:
    return _understood(lambda: largest_token(raw))


def parse_jobs(raw: bytes, scratch: Path) -> bool:
    (scratch / "jobs.jsonl").write_bytes(raw)
    return _understood(lambda: read_jobs(scratch / "jobs.jsonl"))


def parse_jobs_of_toml(raw: bytes, scratch: Path) -> bool:
    (scratch / "jobs.toml").write_bytes(raw)
    return _understood(lambda: read_jobs(scratch / "jobs.toml"))


def _understood(use: Callable[[], object]) -> bool:
    try:
        use()
    except ConverterError as exc:
        if not str(exc).isprintable():
            raise AssertionError("more than a line") from exc
        return False
    return True


def _entry(shape: list[int], start: int, end: int, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "bias": "none",
    "rank_pattern": {"layers.0": 8}, "alpha_pattern": {"^q_proj": 4}, "modules_to_save": None, "exclude_modules": None,
    "use_rslora": False, "layers_to_transform": None, "layers_pattern": None, "base_model_name_or_path": "a/b",
    "init_lora_weights": True, "use_dora": False, "loftq_config": {}, "revision": None, "fan_in_fan_out": False,
}  # fmt: skip
_PIECE = {"output": "x", "start": 0, "length": 4, "digest": "ab"}
_LINE = {
    "tensor": "x", "shard": "model.safetensors", "pieces": [_PIECE], "states": {"x.state": "{}"}, "error": 0.5,
    "survival": None, "digest": "cd",
}  # fmt: skip
_WEIGHT_MAP = {"one": "one.safetensors", "two": "two.safetensors"}

TARGETS = {
    "header": Target(
        parse_header,
        (
            shard({"a": _entry([2, 2], 0, 8, "F16"), "b": _entry([], 8, 9)}, b"012345678"),
            shard({"__metadata__": {"format": "pt"}, "a": _entry([0], 0, 0)}, b""),
        ),
    ),
    "index": Target(parse_index, (_json({"metadata": {"total_size": 8}, "weight_map": _WEIGHT_MAP}),)),
    "config": Target(parse_config, (_json({"model_type": "llama", "text_config": {"x": [1, 2.5, None, True]}}),)),
    "adapter config": Target(
        parse_adapter_config,
        (
            _json(_ADAPTER),
            _json(_ADAPTER | {"target_modules": r".*\.(q|v)_proj", "layers_pattern": "layers"}),
            _json(_ADAPTER | {"layers_to_transform": [0, 1], "layers_pattern": ["layers", "h"]}),
        ),
    ),
    "patterns": Target(parse_patterns, (rb"(?!.*vision).*\.(q|v)_proj$", rb"(a+)+$", rb"layers\.(\d+)\.[^.]*", b"x*")),
    "receipt": Target(
        parse_receipt,
        (_json({"format": FORMAT, "fingerprint": "ab", "files": {"config.json": {"bytes": 1}}, "origin": {}}),),
    ),
    "journal": Target(
        parse_journal, (_json({"journal": JOURNAL_FORMAT, "job": JOB}) + b"\n" + (_json(_LINE) + b"\n") * 2,)
    ),
    "sums": Target(
        parse_sums,
        (
            f"{'ab' * 32}  model.safetensors\n{'cd' * 32} *./config.json\n# of two files\n".encode(),
            f"SHA256 (model.safetensors) = {'ab' * 32}\r\n\\{'cd' * 32}  a\\nb\n".encode(),
        ),
    ),
    "record": Target(parse_record, (f"{'ab' * 20}\n{'cd' * 32}\n1700000000.5\n".encode(),)),
    "jobs": Target(
        parse_jobs,
        (
            _json({"base": "b", "adapter": "org/a", "out": "o/a", "keep": ["*.mlp.*"], "block-size": 64}),
            _json({"base": "b", "out": "x"}) + b"\n\n" + _json({"name": "n", "base": "b", "adapter": "a", "out": "y"}),
        ),
    ),
    "jobs of TOML": Target(
        parse_jobs_of_toml,
        (
            b"base = 'b'\nout = 'o'\n[recipe]\nquant-type = 'nf4'\n[[jobs]]\nname = 'n'\nadapter = 'a'\n",
            b'[[jobs]]\nbase = """b"""\nout = "x" # .\nkeep = ["a.b"]\n[[jobs]]\n"base" = "b"\nout = "y"\n',
        ),
    ),
    "tokenizer": Target(
        parse_tokenizer,
        (
            _json({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}]}),
            _json({"model": {"vocab": [["a", 0.5], ["b", -1.0]]}, "added_tokens": None}),
        ),
    ),
}

STRANGE = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"Infinity", b"{}", b"[]", b'""', b'"\\ud800"', b"1" * 400, b"[" * 2000,
    b'{"a":' * 2000, b'"' + b"x" * 5000 + b'"', b"0.5", b"9223372036854775808", b'["a"]', b'{"a": 1}', b"(a|aa)+$",
    b"(?:", b"\\", b"\0", b"\xff", b"\n", b"{1,99999}", b"(?P<layer>x)", b"../../x", b"18446744073709551615",
)  # fmt: skip
"""What files are changed to have in them."""


def mutated(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """A seed with some of its pieces, which may be JSON values, replaced, removed or doubled."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> bytes:
        raw = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(1, 4))):
            cuts = _boundaries(raw)
            start = draw(st.sampled_from(cuts))
            end = draw(st.sampled_from([cut for cut in cuts if cut >= start][:4]))
            by = draw(st.one_of(st.sampled_from(STRANGE), st.binary(max_size=4), st.just(raw[start:end] * 2)))
            raw = raw[:start] + by + raw[end:]
        return raw

    return draw_one()


def _boundaries(raw: bytes) -> list[int]:
    """Where values, names and marks of a JSON text begin and end, as far as one sees that without parsing."""
    marks = b'{}[]:,"\n ()|.*+\\'
    inside = [at for at, byte in enumerate(raw) if byte in marks]
    return sorted({0, len(raw), *inside, *(at + 1 for at in inside)})
