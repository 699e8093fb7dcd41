"""`--config FILE` and `--print-config`: the options of a conversion as a file, in TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import cloup
from click.core import ParameterSource

from converter.cli.values import Place

OF_THIS_RUN = {"config", "print_config", "dry_run", "as_json", "progress", "quiet", "verbose", "version", "help"}
"""Parameters that are no part of a conversion."""
PLACES = {"base", "adapters", "out", "card", "against", "report", "metrics", "calibrate"}
"""Parameters with paths: relative to the folder of the file."""


def _read(context: click.Context, _: click.Parameter, file: str | None) -> str | None:
    """Take what a file says for the defaults of the options."""
    if file is not None:
        context.default_map = {**(context.default_map or {}), **options_in(Path(file).expanduser(), context.command)}
    return file


with_config = cloup.option(
    "--config",
    type=Place("file"),
    metavar="FILE",
    is_eager=True,
    callback=_read,
    help="Take options from a TOML file, or from the receipt of an output. The command line goes first.",
)
with_print_config = cloup.option(
    "--print-config", is_flag=True, help="Print the options as a file for --config, and stop."
)


def options_in(path: Path, command: click.Command) -> dict[str, Any]:
    """Parameter → value, of a file of options or of a receipt; `UsageError` names what it can't be."""
    from converter.errors import ConverterError

    if path.is_dir():
        path /= "conversion.json"
    try:
        stated = _of_receipt(path) if path.suffix == ".json" else _of_toml(path)
        if isinstance(how := stated.get("combine"), dict):
            options = {"kind": "combine", "weights": "weight", "rank": "svd_rank"}
            del stated["combine"]
            stated |= {options.get(str(key), str(key)): value for key, value in how.items()}
        known = {name: parameter for parameter in _of_conversion(command) for name in _names(parameter)}
        found: dict[str, Any] = {}
        for key, value in stated.items():
            parameter = known.get(key.replace("_", "-"))
            if parameter is None:
                raise click.UsageError(f"--config {path}: {key!r} is no option; convert --help lists them")
            if parameter.name in found:
                raise click.UsageError(f"--config {path}: {key!r} stands there twice, by two names")
            found[str(parameter.name)] = _value(path, key, value, parameter)
        return found
    except ConverterError as exc:
        raise click.UsageError(f"--config {exc}") from exc


def _of_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        stated = tomllib.loads(path.read_text())
    except OSError as exc:
        raise click.UsageError(f"--config {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise click.UsageError(f"--config {path}: {exc}") from exc
    recipe = stated.pop("recipe", {})
    if not isinstance(recipe, dict):
        raise click.UsageError(f"--config {path}: recipe is no table")
    return stated | recipe


def _of_receipt(path: Path) -> dict[str, Any]:
    """The recipe, and of base and adapter what names they have on the Hub."""
    from converter.recipe import Recipe
    from converter.seal.receipt import RECEIPT, read_receipt

    receipt = read_receipt(path.parent) if path.name == RECEIPT else None
    if receipt is None:
        raise click.UsageError(f"--config {path}: no receipt of this tool, and no TOML file")
    recipe, origin = Recipe.from_json(receipt.get("recipe")).as_json(), receipt.get("origin")
    origin = origin if isinstance(origin, dict) else {}
    named = {
        option: origin.get(key)
        for option, key in (
            ("base", "base_name"),
            ("base_revision", "base_commit"),
            ("adapter", "adapter_name"),
            ("adapter_revision", "adapter_commit"),
        )
    }
    return {**recipe, **{option: name for option, name in named.items() if isinstance(name, str)}}


def _value(path: Path, key: str, value: Any, parameter: click.Option) -> Any:
    """As the command line would give it."""
    if parameter.is_flag != isinstance(value, bool) or isinstance(value, dict):
        raise click.UsageError(f"--config {path}: {key} is {'true or false' if parameter.is_flag else 'no such value'}")
    if parameter.multiple:
        several = value if isinstance(value, list) else [value]
        return [_placed(path.parent, str(one)) if parameter.name == "adapters" else str(one) for one in several]
    if isinstance(value, list):
        raise click.UsageError(f"--config {path}: {key} is a single value")
    return _placed(path.parent, str(value), parameter.name) if parameter.name in PLACES else value


def _placed(folder: Path, text: str, name: str | None = "adapters") -> str:
    from converter.batch.adapters import names_several
    from converter.batch.job_file import referred
    from converter.batch.jobs import split_name
    from converter.calibration import SELF
    from converter.read.hub.datasets import is_dataset_file

    if name == "calibrate" and (text == SELF or is_dataset_file(text)):
        return text
    if name not in ("base", "adapters"):
        return str(folder / Path(text).expanduser())
    called, text = split_name(text) if name == "adapters" else (None, text)
    there = str(folder / text) if names_several(text, folder) else referred(text, folder)
    return there if called is None else f"{called}={there}"


def _of_conversion(command: click.Command) -> Iterator[click.Option]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in OF_THIS_RUN:
            yield parameter


def _names(parameter: click.Option) -> list[str]:
    return [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]


def config_text(context: click.Context) -> str:
    """The options of a command line as TOML: what is given, and all that shapes bytes."""
    from dataclasses import fields

    from converter.recipe import Recipe

    shaping = {field.name for field in fields(Recipe)}
    lines = []
    for parameter in _of_conversion(context.command):
        name, value = str(parameter.name), context.params[str(parameter.name)]
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if value not in (None, ()) and (given or name in shaping):
            lines.append(f"{_names(parameter)[0].replace('-', '_')} = {_toml(value)}\n")
    return "".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]" if len(value) != 1 else _toml(value[0])
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
