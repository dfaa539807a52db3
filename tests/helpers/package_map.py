"""Write minglm/README.md's annotated tree and the line numbers of its links, from the source.

    python tests/helpers/package_map.py          # rewrites minglm/README.md

The tree has a line for each file: the first sentence of its module docstring. A link such as [`training_loss`](train/loss.py#L1)
points to the definition of that name; the line after `#L` is looked up again. Everything else in the page is written by hand.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "minglm"
PAGE = PACKAGE / "README.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.(?:py|c))(?:#L\d+)?\)")


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without the paper section at its end."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(docstring.partition("\n\n")[0].split())
    # A sentence ends at a full stop before a space and a capital letter; "2.1" and "e.g." do not end one.
    sentence = re.split(r"(?<=[a-z)`])\. (?=[A-Z`])", sentence)[0].rstrip(".")
    return re.sub(r" \((?:paper|no section|section)[^()]*\)$", "", sentence)


def tree(folder: Path = PACKAGE, prefix: str = "") -> list[str]:
    """Return the lines of the annotated tree below a folder: folders first by name, then files."""
    entries = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    entries = [path for path in entries if path.is_dir() or path.suffix == ".py"]
    folders = [path for path in entries if path.is_dir() and (path / "__init__.py").exists()]
    files = [path for path in entries if path.is_file()]
    lines = []
    for path in [*folders, *files]:
        last = path == [*folders, *files][-1]
        branch = "└── " if last else "├── "
        name = f"{prefix}{branch}{path.name}{'/' if path.is_dir() else ''}"
        source = path / "__init__.py" if path.is_dir() else path
        lines.append(f"{name:<44}{summary(source)}".rstrip())
        if path.is_dir():
            lines += tree(path, prefix + ("    " if last else "│   "))
    return lines


def definition(path: Path, name: str) -> int:
    """Return the line where `name`, or `Class.method`, is defined in a file. Raises ValueError where it is not."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".c":
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(rf"\w.*\b{name}\(", line):
                return number
        raise ValueError(f"{path}: no function {name}")
    body: list[ast.stmt] = ast.parse(text).body
    node = None
    for part in name.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part or assigns(n, part)), None)
        if node is None:
            raise ValueError(f"{path.relative_to(ROOT)}: nothing is called {name}")
        body = getattr(node, "body", [])
    assert node is not None
    return node.lineno


def assigns(node: ast.stmt, name: str) -> bool:
    """Tell whether a statement gives `name` its value."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def updated(page: str) -> str:
    """Return the page with its tree and its links made again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    page = before + BEGIN + "```text\n" + "\n".join(["minglm/", *tree()]) + "\n```\n" + END + after
    return LINK.sub(
        lambda match: f"[`{match[1]}`]({match[2]}#L{definition(PACKAGE / match[2], match[1])})",
        page,
    )


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
