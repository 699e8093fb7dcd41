"""Documents from a file of text, of JSON lines or of a table, and the windows of tokens that they are cut into.

The only import of pyarrow.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.calibration import DEFAULT_WINDOW
from converter.errors import BadRecipe, ConversionRefused
from converter.read.hub.datasets import dataset_file, is_dataset_file

if TYPE_CHECKING:
    from torch import Tensor

JSON_LINES = (".jsonl", ".ndjson")
TABLE, PACKED = ".parquet", ".gz"
MAX_BYTES = 1_000_000_000
"""Of a text: it is in memory while it is cut into tokens."""
_ROWS = 64
"""Rows of a table that are read at a time."""
_LEAST = 2
"""Tokens of a window: one to go by, and one to predict."""
_FULL = 0.75
"""How long the windows of a batch are at least, compared with its longest: the others are padded."""

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configs call the most tokens of a window."""

Document = str | Sequence[dict[str, Any]]
"""A text, or the messages of a conversation."""


class Tokens(Protocol):
    def tokens(self, text: str) -> list[int]: ...
    def tokens_of_chat(self, messages: Sequence[dict[str, Any]], /) -> list[int]: ...


@dataclass(frozen=True)
class Text:
    """A file of text, in UTF-8: one document; or of JSON lines, a document in each; or a Parquet table, a document in
    each row. Text and JSON lines may be packed by gzip."""

    path: Path
    field: str | None = None
    """The name of the document in a JSON line, or a table's column: a text, or a list of messages. None: `text` in
    tables and in files named .jsonl and .ndjson; others are plain text."""

    @classmethod
    def at(cls, reference: str | os.PathLike[str], field: str | None = None, *, offline: bool = False) -> Text:
        """A file at a path, or in a dataset on the Hub, at hf://datasets/ORG/NAME[@REVISION]/FILE. Raises what
        `dataset_file` raises."""
        return cls(text_file(reference, offline=offline), field)

    def documents(self) -> Iterator[Document]:
        """`ConversionRefused` for a file that can't be read, or a line that isn't what it should be."""
        field, suffix = self.field, Path(self.path.name.lower().removesuffix(PACKED)).suffix
        if field is None and suffix in (*JSON_LINES, TABLE):
            field = "text"
        if suffix == TABLE:
            yield from self._rows(str(field))
            return
        text = self._read()
        if field is None:
            yield text
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield self._document(_json(line, f"{self.path}: line {number}"), field, f"{self.path}: line {number}")

    def _rows(self, field: str) -> Iterator[Document]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise ConversionRefused(
                f"{self.path}: pyarrow is not installed, which reads it: pip install 'nf4-converter[parquet]'"
            ) from None
        try:
            with parquet.ParquetFile(self.path) as table:
                if field not in table.schema_arrow.names:
                    self._document(dict.fromkeys(table.schema_arrow.names), field, str(self.path))
                rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(_ROWS, columns=[field]))
                for number, row in enumerate(rows, 1):
                    yield self._document(row, field, f"{self.path}: row {number}")
        except (ArrowException, OSError) as exc:
            raise ConversionRefused(f"{self.path}: not a table of Parquet that can be read: {exc}") from exc

    def _read(self) -> str:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ConversionRefused(f"{self.path}: more than {MAX_BYTES:,} bytes; give a part of it")
            if self.path.name.lower().endswith(PACKED):
                return self._unpacked().decode()
            return self.path.read_text(encoding="utf-8")
        except (zlib.error, EOFError, gzip.BadGzipFile) as exc:
            raise ConversionRefused(f"{self.path}: can't be unpacked: {exc}") from exc
        except OSError as exc:
            raise ConversionRefused(f"{self.path}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConversionRefused(f"{self.path}: not text in UTF-8, at byte {exc.start:,}") from exc

    def _unpacked(self) -> bytes:
        with gzip.open(self.path) as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConversionRefused(f"{self.path}: more than {MAX_BYTES:,} bytes once unpacked; give a part of it")
        return raw

    @staticmethod
    def _document(value: object, field: str, where: str) -> Document:
        if not isinstance(value, dict) or field not in value:
            there = f"; it has {', '.join(map(str, value))}" if isinstance(value, dict) else ""
            raise ConversionRefused(f"{where}: no {field!r}{there}; name it with `field`")
        document: Document = value[field]
        are_messages = isinstance(document, list) and all(isinstance(one, dict) for one in document)
        if not isinstance(document, str) and not (are_messages and document):
            raise ConversionRefused(f"{where}: {field!r} is neither a text nor a list of messages")
        return document


def text_file(reference: str | os.PathLike[str], *, offline: bool = False) -> Path:
    """The path of a text's file on this machine. A file of a dataset on the Hub is fetched first."""
    place = os.fspath(reference)
    return dataset_file(place, offline=offline) if is_dataset_file(place) else Path(place)


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConversionRefused(f"{where}: not JSON: {exc}") from exc


def window_of(asked: int | None, config: Mapping[str, Any], parameter: str = "window") -> int:
    """Tokens of a window. None: 2048, or as many as the model of this config takes. `BadRecipe` for more than that, by
    the name of the parameter that asks for it."""
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    stated = [part[name] for part in parts for name in _POSITIONS if isinstance(part.get(name), int)]
    most = min((one for one in stated if one > 1), default=None)
    if asked is not None and most is not None and asked > most:
        raise BadRecipe(f"`{parameter}` {asked}: the model takes at most {most} tokens")
    return asked or min(DEFAULT_WINDOW, most or DEFAULT_WINDOW)


def windows_of(documents: Iterable[Document], tokenizer: Tokens, size: int, most: int | None = None) -> list[list[int]]:
    """Documents cut into windows of `size` tokens, which don't overlap. Of a window of one token there is nothing to
    predict: it is left out. `most`: no window begins once there are so many tokens."""
    windows: list[list[int]] = []
    count = 0
    for document in documents:
        tokens = tokenizer.tokens(document) if isinstance(document, str) else tokenizer.tokens_of_chat(document)
        for start in range(0, len(tokens), size):
            if most is not None and count >= most:
                return windows
            window = tokens[start : start + size]
            if len(window) >= _LEAST:
                windows.append(window)
                count += len(window)
    return windows


@dataclass(frozen=True)
class Batch:
    """Windows that are run together."""

    tokens: Tensor
    """(windows, tokens), int64. A shorter window is continued with its last token, which no earlier one sees."""
    lengths: Sequence[int]
    """Of each window, in tokens."""


def in_batches(windows: Sequence[Sequence[int]], most: int) -> list[Batch]:
    """Batches of at most `most` tokens, or of one window; the longest windows first."""
    import torch

    batches: list[Batch] = []
    waiting = sorted(windows, key=len, reverse=True)
    while waiting:
        longest = len(waiting[0])
        together = [one for one in waiting[: max(1, most // longest)] if len(one) >= _FULL * longest]
        waiting = waiting[len(together) :]
        padded = [[*one, *[one[-1]] * (longest - len(one))] for one in together]
        batches.append(Batch(torch.tensor(padded), [len(one) for one in together]))
    return batches
