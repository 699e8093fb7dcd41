"""Linear layers that must stay in 16 bits because the model computes with their weights itself instead of calling them.

Mamba's mixer computes `self.dt_proj.weight @ x`: of a quantized layer it would get packed codes. Which layers these are
the source of transformers' classes says; it is read as text, not run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def modules_read_directly(model: PreTrainedModel) -> set[str]:
    """Modules whose weights a module around them computes with."""
    found = set()
    for name, module in model.named_modules():
        for attribute in _read_by(type(module)):  # type: ignore[arg-type]  # classes can be hashed
            child = getattr(module, attribute, None)
            if child is not None:
                found.add(f"{name}.{attribute}" if name else attribute)
    return found


@cache
def _read_by(kind: type) -> frozenset[str]:
    """The attributes of a class whose `weight` its methods compute with; those of the classes it derives from, too."""
    return frozenset().union(*(_in_source_of(base) for base in kind.__mro__))


@cache
def _in_source_of(kind: type) -> frozenset[str]:
    """The same, of the class's own source alone. All models share some classes, and theirs take the longest."""
    if not kind.__module__.startswith("transformers."):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made without a source
        return frozenset()
    found: set[str] = set()
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and "init" not in method.name:
            _collect(method, method, found)
    return frozenset(found)


def _collect(node: ast.AST, parent: ast.AST, found: set[str]) -> None:
    """Add X for each `self.X.weight` below a node, unless only its dtype or the like is asked, or for training."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "training" in ast.unparse(node.test):
        children = node.orelse
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        owner = node.value
        asked = isinstance(parent, ast.Attribute)
        asked = asked or (isinstance(parent, ast.Call) and ast.unparse(parent.func) == "isinstance")
        if isinstance(owner.value, ast.Name) and owner.value.id == "self" and not asked:
            found.add(owner.attr)
    for child in children:
        _collect(child, node, found)
