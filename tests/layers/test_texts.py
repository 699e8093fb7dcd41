from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from converter.errors import BadRecipe, ConversionRefused, HubNotFound
from converter.layers.texts import Text, in_batches, windows_of
from tests.hub_server import StandInHub


class Letters:
    """A tokenizer with a token for each letter; a conversation begins with a zero."""

    def tokens(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def tokens_of_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return [0, *self.tokens("".join(message["content"] for message in messages))]


def text(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def test_a_file_of_text_is_one_document(tmp_path: Path) -> None:
    assert list(Text(text(tmp_path, "a.txt", "one", "", "two")).documents()) == ["one\n\ntwo"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_a_file_of_json_lines_has_a_document_in_each(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "o\u2028ne", "other": 1}, ensure_ascii=False), "", json.dumps({"text": "two"})]

    assert list(Text(text(tmp_path, name, *lines)).documents()) == ["o\u2028ne", "two"]


def test_a_field_names_texts_or_messages_in_a_file_of_any_name(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = text(tmp_path, "chats.txt", json.dumps({"chat": messages}), json.dumps({"chat": "plain"}))

    assert list(Text(path, "chat").documents()) == [messages, "plain"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "a.jsonl: line 2: not JSON"),
        ("[1]", "a.jsonl: line 2: no 'text'; name it with `field`"),
        ('{"body": "x", "id": 1}', "a.jsonl: line 2: no 'text'; it has body, id; name it with `field`"),
        ('{"text": 5}', "a.jsonl: line 2: 'text' is neither a text nor a list of messages"),
        ('{"text": []}', "a.jsonl: line 2: 'text' is neither a text nor a list of messages"),
        ('{"text": ["x"]}', "a.jsonl: line 2: 'text' is neither a text nor a list of messages"),
    ],
)
def test_a_line_that_is_no_document_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = text(tmp_path, "a.jsonl", '{"text": "fine"}', line)

    with pytest.raises(ConversionRefused) as found:
        list(Text(path).documents())
    assert said in str(found.value)


def test_a_file_that_is_not_there_or_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"fine\xff")

    with pytest.raises(ConversionRefused, match=r"a\.txt: No such file"):
        list(Text(tmp_path / "a.txt").documents())
    with pytest.raises(ConversionRefused, match=r"b\.txt: not text in UTF-8, at byte 4"):
        list(Text(tmp_path / "b.txt").documents())


def table(folder: Path, **columns: list[Any]) -> Path:
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def test_a_table_has_a_document_in_each_row(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(150)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    path = table(tmp_path, text=texts, id=list(range(150)), chat=chats)

    assert list(Text(path).documents()) == texts
    assert list(Text(path, "chat").documents()) == chats


@pytest.mark.parametrize(
    ("columns", "field", "said"),
    [
        ({"body": ["x"], "id": [1]}, None, "a.parquet: no 'text'; it has body, id; name it with `field`"),
        ({"body": []}, None, "a.parquet: no 'text'; it has body; name it with `field`"),
        ({"text": ["x", None]}, None, "a.parquet: row 2: 'text' is neither a text nor a list of messages"),
        ({"id": [1]}, "id", "a.parquet: row 1: 'id' is neither a text nor a list of messages"),
    ],
)
def test_a_table_without_documents_is_named(
    columns: dict[str, list[Any]], field: str | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionRefused) as found:
        list(Text(table(tmp_path, **columns), field).documents())
    assert said in str(found.value)


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match=r"a\.parquet: not a table of Parquet that can be read"):
        list(Text(text(tmp_path, "a.parquet", "nothing")).documents())


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("Grüße".encode()))
    (tmp_path / "a.jsonl.GZ").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.txt.gz").write_bytes(b"not packed")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-12])

    assert list(Text(tmp_path / "a.txt.gz").documents()) == ["Grüße"]
    assert list(Text(tmp_path / "a.jsonl.GZ").documents()) == ["one", "two"]
    for name in "bc":
        with pytest.raises(ConversionRefused, match=rf"{name}\.txt\.gz: can't be unpacked"):
            list(Text(tmp_path / f"{name}.txt.gz").documents())


def test_a_file_of_a_dataset_on_the_hub_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    text(folder / "data", "train.jsonl", '{"text": "one"}')
    address = "hf://datasets/org/texts/data/train.jsonl"

    with StandInHub({"datasets/org/texts": folder}) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        first = Text.at(address)
        assert list(first.documents()) == ["one"]
        sent = hub.sent
        assert Text.at("hf://datasets/org/texts@main/data/train.jsonl") == first
        assert hub.sent == sent
        with pytest.raises(HubNotFound, match=r"datasets/org/texts: data/gone\.jsonl"):
            Text.at("hf://datasets/org/texts/data/gone.jsonl")
        with pytest.raises(HubNotFound, match="datasets/org/none"):
            Text.at("hf://datasets/org/none/data/train.jsonl")
    assert Text.at(address, offline=True) == first


@pytest.mark.parametrize("address", ["hf://datasets/org/texts", "hf://datasets/texts", "hf://datasets/a/b/../c"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(BadRecipe, match="hf://datasets/ORG/NAME/FILE"):
        Text.at(address)


def test_documents_are_cut_into_windows() -> None:
    windows = windows_of(["abcdefg", "h", [{"content": "ij"}]], Letters(), 3)

    assert windows == [[97, 98, 99], [100, 101, 102], [0, 105, 106]]


def test_no_window_begins_once_there_are_enough_tokens() -> None:
    documents = iter(["abcdef", "ghijkl"])

    assert windows_of(documents, Letters(), 4, most=5) == [[97, 98, 99, 100], [101, 102]]
    assert list(documents) == [], "the second document was looked at, no more"


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), most=st.integers(1, 100))
def test_batches_have_every_window_once(lengths: list[int], most: int) -> None:
    windows = [[1000 * number + place for place in range(length)] for number, length in enumerate(lengths)]

    batches = in_batches(windows, most)

    found = [
        row[:length] for batch in batches for row, length in zip(batch.tokens.tolist(), batch.lengths, strict=True)
    ]
    assert sorted(found) == sorted(windows)
    for batch in batches:
        rows, longest = batch.tokens.shape
        assert rows == 1 or batch.tokens.numel() <= most
        assert min(batch.lengths) >= 0.75 * longest
        assert max(batch.lengths) == longest
        for row, length in zip(batch.tokens.tolist(), batch.lengths, strict=True):
            assert row[length:] == [row[length - 1]] * (longest - length)
