"""Write from the source what two pages say of it: minglm/README.md's tree and links, README.md's tables of metrics.

    python tests/helpers/package_map.py          # rewrites both

The tree has a line for each file: the first sentence of its module docstring. A table of metrics has a row for each field
of a log record whose docstring says "Healthy:" and "Broken:". Everything else in the pages is written by hand. A link such
as [`training_loss`](train/loss.py) names a definition and the file that must have it: no line, which every edit would move.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from minglm.common.log import Record
from minglm.report import records

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "minglm"
PAGE = PACKAGE / "README.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.(?:py|c))\)")


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without the paper section at its end."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(docstring.partition("\n\n")[0].split())
    # A sentence ends at a full stop before a space and a capital letter; "2.1" and "e.g." do not end one.
    sentence = re.split(r"(?<=[a-z)`])\. (?=[A-Z`])", sentence)[0].rstrip(".")
    return re.sub(r" \((?=[^()]*(?:paper|section|counterpart))[^()]*\)$", "", sentence)


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


def defines(path: Path, name: str) -> bool:
    """Tell whether `name`, or `Class.method`, is defined in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".c":
        return re.search(rf"^\w.*\b{name}\(", text, re.MULTILINE) is not None
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part or assigns(n, part)), None)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def assigns(node: ast.stmt, name: str) -> bool:
    """Tell whether a statement gives `name` its value."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def updated(page: str) -> str:
    """Return the page with its tree made again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "```text\n" + "\n".join(["minglm/", *tree()]) + "\n```\n" + END + after


def dead_links(page: str) -> list[str]:
    """Return the links of the page whose file has no definition of that name."""
    return [
        f"{name} in {file}"
        for name, file in LINK.findall(page)
        if not defines(PACKAGE / file, name)
    ]


def field_docs(record: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, inherited fields first."""
    docs = {}
    for base in reversed(record.__mro__):
        if base is Record or not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:]):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(doc.value.value))
    return docs


def _join(text: str) -> str:
    return " ".join(text.split())


def metrics_table(kinds: Sequence[type[Record]]) -> str:
    """Return the README's table of the metrics of these kinds: formula, healthy values, and what broken looks like.

    A metric is a field whose docstring says "Healthy:" and "Broken:". With several kinds the name of a metric begins
    with that of its kind.
    """
    lines = ["| name | formula | healthy | what broken looks like |", "|---|---|---|---|"]
    for kind in kinds:
        prefix = f"{kind.kind}." if len(kinds) > 1 else ""
        for name, doc in field_docs(kind).items():
            formula, _, rest = doc.partition("Healthy:")
            healthy, _, broken = rest.partition("Broken:")
            if broken:
                formula = _join(formula).removesuffix(".")
                cells = [f"`{prefix}{name}`", formula, _join(healthy), _join(broken)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


METRICS = (
    (records.StepRecord,),
    (records.RLRecord,),
    (
        records.EvaluationRecord,
        records.BitsPerByteRecord,
        records.MTPAcceptanceRecord,
        records.NeedleRecord,
        records.BitsByPositionRecord,
        records.PathologyRecord,
    ),
)
"""The records of each table of metrics in README.md, in the order of the tables."""


def with_metrics(readme: str) -> str:
    """Return README.md with its tables of metrics made again."""
    tables = [metrics_table(kinds) for kinds in METRICS]
    header = re.escape(tables[0].splitlines()[0])
    found = list(re.finditer(rf"^{header}\n(?:\|.*\n)+", readme, re.MULTILINE))
    if len(found) != len(tables):
        raise ValueError(f"README.md has {len(found)} tables of metrics, expected {len(tables)}")
    for match, table in reversed(list(zip(found, tables, strict=True))):
        readme = readme[: match.start()] + table + readme[match.end() :]
    return readme


if __name__ == "__main__":
    for page, renew in ((PAGE, updated), (README, with_metrics)):
        page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)
