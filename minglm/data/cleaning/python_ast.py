"""Read what a Python file declares: its definitions, docstrings and imports, from one parse of its text.

The quality rubric, docstrings as prose, and the order of files in a repository (paper 2.2, 2.3) all need the
syntax tree. Parsing is the most expensive step of building the corpus, so each text is parsed once and only
this outline of it is kept.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Docstring(NamedTuple):
    """The docstring of a module, class or function."""

    line: int
    """Where the class or function begins; 0 for the module."""
    text: str
    """As written, not cleaned."""


class Import(NamedTuple):
    """One imported module."""

    level: int
    """Number of leading dots of a relative import."""
    module: str
    names: tuple[str, ...]
    """Empty for `import module`."""


@dataclass(frozen=True)
class Outline:
    """What a Python file declares."""

    docstrings: tuple[Docstring, ...]
    definitions: int
    """Number of functions and classes."""
    imports: tuple[Import, ...]


BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Attributes of a syntax node that hold statements."""


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements in the order of the text; expressions, where most nodes are, are not entered."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        children = [child for block in BLOCKS for child in getattr(node, block, [])]
        stack.extend(reversed(children))


@functools.lru_cache(maxsize=1 << 12)
def outline(text: str) -> Outline | None:
    """Return the outline of a Python text, or None if it does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    docstrings = []
    definitions = 0
    imports = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            imports += [Import(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append(Import(node.level, node.module or "", names))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node is not tree:
                definitions += 1
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                docstrings.append(Docstring(getattr(node, "lineno", 0), docstring))
    return Outline(tuple(docstrings), definitions, tuple(imports))
