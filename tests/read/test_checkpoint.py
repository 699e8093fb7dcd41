"""Reading a base: what is refused and in which words, and that what is accepted is read right."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from converter.errors import BadCheckpoint, ConversionRefused, InputChanged, ReadFailed
from converter.read.checkpoint import CONFIG, INDEX, SINGLE_FILE, Checkpoint
from converter.read.folder import LocalFolder, read_bytes
from converter.read.header import DTYPE_BYTES, MAX_HEADER_BYTES, MAX_NAME_LENGTH, TensorHeader, read_header
from converter.read.strict_json import read_json
from tests.folders import shard_bytes

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "float64",
    "int64",
    "uint64",
]


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_base(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]], **weight_map: object) -> Path:
    """A checkpoint of shards and an index; `weight_map` changes what the index says."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text('{"model_type": "llama"}')
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    true_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**true_map, **weight_map}}))
    return folder


def two_shards(folder: Path, **weight_map: object) -> Path:
    return write_base(folder, {SHARDS[0]: {"a": np.arange(4)}, SHARDS[1]: {"b": np.arange(6)}}, **weight_map)


def link_into_cache(cache: Path, base: Path) -> Path:
    """The same files as the Hub's cache keeps them: blobs by digest, and a snapshot of links to them."""
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        digest = f"{number:064x}"
        file.rename(cache / "blobs" / digest)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    return snapshot


def header_of(path: Path, **limits: int) -> dict[str, TensorHeader]:
    with closing(LocalFolder(path.parent)) as folder:
        return read_header(folder, path.name, **limits)


def open_base(path: Path, **limits: int) -> Checkpoint:
    """A checkpoint of which no more than the headers is wanted."""
    with closing(LocalFolder(path)) as folder:
        return Checkpoint(folder, **limits)


