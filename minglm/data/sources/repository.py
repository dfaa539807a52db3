"""Join a repository to one document: its files in the order of their imports (paper 2.3).

The paper's repository stage joins the files of one code base, so that a model reads a definition and, far
below, its use. Here the order is the order of the imports:

    a imports b, and b does not lead back to a   =>   b comes before a

Choices: imports are read from the syntax tree, absolute and relative, also those inside functions. Where
files import each other in a circle there is no such order; the circle is entered at the file whose path comes
first. Each file begins with a comment that gives its path; nothing else marks where a file ends.

Issues, pull requests and commits are joined by `history`.
"""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from minglm.data.cleaning.python_ast import outline
from minglm.data.languages import LANGUAGE_OF_SUFFIX, LANGUAGES


def modules(paths: Iterable[str]) -> dict[str, str]:
    """Return {dotted module name: path}. A name may begin at a path's first folder or below it, or below `src` in it."""
    names: dict[str, str] = {}
    for path in sorted(paths):
        folders = PurePosixPath(path).with_suffix("").parts
        if folders[-1] == "__init__":
            folders = folders[:-1]
        starts = (0, 1, 2) if folders[1:2] == ("src",) else (0, 1)
        for start in starts:
            names.setdefault(".".join(folders[start:]), path)
    names.pop("", None)
    return names


def imported(path: str, text: str) -> set[str]:
    """Return the dotted names that a Python file may import, relative ones made absolute; none if it does not parse."""
    file = outline(text)
    package = PurePosixPath(path).parent.parts
    names: set[str] = set()
    if file is None:
        return names
    for item in file.imports:
        # One dot is the file's own package, each further dot the package above.
        above = package[: len(package) - item.level + 1] if item.level else ()
        base = ".".join([*above, *([item.module] if item.module else [])])
        names.add(base)
        # `from a import b` may import the module a.b.
        names |= {f"{base}.{member}" for member in item.names}
    return names


def dependencies(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return {path: the other paths it imports} from {path: text}."""
    path_of = modules(files)
    needs = {}
    for path, text in files.items():
        names = imported(path, text) if path.endswith(".py") else set()
        needs[path] = {path_of[name] for name in names if name in path_of} - {path}
    return needs


def order(needs: Mapping[str, set[str]]) -> list[str]:
    """Return paths in dependency order: a path comes after all it needs, except in a circle.

    This is a depth-first search in sorted order, linear in paths and imports.

    Args:
        needs: {path: paths that it needs}.
    """
    placed = []
    entered = set()
    for root in sorted(needs):
        if root in entered:
            continue
        entered.add(root)
        # (path, what it needs and has not been looked at), from the root down to the path that is searched
        stack = [(root, iter(sorted(needs[root])))]
        while stack:
            path, rest = stack[-1]
            following = next((other for other in rest if other not in entered), None)
            if following is None:
                placed.append(path)
                stack.pop()
            else:
                entered.add(following)
                stack.append((following, iter(sorted(needs[following]))))
    return placed


def concatenate(files: Mapping[str, str]) -> str:
    """Return the text of the repository document, from {path: text}."""
    texts = []
    for path in order(dependencies(files)):
        language = LANGUAGE_OF_SUFFIX.get(PurePosixPath(path).suffix.lower())
        comment = LANGUAGES[language].comment if language else "//"
        texts.append(f"{comment} {path}\n{files[path].rstrip()}\n")
    return "\n".join(texts)
