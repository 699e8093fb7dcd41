"""Who may import whom: a picture of the package that holds."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import converter
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "converter"
SOURCES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}

ONLY_IN = {
    "transformers": {"meta_model"},
    "bitsandbytes": {"quantize"},
    "huggingface_hub": {"hub", "hub_errors"},
    "numba": {"kernels"},
    "regex": {"patterns"},
    "click": {"cli"},
    "rich": {"show"},
    "psutil": {"show"},
    "ray": {"ray_cluster"},
    "peft": set(),
    "safetensors": set(),
    "accelerate": set(),
}
"""Third parties that have one door."""

AT_THE_TOP = {("cli", "click"), ("kernels", "numba"), ("kernels", "numpy")}
"""Who may import which third party when it is itself imported; xxhash anyone, for it is light."""

OF_THE_OUTSIDE = {"cli", "show", "__main__"}
"""What talks to people, which no stage knows of."""


class Import(NamedTuple):
    importer: str
    module: str
    """All of it: converter.read, huggingface_hub.utils."""
    at_the_top: bool
    """Whether it happens when the importer is imported."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports() -> Iterator[Import]:
    """Every import of the package but those for type checkers only."""
    for name, tree in SOURCES.items():
        yield from _imports(name, tree, at_the_top=True)


def _imports(name: str, node: ast.AST, *, at_the_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, at_the_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{name}: a relative import"
            module = child.module or ""
            if module == "converter":  # from converter import errors
                yield from (Import(name, f"converter.{alias.name}", at_the_top) for alias in child.names)
            else:
                yield Import(name, module, at_the_top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(name, child, at_the_top=at_the_top and not inside)


def third_party(found: Import) -> bool:
    return found.package not in sys.stdlib_module_names and found.package != "converter"


def own(found: Import) -> str:
    """The module of ours that is imported."""
    return found.module.removeprefix("converter").removeprefix(".").partition(".")[0] or "__init__"


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_third_party_has_one_door(package: str) -> None:
    assert {found.importer for found in imports() if found.package == package} == ONLY_IN[package]


def test_no_other_third_party_is_imported() -> None:
    known = {*ONLY_IN, "torch", "numpy", "xxhash"}
    assert {found.package for found in imports() if third_party(found)} <= known


def test_heavy_libraries_are_imported_when_they_are_needed_and_not_before() -> None:
    early = {(found.importer, found.package) for found in imports() if third_party(found) and found.at_the_top}
    assert {(importer, package) for importer, package in early if package != "xxhash"} <= AT_THE_TOP


def test_kernels_are_imported_only_where_they_are_used() -> None:
    assert not [
        found for found in imports() if own(found) == "kernels" and found.package == "converter" and found.at_the_top
    ]


def test_no_stage_knows_of_the_command_line() -> None:
    known = {found.importer for found in imports() if found.package == "converter" and own(found) in OF_THE_OUTSIDE}
    assert known <= OF_THE_OUTSIDE


def test_the_command_line_knows_the_package_only_when_arguments_are_parsed() -> None:
    assert not [
        found for found in imports() if found.importer == "cli" and found.package == "converter" and found.at_the_top
    ]


def test_only_what_is_above_it_knows_the_pipeline() -> None:
    known = {found.importer for found in imports() if found.module == "converter.pipeline"}
    of_clusters = {"cluster", "parts", "ray_cluster", "worker"}
    assert known <= {"__init__", "batch", "passes", "verify", *of_clusters, *OF_THE_OUTSIDE}


def test_only_the_command_line_knows_of_clusters() -> None:
    own_files = {"cluster", "parts", "ray_cluster", "worker"}
    known = {found.importer for found in imports() if found.package == "converter" and own(found) in own_files}
    assert known - own_files == {"cli"}


def test_the_errors_know_nobody() -> None:
    assert {found.package for found in imports() if found.importer == "errors"} <= {"__future__"}


def test_reading_and_writing_know_nothing_of_models() -> None:
    for importer in ("read", "write", "layout", "kernels", "merge", "measure"):
        known = {own(found) for found in imports() if found.importer == importer and found.package == "converter"}
        assert known.isdisjoint({"architecture", "ask", "match", "decide", "seal", "pipeline", "hub", "inputs"}), (
            importer
        )


def test_imports_go_one_way() -> None:
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found in imports():
        if found.package == "converter" and found.at_the_top:
            graph[found.importer].add(own(found))
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]

    assert graph == {}, "these import each other in a circle"


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import converter, json, sys; print(json.dumps(sorted(sys.modules)))"

    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    loaded = {name.partition(".")[0] for name in json.loads(ran.stdout)}
    assert not loaded & {"torch", "numpy", "transformers", "bitsandbytes", "huggingface_hub", "numba", "peft", "rich"}
    assert ran.stderr == ""


def test_nothing_is_unpickled_evaluated_or_mapped() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "mmap", "runpy"}
    assert not {(found.importer, found.package) for found in imports() if found.package in forbidden}
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "__import__", "torch.load", "importlib.import_module"}, name


def test_modules_have_names_that_say_something() -> None:
    assert not SOURCES.keys() & {"utils", "helpers", "common", "manager", "handler", "process", "data", "info", "misc"}


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in SOURCES.items() if not ast.get_docstring(tree)] == []


def test_every_module_is_in_the_table_of_the_design() -> None:
    design = (REPOSITORY / "docs" / "design.md").read_text()
    dunder = {"__init__", "__main__"}
    assert [name for name in SOURCES if name not in dunder and f"`{name}.py`" not in design] == []


# The public names


def test_the_public_names_are_what_the_package_imports_and_nothing_else() -> None:
    tree = SOURCES["__init__"]
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]

    assert sorted(imported) == sorted(converter.__all__)
    assert {type(node) for node in tree.body} == {ast.Expr, ast.ImportFrom, ast.Assign}


@pytest.mark.parametrize("name", converter.__all__)
def test_a_public_name_says_what_it_is_and_how_it_is_typed(name: str) -> None:
    value = getattr(converter, name)

    assert inspect.getdoc(value)
    assert value.__module__.startswith("converter.")
    for function in [value] if inspect.isfunction(value) else _methods(value):
        signature = inspect.signature(function)
        untyped = [p.name for p in signature.parameters.values() if p.name != "self" and p.annotation is p.empty]
        assert not untyped, function
        assert signature.return_annotation is not signature.empty, function


def _methods(value: type) -> list[object]:
    return [f for name, f in inspect.getmembers(value, inspect.isfunction) if not name.startswith("_")]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(converter.__file__).parent / "py.typed").exists()
