"""A repository as one document: its files one after the other, what is imported before what imports (paper 2.3).

The paper's repository stage joins the files of one code base, so that a model reads a definition and, far below, its
use. Here the order is the order of the imports:

    a imports b, and b does not lead back to a   =>   b stands above a

Choices: imports are read from the syntax tree, absolute and relative, also those inside functions. Where files import
each other in a ring there is no such order; the ring is entered at the file whose path comes first. Each file begins
with a comment that gives its path, the only thing that says where one ends.

Issues, pull requests and commits are joined by `history`.
"""

from pathlib import PurePosixPath

from minglm.data.sources.python_ast import outline


def modules(paths):
    """{dotted module name: path}; a name may begin at a path's first folder or below it, or below a `src` in it."""
    found = {}
    for path in sorted(paths):
        parts = PurePosixPath(path).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        for skipped in (0, 1, 2) if parts[1:2] == ("src",) else (0, 1):
            found.setdefault(".".join(parts[skipped:]), path)
    found.pop("", None)
    return found


def imported(path, text):
    """Dotted names that a Python file may import, relative ones made absolute; none where it does not parse."""
    file, package = outline(text), PurePosixPath(path).parent.parts
    names = set()
    for level, module, members in file.imports if file else ():
        above = package[: len(package) - level + 1] if level else ()
        base = ".".join([*above, *([module] if module else [])])
        names |= {base} | {f"{base}.{member}" for member in members}
    return names


def dependencies(files):
    """files: {path: text}. Returns {path: set of the paths it imports, itself excluded}."""
    known = modules(files)
    python = {
        path: imported(path, text) if path.endswith(".py") else set()
        for path, text in files.items()
    }
    return {
        path: {known[name] for name in names if name in known} - {path}
        for path, names in python.items()
    }


def order(needs):
    """Paths in dependency order.

    needs: {path: set of paths}. Depth first, in sorted order: a path is placed when all it needs has been placed or is
    on the way to being placed, and the latter happens only in a ring. Linear in paths and imports.
    """
    placed, entered = [], set()
    for root in sorted(needs):
        waiting = [] if root in entered else [(root, iter(sorted(needs[root])))]
        entered.add(root)
        while waiting:
            path, rest = waiting[-1]
            following = next((other for other in rest if other not in entered), None)
            if following is None:
                placed.append(waiting.pop()[0])
            else:
                entered.add(following)
                waiting.append((following, iter(sorted(needs[following]))))
    return placed


def concatenate(files):
    """files: {path: text} of one repository. Returns the text of the repository document."""
    texts = []
    for path in order(dependencies(files)):
        comment = "#" if PurePosixPath(path).suffix in (".py", ".sh", ".rb", ".r") else "//"
        texts.append(f"{comment} {path}\n{files[path].rstrip()}\n")
    return "\n".join(texts)
