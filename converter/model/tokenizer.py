"""A checkpoint's tokenizer, by transformers. No code of the checkpoint runs; a sandbox renders chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.errors import BadCheckpoint, ConversionRefused
from converter.silence import quietly


class Tokenizer:
    """The tokenizer of a local folder. `BadCheckpoint` if it has none that can be loaded."""

    def __init__(self, folder: Path) -> None:
        with quietly():
            from transformers import AutoTokenizer

            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as exc:  # whatever foreign code raises for files that are missing or wrong
                reason = " ".join(str(exc).split()) or type(exc).__name__
                raise BadCheckpoint(f"{folder}: its tokenizer can't be loaded: {reason:.200}") from exc

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around it."""
        with quietly():
            found: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return found

    @property
    def begin(self) -> int | None:
        """The token that begins each text; None: there is none."""
        found = self.tokens("")
        return found[0] if found else None

    @property
    def words(self) -> int:
        """How many tokens it has."""
        return len(self._tokenizer)

    def tokens_of_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, by the chat template. `ConversionRefused` if there is none, or it refuses it."""
        with quietly():
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False)
                found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            except Exception as exc:  # a template may raise anything
                reason = " ".join(str(exc).split()) or type(exc).__name__
                raise ConversionRefused(f"messages that the chat template can't render: {reason:.200}") from exc
        return found
