"""What a Python file declares: its definitions, docstrings and imports, from one parse of its text.

Quality, prose and repositories (paper 2.2, 2.3) all look at code through its syntax tree. Parsing is the dearest step
of building the corpus, so each text is parsed once and only this outline of it is kept. No counterpart in the paper.
"""

import ast
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Outline:
    """docstrings: (line, text as written) of the module, classes and functions; the module's line is 0.

    definitions: number of functions and classes. imports: (level, module, names); level counts the dots of a relative
    import, names are empty for `import module`.
    """

    docstrings: tuple
    definitions: int
    imports: tuple


def _statements(tree):
    """All statements, in order of the text; expressions, where most nodes are, are not entered."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        inside = [
            getattr(node, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")
        ]
        waiting += reversed([child for block in inside for child in block])


@functools.lru_cache(maxsize=1 << 12)
def outline(text):
    """The Outline of a Python text, or None where it does not parse."""
    try:
        tree = ast.parse(text)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # what odd input is known to raise
        return None
    docstrings, definitions, imports = [], 0, []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append(
                (node.level, node.module or "", tuple(alias.name for alias in node.names))
            )
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            definitions += node is not tree
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                docstrings.append((getattr(node, "lineno", 0), docstring))
    return Outline(tuple(docstrings), definitions, tuple(imports))
