"""Who may import whom: a picture of the package that holds."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

import converter
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "converter"


def _name(path: Path) -> str:
    """A module below the package: `read.hub.folder`; of a package's own file, `read.hub`, and `` of the outermost."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

FOUNDATION, LOOP = "foundation", "loop"
"""The modules that lie in no room: those below all rooms, and those that run the conversion."""
ROOMS = (
    FOUNDATION,
    "read",
    "model",
    "merge",
    "quantize",
    "plan",
    "write",
    "seal",
    "layers",
    LOOP,
    "batch",
    "delivery",
    "export",
    "latency",
    "cli",
)
"""A room imports from itself and from those before it."""
WITHOUT_A_ROOM = {
    "errors": FOUNDATION,
    "recipe": FOUNDATION,
    "combination": FOUNDATION,
    "calibration": FOUNDATION,
    "resources": FOUNDATION,
    "gates": FOUNDATION,
    "job": FOUNDATION,
    "silence": FOUNDATION,
    "tensors": FOUNDATION,
    "threads": FOUNDATION,
    "device": FOUNDATION,
    "lock": FOUNDATION,
    "observer": LOOP,
    "recheck": LOOP,
    "tile": LOOP,
    "effect": LOOP,
    "supply": LOOP,
    "calibrate": LOOP,
    "pipeline": LOOP,
    "compare": LOOP,
    "verification": LOOP,
    "evaluation": LOOP,
    "health": LOOP,
    "samples": LOOP,
    "page": LOOP,
    "telling": LOOP,
    "signing": LOOP,
    "provenance": LOOP,
    "api": "cli",
    "public": "cli",
    "": "cli",
    "__main__": "cli",
}

COMMANDS = (
    "config",
    "convert",
    "verify",
    "evaluate",
    "benchmark",
    "batch",
    "pipeline",
    "export",
    "report",
    "sign",
    "doctor",
    "completion",
)
ONLY_IN = {
    "transformers": {f"model.{name}" for name in ("meta_model", "skeleton", "tokenizer", "generation")},
    "bitsandbytes": {"quantize.bnb"},
    "huggingface_hub": {
        "read.hub.folder",
        "read.hub.errors",
        "read.hub.login",
        "read.hub.datasets",
        "write.stores.hub",
    },
    "numba": {"quantize.jit"},
    "obstore": {"read.bucket.connection"},
    "mlflow": {"read.registry.server"},
    "requests": {"read.registry.server"},
    "jinja2": {"page"},
    "model_signing": {"signing"},
    "packaging": {"health"},
    "platformdirs": {"read.cache"},
    "click": {f"cli.{name}" for name in ("main", "options", "values", "watch", *COMMANDS)},
    "cloup": {f"cli.{name}" for name in ("options", *COMMANDS)},
    "rich": {"cli.show.progress"},
    "psutil": {"samples", "write.renaming"},
    "ray": {"batch.cluster.ray_cluster"},
    "yaml": {"batch.job_file", "export.kubernetes"},
    "peft": {"merge.bridge", "model.generation"},
    "safetensors": set(),
    "accelerate": set(),
    "prometheus_client": {"cli.metrics"},
    "pyarrow": {"layers.texts"},
    "opentelemetry": {"cli.spans"},
}
"""Third parties that have one door."""

KERNELS = {
    "quantize.jit",
    "quantize.kernels",
    "quantize.plain_kernels",
    "quantize.scheme_kernels",
    "quantize.scale_search_kernels",
    "quantize.rounding.feedback_kernels",
    "quantize.rounding.column_kernels",
}
"""Modules of compiled code."""

AT_THE_TOP = {(importer, package) for package in ("click", "cloup") for importer in ONLY_IN[package]}
AT_THE_TOP |= {("quantize.jit", "numba"), *((name, "numpy") for name in KERNELS)}
"""Who may import which third party when it is itself imported; xxhash anyone, for it is light."""


