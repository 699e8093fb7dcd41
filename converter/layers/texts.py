"""Documents from a file of text or of JSON lines, and the windows of tokens that they are cut into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.calibration import DEFAULT_WINDOW
from converter.errors import BadRecipe, ConversionRefused

if TYPE_CHECKING:
    from torch import Tensor

JSON_LINES = (".jsonl", ".ndjson")
MAX_BYTES = 1_000_000_000
"""Of a text: it is in memory while it is cut into tokens."""
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
    """A file of text, in UTF-8: one document; or of JSON lines: a document in each line."""

    path: Path
    field: str | None = None
    """The name of the document in a JSON line: a text, or a list of messages. None: `text` in files named .jsonl and
    .ndjson; others are plain text."""

    def documents(self) -> Iterator[Document]:
        """`ConversionRefused` for a file that can't be read, or a line that isn't what it should be."""
        field = self.field
        if field is None and self.path.suffix.lower() in JSON_LINES:
            field = "text"
        text = self._read()
        if field is None:
            yield text
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield self._document(line, field, f"{self.path}: line {number}")

    def _read(self) -> str:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ConversionRefused(f"{self.path}: more than {MAX_BYTES:,} bytes; give a part of it")
            return self.path.read_text(encoding="utf-8")
        except OSError as exc:
            raise ConversionRefused(f"{self.path}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConversionRefused(f"{self.path}: not text in UTF-8, at byte {exc.start:,}") from exc

    @staticmethod
    def _document(line: str, field: str, where: str) -> Document:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ConversionRefused(f"{where}: not JSON: {exc}") from exc
        if not isinstance(value, dict) or field not in value:
            there = f"; it has {', '.join(map(str, value))}" if isinstance(value, dict) else ""
            raise ConversionRefused(f"{where}: no {field!r}{there}; name it with `field`")
        document: Document = value[field]
        are_messages = isinstance(document, list) and all(isinstance(one, dict) for one in document)
        if not isinstance(document, str) and not (are_messages and document):
            raise ConversionRefused(f"{where}: {field!r} is neither a text nor a list of messages")
        return document


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