def assert_one_line(error: BaseException) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 600


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the examples of a property overwrite in turn."""
    return tmp_path_factory.mktemp("scratch") / "x.safetensors"


# One file: its header


DEFECTIVE = {
    "empty file": (b"", "0 bytes, too short"),
    "seven bytes": (b"\0" * 7, "7 bytes, too short"),
    "length of 2^64-1": (shard_bytes({}, length=2**64 - 1), "header of 18,446,744,073,709,551,615 bytes, expected at"),
    "length over the limit": (shard_bytes({}, length=MAX_HEADER_BYTES + 1), "header of 25,000,001 bytes, expected at"),
    "length beyond the file": (shard_bytes({}, length=3), "header of 3 bytes in a file of 10: truncated?"),
    "no header": (shard_bytes(b""), "does not begin with '{'"),
    "leading space": (shard_bytes(b" {}"), "does not begin with '{'"),
    "byte order mark": (shard_bytes(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "array": (shard_bytes([]), "does not begin with '{'"),
    "pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07builtins.", "header of 194,315,392 bytes, expected at most"),
    "not JSON": (shard_bytes(b"{x}"), "not valid JSON"),
    "two objects": (shard_bytes(b"{}{}"), "not valid JSON"),
    "not UTF-8": (shard_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep objects": (shard_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "deep arrays": (shard_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "number of 5000 digits": (shard_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate key": (
        shard_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"0123"),
        "key 'a' occurs twice",
    ),
    "long duplicate key": (
        shard_bytes(b'{"%b": 1, "%b": 1}' % ((b"k" * 100_000,) * 2)),
        "key '" + "k" * 60 + "' occurs twice",
    ),
    "duplicate field": (
        shard_bytes(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"0"),
        "key 'dtype' occurs twice",
    ),
    "NaN": (shard_bytes(b'{"a": NaN}'), "NaN is not a value"),
    "metadata not an object": (shard_bytes({"__metadata__": ["pt"]}), "__metadata__ is not a mapping of strings"),
    "metadata not strings": (shard_bytes({"__metadata__": {"x": 1}}), "__metadata__ is not a mapping of strings"),
    "entry not an object": (shard_bytes({"a": [1]}), "'a' lacks dtype, shape or data_offsets"),
    "no dtype": (shard_bytes({"a": {"shape": [], "data_offsets": [0, 1]}}, b"0"), "'a' lacks dtype"),
    "no shape": (shard_bytes({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"0"), "'a' lacks dtype"),
    "no offsets": (shard_bytes({"a": {"dtype": "U8", "shape": []}}, b"0"), "'a' lacks dtype"),
    "unknown dtype": (shard_bytes({"a": entry(dtype="F7")}, b"0123"), "'a' has the unknown dtype 'F7'"),
    "dtype in small letters": (shard_bytes({"a": entry(dtype="u8")}, b"0123"), "'a' has the unknown dtype 'u8'"),
    "dtype a number": (shard_bytes({"a": entry(dtype=8)}, b"0123"), "'a' has the unknown dtype '8'"),
    "dtype nested": (shard_bytes({"a": entry(dtype={"b": [1]})}, b"0123"), "'a' has the unknown dtype"),
    "negative size": (shard_bytes({"a": entry(shape=[-4])}, b"0123"), "'a' has the shape [-4]"),
    "two negative sizes": (shard_bytes({"a": entry(shape=[-2, -2])}, b"0123"), "'a' has the shape [-2, -2]"),
    "size a float": (shard_bytes({"a": entry(shape=[4.0])}, b"0123"), "'a' has the shape [4.0]"),
    "size an infinity": (shard_bytes(b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 4]}}'), "[inf]"),
    "size a bool": (shard_bytes({"a": entry(shape=[4, True])}, b"0123"), "'a' has the shape [4, True]"),
    "size a string": (shard_bytes({"a": entry(shape=["4"])}, b"0123"), "'a' has the shape ['4']"),
    "shape a number": (shard_bytes({"a": entry(shape=4)}, b"0123"), "'a' has the shape 4"),
    "shape null": (shard_bytes({"a": entry(shape=None)}, b"0123"), "'a' has the shape None"),
    "nine dimensions": (shard_bytes({"a": entry(shape=[1] * 8 + [4])}, b"0123"), "expected at most 8 sizes"),
    "thousand dimensions": (shard_bytes({"a": entry(shape=[1] * 1000)}, b"0123"), "expected at most 8 sizes"),
    "name empty": (shard_bytes({"": entry()}, b"0123"), "'' is empty, too long or not printable"),
    "name too long": (
        shard_bytes({"n" * (MAX_NAME_LENGTH + 1): entry()}, b"0123"),
        "'" + "n" * 60 + "' is empty, too long or not printable",
    ),
    "name with NUL": (shard_bytes({"a\0b": entry()}, b"0123"), r"'a\x00b' is empty, too long or not printable"),
    "name with a line break": (shard_bytes({"a\nb": entry()}, b"0123"), r"'a\nb' is empty, too long or not printable"),
    "name that turns direction": (shard_bytes({"a\u202eb": entry()}, b"0123"), r"'a\u202eb' is empty, too long or not"),
    "name with half a pair": (shard_bytes({"a\ud800": entry()}, b"0123"), r"'a\ud800' is empty, too long or not"),
    "shape larger than the span": (shard_bytes({"a": entry(shape=[5])}, b"0123"), "spans 4 bytes, but U8 [5] takes 5"),
    "dtype wider than the span": (shard_bytes({"a": entry("F32")}, b"0123"), "spans 4 bytes, but F32 [4] takes 16"),
    "product of 2^74": (shard_bytes({"a": entry("F32", [2**32, 2**32, 2**10])}, b"0123"), "'a' spans 4 bytes, but F32"),
    # Modulo 2^64 the product is 4.
    "product that wraps to 4": (
        shard_bytes({"a": entry(shape=[4_294_967_298, 4_294_967_298, 4_611_686_018_427_387_905])}, b"0123"),
        "'a' spans 4 bytes, but U8",
    ),
    "size of 2^63": (shard_bytes({"a": entry(shape=[2**63, 0], offsets=[0, 0])}), "'a' has the shape"),
    "end before begin": (shard_bytes({"a": entry(offsets=[4, 0])}, b"0123"), "'a' has the offsets [4, 0]"),
    "one offset": (shard_bytes({"a": entry(offsets=[4])}, b"0123"), "'a' has the offsets [4]"),
    "three offsets": (shard_bytes({"a": entry(offsets=[0, 2, 4])}, b"0123"), "'a' has the offsets [0, 2, 4]"),
    "negative offset": (shard_bytes({"a": entry(offsets=[-4, 0])}, b"0123"), "'a' has the offsets [-4, 0]"),
    "offset of 2^64": (shard_bytes({"a": entry(offsets=[2**64, 2**64 + 4])}, b"0123"), "'a' has the offsets"),
    "offsets not a list": (shard_bytes({"a": entry(offsets={"0": 4})}, b"0123"), "'a' has the offsets"),
    "overlap": (
        shard_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, b"012345"),
        "it overlaps the tensor before it",
    ),
    "the same span twice": (shard_bytes({"a": entry(), "b": entry()}, b"0123"), "it overlaps the tensor before it"),
    "hole": (shard_bytes({"a": entry(), "b": entry(offsets=[5, 9])}, b"012345678"), "it leaves a hole before it"),
    "leading hole": (shard_bytes({"a": entry(offsets=[1, 5])}, b"01234"), "it leaves a hole before it"),
    "empty tensor inside another": (
        shard_bytes({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, b"0123"),
        "it overlaps the tensor before it",
    ),
    "empty tensor beyond the end": (
        shard_bytes({"a": entry(), "b": entry(shape=[0], offsets=[9, 9])}, b"0123"),
        "it leaves a hole before it",
    ),
    "trailing bytes": (shard_bytes({"a": entry()}, b"01234"), "truncated or padded?"),
    "truncated body": (shard_bytes({"a": entry()}, b"012"), "truncated or padded?"),
}


@pytest.mark.parametrize(("raw", "words"), DEFECTIVE.values(), ids=DEFECTIVE.keys())
def test_a_defective_header_is_refused_in_one_line_that_says_what_is_wrong(
    raw: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)

    with pytest.raises(BadCheckpoint) as caught:
        header_of(path)

    assert words in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert path.name in str(caught.value)
    assert_one_line(caught.value)


def test_a_header_of_too_many_tensors_is_refused(tmp_path: Path) -> None:
    empty = entry(shape=[0], offsets=[0, 0])
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes({"a": empty, "b": empty, "c": empty}))

    with pytest.raises(BadCheckpoint, match="3 tensors, expected at most 2"):
        header_of(path, most=2)


def test_a_message_about_a_folder_with_a_line_break_in_its_name_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "line\nbreak \x1b[31m" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")

    with pytest.raises(BadCheckpoint, match=r"line\\nbreak \\x1b\[31m: model.safetensors: 0 bytes") as caught:
        header_of(path)

    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({}, b""),
        ({"__metadata__": {"format": "pt"}}, b""),
        ({"a": {**entry(), "extra": [1, {"x": None}]}}, b"0123"),
        ({"n" * MAX_NAME_LENGTH: entry(shape=[1, 1, 1, 1, 1, 1, 1, 4])}, b"0123"),
        ({"../../etc/passwd": entry()}, b"0123"),
        ({"größe.重み": entry()}, b"0123"),
        ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4]), "c": entry(shape=[3, 0], offsets=[4, 4])}, b"0123"),
        ({"b": entry(offsets=[4, 8]), "a": entry()}, b"01234567"),
        (json.dumps({"a": entry()}).encode().ljust(200), b"0123"),
    ],
    ids=["empty", "metadata", "unknown field", "at the limits", "path", "letters", "no bytes", "any order", "padding"],
)
def test_an_unusual_header_that_the_format_allows_is_read(header: object, body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes(header, body))

    tensors = header_of(path)

    assert sum(tensor.nbytes for tensor in tensors.values()) == len(body)


def test_tensors_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes({"b": entry(offsets=[4, 8]), "c": entry(offsets=[8, 12]), "a": entry()}, b"0" * 12))

    assert list(header_of(path)) == ["a", "b", "c"]


def read_or_refuse(path: Path, raw: bytes) -> dict[str, TensorHeader] | None:
    """What `read_header` makes of `raw`: None if it refuses, as it should. Any other exception fails the test."""
    path.write_bytes(raw)
    try:
        return header_of(path)
    except BadCheckpoint as exc:
        assert_one_line(exc)
        return None


@settings(deadline=None, max_examples=150)
@given(raw=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(shard_bytes), st.text().map(shard_bytes)))
def test_arbitrary_bytes_never_raise_anything_but_a_refusal(raw: bytes, scratch: Path) -> None:
    read_or_refuse(scratch, raw)


VALID_HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed.weight": entry("BF16", [3, 2], [0, 12]),
    "model.norm.weight": entry("F32", [2], [12, 20]),
    "model.scale": entry("U8", [], [20, 21]),
    "model.nothing": entry("I64", [0, 7], [21, 21]),
}
VALID = shard_bytes(VALID_HEADER, bytes(range(21)))
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 30)
    | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**400])
    | st.floats()
    | st.sampled_from([*DTYPE_BYTES, "bf16", ""])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=9,
)


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, len(VALID)), removed=st.integers(0, 3), added=st.binary(max_size=3))
def test_a_valid_file_with_some_bytes_changed_is_read_within_its_bounds_or_refused(
    position: int, removed: int, added: bytes, scratch: Path
) -> None:
    raw = VALID[:position] + added + VALID[position + removed :]

    tensors = read_or_refuse(scratch, raw)

    for tensor in (tensors or {}).values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(list(VALID_HEADER)) | st.text(max_size=5),
    field=st.sampled_from(["dtype", "shape", "data_offsets", None]),
    value=JSON_VALUES | st.lists(st.integers(0, 21), max_size=3),
)
def test_a_valid_header_with_a_value_changed_is_read_as_safetensors_reads_it_or_refused(
    name: str, field: str | None, value: object, scratch: Path
) -> None:
    header = json.loads(json.dumps(VALID_HEADER))
    if field is not None and field in header.get(name, {}):
        header[name][field] = value
    else:
        header[name] = value
    raw = shard_bytes(header, VALID[-21:])

    tensors = read_or_refuse(scratch, raw)

    if tensors is not None:
        theirs = dict(deserialize(raw))
        assert {n: (t.dtype, list(t.shape)) for n, t in tensors.items()} == {
            n: (t["dtype"], t["shape"]) for n, t in theirs.items()
        }


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 128, shape).astype(dtype),
    st.sampled_from(DTYPES),
    SHAPES,
    st.integers(0, 9),
)


@settings(deadline=None, max_examples=100)
@given(tensors=st.dictionaries(NAMES, ARRAYS, max_size=6))
def test_a_file_that_safetensors_wrote_is_read_as_safetensors_reads_it(
    tensors: dict[str, np.ndarray], scratch: Path
) -> None:
    save_file(tensors, scratch)

    ours = header_of(scratch)

    raw = scratch.read_bytes()
    assert {name: (t.dtype, list(t.shape), raw[t.offset : t.offset + t.nbytes]) for name, t in ours.items()} == {
        name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(raw)
    }
    with safe_open(scratch, "numpy") as theirs:
        assert {n for n, t in ours.items() if t.nbytes} <= set(theirs.offset_keys()) == ours.keys()


# A folder: config, index, shards


def test_a_checkpoint_of_several_shards_has_the_tensors_of_all(tmp_path: Path) -> None:
    base = open_base(two_shards(tmp_path / "base"))

    assert {tensor.name: tensor.file for tensor in base} == {"a": SHARDS[0], "b": SHARDS[1]}
    assert base.shards == SHARDS
    assert base.nbytes == 8 * 10
    assert base.config == {"model_type": "llama"}


def test_a_single_file_wins_over_an_index_as_it_does_for_transformers(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    save_file({"c": np.arange(2)}, folder / SINGLE_FILE)

    base = open_base(folder)

    assert base.shards == (SINGLE_FILE,)
    assert list(base.tensors) == ["c"]


def test_what_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    (folder / "consolidated.safetensors").write_bytes(b"not a shard of this checkpoint")

    base = open_base(folder)

    assert base.shards == SHARDS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": "../outside.safetensors"}, "expected a file inside the folder"),
        ({"a": "sub/a.safetensors"}, "expected a file inside the folder"),
        ({"a": "..\\outside.safetensors"}, "expected a file inside the folder"),
        ({"a": "/etc/passwd.safetensors"}, "expected a file inside the folder"),
        ({"a": "/etc/passwd"}, "'a' is in '/etc/passwd', expected a .safetensors file"),
        ({"a": "pytorch_model.bin"}, "'a' is in 'pytorch_model.bin', expected a .safetensors file"),
        ({"a": ""}, "'a' is in '', expected a .safetensors file"),
        ({"a": 1}, "'a' is in '1', expected a .safetensors file"),
        ({"a": None}, "'a' is in 'None', expected a .safetensors file"),
        ({"a": [SHARDS[0]]}, "expected a .safetensors file"),
        ({"n" * 100_000: "x" * 100_000}, "'" + "n" * 60 + "' is in '" + "x" * 80 + "', expected"),
        ({"a": "absent.safetensors"}, "'a' is in 'absent.safetensors', which is not a plain file of the folder"),
        ({"a": "nul\0.safetensors"}, "which is not a plain file of the folder"),
        ({"a": "half a pair \ud800.safetensors"}, "which is not a plain file of the folder"),
        ({"a": "n" * 300 + ".safetensors"}, "which is not a plain file of the folder"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, dict) else "",
)
def test_an_index_that_contradicts_the_files_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))

    with pytest.raises(BadCheckpoint, match=re.escape(words)) as caught:
        open_base(folder)

    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"c": SHARDS[1]}, "names 'c': no shard has it"),
        ({"c": SHARDS[1], "d": SHARDS[0]}, "names 'c' and 1 more: no shard has it"),
        ({"n" * 100_000: SHARDS[1]}, f"names '{'n' * 60}': no shard has it"),
        ({"a line\nand another": SHARDS[1]}, r"names 'a line\nand another': no shard has it"),
        ({"b": SHARDS[0], "a": SHARDS[1]}, "puts into another shard 'a' and 1 more: it is read where it is"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_where_index_and_headers_disagree_the_headers_are_believed_and_it_is_said(
    changes: dict[str, str], note: str, tmp_path: Path
) -> None:
    base = open_base(two_shards(tmp_path / "base", **changes))

    assert {tensor.name: tensor.file for tensor in base} == {"a": SHARDS[0], "b": SHARDS[1]}
    assert base.notes == (f"{INDEX} {note}",)


def test_a_tensor_that_the_index_lacks_is_read_and_said(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    save_file({"a": np.arange(4), "extra": np.arange(1)}, folder / SHARDS[0])

    base = open_base(folder)

    assert sorted(base.tensors) == ["a", "b", "extra"]
    assert base.notes == (f"{INDEX} lacks 'extra': a shard has it, so it is converted",)


def test_an_index_that_is_right_is_not_spoken_of(tmp_path: Path) -> None:
    assert open_base(two_shards(tmp_path / "base")).notes == ()


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    save_file({"a": np.arange(4), "b": np.arange(6)}, folder / SHARDS[1])

    with pytest.raises(BadCheckpoint, match=f"'a' is in two shards, {SHARDS[0]} and {SHARDS[1]}"):
        open_base(folder)


def test_a_checkpoint_of_too_many_tensors_in_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="more than 1 tensors"):
        open_base(two_shards(tmp_path / "base"), most=1)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "holds list, expected an object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": null}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' occurs twice"),
        (b'{"weight_map": ' + b'{"a": ' * 100_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, bytes) else "",
)
def test_an_index_without_a_map_of_weights_is_refused(index: bytes, words: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    (folder / INDEX).write_bytes(index)

    with pytest.raises(BadCheckpoint, match=words) as caught:
        open_base(folder)

    assert INDEX in str(caught.value)
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "not valid JSON"),
        (b"null", "holds NoneType, expected an object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a value"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "key 'vocab_size' occurs twice"),
        (b"[" * 200_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, bytes) else "",
)
def test_a_config_that_is_not_an_object_is_refused(config: bytes, words: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    (folder / CONFIG).write_bytes(config)

    with pytest.raises(BadCheckpoint, match=words) as caught:
        open_base(folder)

    assert CONFIG in str(caught.value)
    assert_one_line(caught.value)


def test_an_infinity_in_a_config_is_a_value_as_mamba_needs_it(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"time_step_limit": [0.0, Infinity]}')

    with closing(LocalFolder(tmp_path)) as folder:
        config = read_json(folder, CONFIG)

    assert config == {"time_step_limit": [0.0, math.inf]}


def test_a_config_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    os.truncate(folder / CONFIG, 1 << 40)

    with pytest.raises(BadCheckpoint, match=r"config\.json has 1,099,511,627,776 bytes, expected at most 10,000,000"):
        open_base(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")
    (folder / CONFIG).unlink()

    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        open_base(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")

    with pytest.raises(BadCheckpoint, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_base(tmp_path)


def test_a_folder_with_pickled_weights_only_is_refused_and_nothing_unpickled(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")

    with pytest.raises(BadCheckpoint, match=r"only pickled weights \(.bin\)"):
        open_base(tmp_path)


def test_a_single_file_without_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / SINGLE_FILE).write_bytes(shard_bytes({}))

    with pytest.raises(BadCheckpoint, match="no tensors"):
        open_base(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("absent", "no such folder"), ("file", "a file; give the folder")])
def test_a_base_that_is_not_a_folder_is_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConversionRefused, match=said):
        LocalFolder(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = LocalFolder(two_shards(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")

    with pytest.raises(BadCheckpoint, match="base: No such file or directory"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "/etc/passwd", "a/a/a/a/x", "away/x", "nul\0", "\ud800", "n" * 300]
)
def test_a_name_that_is_not_a_plain_file_of_the_folder_is_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base" / "a" / "a" / "a" / "a").mkdir(parents=True)
    (tmp_path / "base" / "a" / "a" / "a" / "a" / "x").write_text("")
    (tmp_path / "base" / "a" / "a" / "x").write_text("")
    (tmp_path / "base" / "away").symlink_to(tmp_path / "base" / "a" / "a")

    with closing(LocalFolder(tmp_path / "base")) as folder, pytest.raises(BadCheckpoint) as caught:
        folder.size(name)

    assert "is not a plain file inside the folder" in str(caught.value)
    assert_one_line(caught.value)


# Links, pipes and other things with a shard's name


def replaced_shard(tmp_path: Path) -> Path:
    """Where the first shard of a checkpoint was."""
    shard = two_shards(tmp_path / "base") / SHARDS[0]
    shard.rename(tmp_path / "outside.safetensors")
    return shard


def refusal(shard: Path) -> BadCheckpoint:
    said = f"{shard.name} is a link to" if shard.is_symlink() else f"'{shard.name}', which is not a plain file of the"
    with pytest.raises(BadCheckpoint, match=said) as caught:
        open_base(shard.parent)
    return caught.value


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    shard.symlink_to(tmp_path / "outside.safetensors")

    assert_one_line(refusal(shard))


@pytest.mark.parametrize("where", ["elsewhere", "base/weights"])
def test_a_shard_may_be_a_link_to_a_file_of_its_name(where: str, tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    (tmp_path / where).mkdir()
    shard.symlink_to((tmp_path / "outside.safetensors").rename(tmp_path / where / shard.name))

    assert open_base(shard.parent).tensors.keys() == {"a", "b"}


def test_a_shard_may_be_a_link_to_a_file_of_another_name_in_the_folder(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    (tmp_path / "outside.safetensors").rename(shard.with_name("weights"))
    shard.symlink_to("weights")

    assert open_base(shard.parent).tensors.keys() == {"a", "b"}


def test_a_folder_may_be_of_links_into_the_hubs_cache_as_downloads_once_made_them(tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    (tmp_path / "download").mkdir()
    for file in snapshot.iterdir():
        (tmp_path / "download" / file.name).symlink_to(file.resolve())

    assert open_base(tmp_path / "download").tensors.keys() == {"a", "b"}


def test_a_config_that_is_a_link_to_a_file_of_another_name_is_refused_with_where_it_leads(tmp_path: Path) -> None:
    base = two_shards(tmp_path / "base")
    (base / CONFIG).rename(tmp_path / "secrets.json")
    (base / CONFIG).symlink_to(tmp_path / "secrets.json")

    with pytest.raises(
        BadCheckpoint, match=r"config\.json is a link to .*/secrets\.json, where no file of this name is"
    ):
        open_base(base)


def test_a_shard_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    shard.symlink_to("nothing.safetensors")

    assert_one_line(refusal(shard))


def test_a_shard_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    shard.symlink_to(shard.name)

    assert_one_line(refusal(shard))


def test_a_shard_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    shard.mkdir()

    assert_one_line(refusal(shard))


def test_a_shard_that_is_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    shard = replaced_shard(tmp_path)
    os.mkfifo(shard)

    assert_one_line(refusal(shard))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))

    base = open_base(snapshot)

    assert base.tensors.keys() == {"a", "b"}


def test_the_hubs_cache_may_be_reached_by_a_link_to_the_snapshot(tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    (tmp_path / "shortcut").symlink_to(snapshot)

    base = open_base(tmp_path / "shortcut")

    assert base.tensors.keys() == {"a", "b"}


def test_blobs_that_repositories_of_the_hubs_cache_share_are_followed(tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    shared = tmp_path / "blobs" / "00"
    shared.mkdir(parents=True)
    blob = (snapshot / SHARDS[0]).resolve()
    blob.rename(shared / blob.name)
    blob.symlink_to(Path("..", "..", "blobs", "00", blob.name))

    base = open_base(snapshot)

    assert base.tensors.keys() == {"a", "b"}


def test_a_link_from_the_hubs_cache_to_anywhere_else_is_refused(tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    (snapshot / SHARDS[0]).resolve().rename(tmp_path / "outside.safetensors")
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(tmp_path / "outside.safetensors")

    assert_one_line(refusal(snapshot / SHARDS[0]))


def test_a_link_to_the_blobs_of_another_repository_is_refused(tmp_path: Path) -> None:
    other = link_into_cache(tmp_path / "models--maker--other", two_shards(tmp_path / "other"))
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to((other / SHARDS[0]).resolve())

    assert_one_line(refusal(snapshot / SHARDS[0]))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_blob_of_the_hubs_cache_that_is_not_a_file_is_refused(make: Any, tmp_path: Path) -> None:
    snapshot = link_into_cache(tmp_path / "models--maker--base", two_shards(tmp_path / "base"))
    blob = (snapshot / SHARDS[0]).resolve()
    blob.unlink()
    make(blob)

    assert_one_line(refusal(snapshot / SHARDS[0]))


# Bytes


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[LocalFolder, Path]]:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with closing(LocalFolder(tmp_path, read_ahead=1000)) as folder:
        yield folder, path


def test_the_bytes_from_an_offset_fill_the_buffer(file: tuple[LocalFolder, Path]) -> None:
    folder, path = file
    buffer = bytearray(20)

    folder.read_into(path.name, 30, memoryview(buffer))

    assert buffer == bytes(range(30, 50))


def test_a_read_that_the_system_cuts_short_is_continued(
    file: tuple[LocalFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = file
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    buffer = bytearray(100)

    folder.read_into(path.name, 0, memoryview(buffer))

    assert buffer == bytes(range(100))


@pytest.mark.parametrize("offset", [0, 50, 100])
def test_no_bytes_can_be_read_anywhere_up_to_the_end(file: tuple[LocalFolder, Path], offset: int) -> None:
    folder, path = file

    folder.read_into(path.name, offset, memoryview(bytearray()))


def test_a_file_that_shrank_after_its_header_was_read_is_an_error_and_not_a_signal(
    file: tuple[LocalFolder, Path],
) -> None:
    folder, path = file
    assert folder.size(path.name) == 100
    os.truncate(path, 50)

    with pytest.raises(InputChanged, match="file: ends at byte 50, expected 100") as caught:
        folder.read_into(path.name, 0, memoryview(bytearray(100)))

    assert_one_line(caught.value)


def test_a_file_that_vanished_after_it_was_opened_is_still_read_whole(file: tuple[LocalFolder, Path]) -> None:
    folder, path = file
    assert folder.size(path.name) == 100
    path.unlink()

    assert read_bytes(folder, path.name, limit=100) == bytes(range(100))


def test_a_disk_that_cannot_read_is_an_error_that_names_the_file_and_the_place(
    file: tuple[LocalFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = file

    def fail(descriptor: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)

    with pytest.raises(ReadFailed, match="file: reading at byte 3: Input/output error") as caught:
        folder.read_into(path.name, 3, memoryview(bytearray(1)))

    assert_one_line(caught.value)


def test_a_file_over_the_limit_is_not_read(file: tuple[LocalFolder, Path]) -> None:
    folder, path = file

    with pytest.raises(BadCheckpoint, match="file has 100 bytes, expected at most 99"):
        read_bytes(folder, path.name, limit=99)


def test_a_file_is_told_from_one_that_took_its_place(file: tuple[LocalFolder, Path]) -> None:
    folder, path = file
    before = folder.identity(path.name)
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)

    assert folder.identity(path.name) != before


def test_closing_a_checkpoint_closes_its_files(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "base")

    with Checkpoint(LocalFolder(folder)):
        during = {file.path for file in psutil.Process().open_files()}

    after = {file.path for file in psutil.Process().open_files()}
    assert {str(folder / shard) for shard in SHARDS} <= during
    assert not any(path.startswith(str(folder)) for path in after)


def test_scalars_and_tensors_without_elements_have_their_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = {"scalar": np.float32(1.5), "empty": np.zeros((0, 3), np.float16), "flat": np.zeros((3, 0), np.float16)}
    save_file({name: np.asarray(value) for name, value in tensors.items()}, tmp_path / SINGLE_FILE)

    header = header_of(tmp_path / SINGLE_FILE)

    assert {name: (t.shape, t.nbytes) for name, t in header.items()} == {
        "scalar": ((), 4),
        "empty": ((0, 3), 0),
        "flat": ((3, 0), 0),
    }


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, length) of what the system is asked to read ahead of 1,000 bytes."""
    asked: list[tuple[int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return asked


def test_the_disk_is_kept_ahead_of_who_reads_in_order_and_asked_for_nothing_twice(
    file: tuple[LocalFolder, Path], hints: list[tuple[int, int]]
) -> None:
    folder, path = file

    for offset in range(0, 3000, 100):
        folder.expect(path.name, offset)

    assert hints[0] == (0, 1000)
    assert all(before + length == offset for (before, length), (offset, _) in pairwise(hints))
    assert all(length >= 500 for _, length in hints), "one hint for many tiles"
    assert sum(hints[-1]) >= 2900 + 500


def test_who_jumps_in_a_file_has_the_disk_follow(file: tuple[LocalFolder, Path], hints: list[tuple[int, int]]) -> None:
    folder, path = file

    for offset in (0, 5000, 100):
        folder.expect(path.name, offset)

    assert hints == [(0, 1000), (5000, 1000), (100, 1000)]


def test_a_filesystem_that_takes_no_hints_is_read_all_the_same(
    file: tuple[LocalFolder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = file

    def refuse(*_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse)

    folder.expect(path.name, 0)