class Import(NamedTuple):
    importer: str
    module: str
    """All of it: converter.read.checkpoint, huggingface_hub.utils."""
    at_the_top: bool
    """Whether it happens when the importer is imported."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


@cache
def imports(*, with_types: bool = False) -> list[Import]:
    """Every import of the package; those for type checkers only if asked for."""
    found = (_imports(name, tree, at_the_top=True, with_types=with_types) for name, tree in SOURCES.items())
    return list(chain.from_iterable(found))


def _imports(name: str, node: ast.AST, *, at_the_top: bool, with_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not with_types:
            continue
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, at_the_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{name}: a relative import"
            module = child.module or ""
            of_modules = [alias for alias in child.names if own(f"{module}.{alias.name}") in SOURCES]
            yield from (Import(name, f"{module}.{alias.name}", at_the_top) for alias in of_modules)
            if len(of_modules) < len(child.names):
                yield Import(name, module, at_the_top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(name, child, at_the_top=at_the_top and not inside, with_types=with_types)


def third_party(found: Import) -> bool:
    return found.package not in sys.stdlib_module_names and found.package != "converter"


def own(module: str) -> str:
    """Of a module of ours, its name below the package."""
    return module.removeprefix("converter").removeprefix(".") if module.partition(".")[0] == "converter" else "?"


def room(module: str) -> str:
    first = module.partition(".")[0]
    return WITHOUT_A_ROOM.get(first, first)


def test_every_module_lies_in_a_room_that_the_order_knows() -> None:
    assert {room(name) for name in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in ROOMS if name not in (FOUNDATION, LOOP)])
def test_no_room_is_empty(name: str) -> None:
    assert [module for module in SOURCES if module.startswith(f"{name}.")]


def test_a_room_imports_only_from_the_rooms_before_it() -> None:
    against = [
        f"{found.importer} → {own(found.module)}"
        for found in imports(with_types=True)
        if found.package == "converter" and ROOMS.index(room(own(found.module))) > ROOMS.index(room(found.importer))
    ]
    assert against == []


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
    early = [found for found in imports() if own(found.module) in KERNELS and found.at_the_top]
    assert not [found for found in early if found.importer not in KERNELS]


def test_the_command_line_knows_the_package_only_when_arguments_are_parsed() -> None:
    parsing = {"cli.commands", *(found.importer for found in imports() if found.package == "click")}
    early = {own(found.module) for found in imports() if found.importer in parsing and found.at_the_top}
    assert {module for module in early if module in SOURCES} <= parsing


def test_the_process_imports_nothing_before_it_can_catch_a_signal() -> None:
    early = {found.module for found in imports() if found.importer in ("", "cli", "cli.main") and found.at_the_top}
    assert early == {"__future__", "os", "signal", "sys", "contextlib", "typing"}


def test_any_module_can_be_imported_first_and_without_the_public_names() -> None:
    program = "import converter.model.ask, sys; print('converter.public' in sys.modules)"

    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert ran.stdout == "False\n"


def test_only_the_command_line_knows_of_clusters() -> None:
    known = {found.importer for found in imports() if own(found.module).startswith("batch.cluster")}
    assert {importer for importer in known if not importer.startswith("batch.cluster")} == {"cli.batch"}


def test_the_errors_know_nobody() -> None:
    assert {found.package for found in imports() if found.importer == "errors"} <= {"__future__"}


def test_imports_go_one_way() -> None:
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found in imports(with_types=True):
        if found.package == "converter":
            graph[found.importer].add(own(found.module))
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
                assert called not in {"eval", "exec", "__import__", "importlib.import_module"}, name
                if called == "torch.load":
                    assert name == "read.pickled"
                    assert "weights_only=True" in map(ast.unparse, node.keywords)


def test_modules_have_names_that_say_something() -> None:
    vague = {"utils", "helpers", "common", "manager", "handler", "process", "data", "info", "misc"}
    assert not {name.rpartition(".")[2] for name in SOURCES} & vague


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in SOURCES.items() if not ast.get_docstring(tree)] == []


# The design's picture, and sizes


def drawn() -> dict[str, set[str]]:
    """The tree as docs/design.md draws it: folder → the modules that its row names."""
    design = (REPOSITORY / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `converter/([\w/]*)` \|.*\| ([^|]*) \|$", design, re.MULTILINE)
    return {folder.strip("/"): set(re.findall(r"`(\w+)`", files)) for folder, files in rows}


def test_the_design_draws_the_tree_as_it_is() -> None:
    there: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            there.setdefault("/".join(path.relative_to(PACKAGE).parts[:-1]), set()).add(path.stem)

    assert drawn() == there


def test_the_tests_have_the_same_rooms() -> None:
    folders = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))}
    tested = {path.parent.relative_to(REPOSITORY / "tests") for path in (REPOSITORY / "tests").rglob("test_*.py")}

    assert {folder for folder in folders if len(folder.parts) == 1 or folder.parts[0] == "batch"} <= tested


MOST_LINES, MOST_PARAMETERS = 400, 7


@pytest.mark.parametrize("folder", ["converter", "tests"])
def test_no_file_is_longer_than_can_be_read(folder: str) -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in (REPOSITORY / folder).rglob("*.py")}
    most = MOST_LINES if folder == "converter" else 1_400
    assert {name: lines for name, lines in long.items() if lines > most} == {}


def test_no_function_has_more_parameters_than_can_be_remembered() -> None:
    public = {"convert", "convert_batch", "plan_conversion", "verify", "evaluate"}
    many = []
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in public:
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([one for one in arguments if one.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS:
                    many.append(f"{name}.{node.name}: {count}")
    assert many == []


# The public names


def test_the_public_names_are_what_the_package_imports_and_nothing_else() -> None:
    tree = SOURCES["public"]
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
