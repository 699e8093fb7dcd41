"""What the text of an option becomes: sizes, shares, formats, places."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Size(click.ParamType[int]):
    """5GB, 500MB, 512MiB: bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if found is None or found[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5GB or 512MiB", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


class Share(click.ParamType[float]):
    """5%, 0.05: a share of the whole."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a share such as 5% or 0.05", param, ctx)
        return share


class Part(click.ParamType[tuple[int, int]]):
    """2/4: the second of four parts."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if found is None:
            self.fail(f"{value!r} is not a part such as 1/4", param, ctx)
        return int(found[1]), int(found[2])


FORMATS = ("nf4", "fp4", "int8", "bf16", "fp16", "w4a16", "w8a16", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16")
"""As the help lists them."""


class Format(click.ParamType[str]):
    """nf4, NF4, 4bit: an output format."""

    name = "FORMAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from converter.recipe import format_meant, instead_of_format

        name = format_meant(str(value))
        if name is None:
            instead = instead_of_format(str(value))
            self.fail(f"{value!r} is not one of {', '.join(FORMATS)}{instead and '; '}{instead}", param, ctx)
        return name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in FORMATS if name.startswith(incomplete.lower())]


class Place(click.ParamType[str]):
    """A folder, an id on the Hub, or a file; shells complete it from what is on the disk."""

    name = "PATH"

    def __init__(self, of: str = "dir") -> None:
        self._of = of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self._of)]
