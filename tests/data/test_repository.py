"""Repository documents: every file once, what is imported above what imports, rings broken the same way always."""

import ast

from hypothesis import given
from hypothesis import strategies as st

from minglm.data.sources.repository import concatenate, dependencies, imported, modules, order

names = st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=10)


@st.composite
def graphs(draw):
    """Draw {path: paths it needs}, rings and self-reference allowed."""
    nodes = draw(names)
    some = st.sets(st.sampled_from(nodes), max_size=3) if nodes else st.just(set())
    return {node: draw(some) - {node} for node in nodes}


def reaches(needs, start, goal):
    """Tell whether `goal` can be reached from `start`, by repeated steps."""
    seen = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node == goal:
            return True
        if node not in seen:
            seen.add(node)
            waiting += needs[node]
    return False


@given(graphs(), st.randoms(use_true_random=False))
def test_imported_files_stand_above(needs, shuffler):
    """If a needs b, and b does not lead back to a, then b is placed before a, in whatever order the files come."""
    placed = order(needs)
    assert sorted(placed) == sorted(needs)
    for a in needs:
        for b in needs[a]:
            assert placed.index(b) < placed.index(a) or reaches(needs, b, a)
    items = list(needs.items())
    shuffler.shuffle(items)
    assert order(dict(items)) == placed


def test_a_long_chain_needs_no_deep_recursion():
    """5,000 files that import one another in a chain are put in order."""
    needs = {f"{n:05d}": {f"{n + 1:05d}"} if n < 4999 else set() for n in range(5000)}
    assert order(needs) == sorted(needs, reverse=True)


@given(graphs())
def test_concatenation_holds_every_file_in_order(needs):
    """The document has one header per file, in an order that its own imports confirm, and the files' text unchanged."""
    files = {
        f"pkg/{node}.py": "".join(f"from pkg import {other}\n" for other in sorted(others))
        + f"NAME = '{node}'\n"
        for node, others in needs.items()
    }
    text = concatenate(files)
    headers = [line[2:] for line in text.splitlines() if line.startswith("# pkg/")]
    assert headers == order(
        {f"pkg/{a}.py": {f"pkg/{b}.py" for b in others} for a, others in needs.items()}
    )
    for path, content in files.items():
        assert f"# {path}\n{content}" in text
    ast.parse(text)


def test_imports_resolve_as_python_resolves_them():
    """Absolute, relative, nested and member imports lead to the file; outside packages and the file itself do not."""
    files = {
        "app/__init__.py": "from . import core\n",
        "app/core/__init__.py": "import os, json\nfrom .engine import run\n",
        "app/core/engine.py": "def run():\n    from ..tools.text import clean as c\n    import app.core.engine\n",
        "app/tools/text.py": "import app.tools.numbers as n\nclass A:\n    from app import missing\n",
        "app/tools/numbers.py": "def broken(:\n",
    }
    assert dependencies(files) == {
        "app/__init__.py": {"app/core/__init__.py"},
        "app/core/__init__.py": {"app/core/engine.py"},
        "app/core/engine.py": {"app/tools/text.py"},
        "app/tools/text.py": {"app/tools/numbers.py", "app/__init__.py"},
        "app/tools/numbers.py": set(),
    }
    assert imported("a.py", "def broken(:") == set()


def test_a_checkout_is_read_below_its_folder_and_src():
    """In a checkout `repo/src/pkg/a.py` is imported as pkg.a, and `repo/pkg/b.py` as pkg.b."""
    found = modules(["repo/src/pkg/a.py", "repo/pkg/b.py", "repo/pkg/__init__.py"])
    assert found["pkg.a"] == "repo/src/pkg/a.py" and found["pkg.b"] == "repo/pkg/b.py"
    assert found["pkg"] == "repo/pkg/__init__.py"


def test_other_languages_have_their_own_comment():
    """Files that are not Python come too, with a header in a comment of their language."""
    text = concatenate({"r/a.c": "int main() {}\n", "r/b.py": "x = 1\n"})
    assert text == "// r/a.c\nint main() {}\n\n# r/b.py\nx = 1\n"
