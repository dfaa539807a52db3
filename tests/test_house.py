"""The rules of the house, read from the source: import floors, axis letters, docstrings, sizes, what may be imported.

Each rule is a function from a file's name and text to a list of offences. It is run over the whole source, and on a
small bad sample that it must flag: a rule that cannot fail holds nothing.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((ROOT / "minglm").rglob("*.py"))
}

FLOORS = {
    0: ("config", "model_config", "overrides", "common", "writers"),
    1: ("kernels", "data", "chat", "optim"),
    2: ("model", "parallel"),
    3: ("train", "inference"),
    4: ("envs", "rl"),
    5: (
        "agenda",
        "evaluate",
        "long_context",
        "report",
        "plan",
        "prepare",
        "agenda",
        "pipeline",
        "testing",
        "terminal",
        "stock",
        "__main__",
    ),
}
FLOORS[5] += ("exchange",)  # models of runs, in and out
FLOORS[5] += (
    "figures",
    "curves",
    "diagram",
    "lesson",
    "bench",
)  # what reports and lessons draw with
FLOORS[5] += ("bench_train", "bench_kernels", "bench_cases", "bench_compile")
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names} | {
    "load_config": 0,
    "GLM": 2,
}

# What `pip install minglm` brings; everything else that is not Python's own is imported where it is used.
DEPENDENCIES = {
    "torch",
    "einops",
    "numpy",
    "tqdm",
    "matplotlib",
    "tokenizers",
    "safetensors",
    "tyro",
    "minglm",
}

FILE_LINES, FUNCTION_LINES = 330, 70
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
LONGER = {
    "minglm/config/run.py": 500
}  # one table of every field, which is looked up and not read from top to bottom


def imports(tree):
    """(dotted module, line, at top level?) of every import statement, also those inside functions."""
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, FUNCTIONS | ast.Lambda) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            names = [node.module]
            if node.module == "minglm":
                names = [f"minglm.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) not in inside


def house(path):
    """The room a file belongs to: minglm/model/moe.py is in `model`, minglm/report/card.py in `report`."""
    return Path(path).with_suffix("").parts[1]


def high_imports(path, text):
    """Imports from a higher floor; minglm/__init__.py, which shows visitors the house, may import any."""
    if path == "minglm/__init__.py":
        return []
    floor = FLOOR.get(house(path))
    if floor is None:
        return [f"{path}: {house(path)} has no floor; give it one in the design"]
    offences = []
    for name, line, _ in imports(ast.parse(text)):
        parts = name.split(".")
        if parts[0] == "minglm" and len(parts) > 1 and FLOOR.get(parts[1], 0) > floor:
            offences.append(
                f"{path}:{line}: floor {floor} imports {name} from floor {FLOOR[parts[1]]}"
            )
    return offences


def undeclared_imports(path, text):
    """Packages outside the dependencies that are imported as soon as the module is."""
    allowed = DEPENDENCIES | set(sys.stdlib_module_names)
    if house(path) == "testing":
        allowed |= {"hypothesis", "pytest"}
    if house(path) == "kernels" and path.endswith(
        ("_triton.py", "_gluon.py")
    ):  # imported where a tensor asks for it
        allowed |= {"triton"}
    tree = ast.parse(text)
    return [
        f"{path}:{line}: {name} is not a dependency; import it where it is used"
        for name, line, top in imports(tree)
        if top and name.split(".")[0] not in allowed
    ]


def axis_letters():
    """The letters of the legend in minglm's docstring: one capital, two spaces, what it counts."""
    legend = ast.get_docstring(ast.parse(SOURCES["minglm/__init__.py"]))
    return set(re.findall(r"\b([A-Z])  (?=\w)", legend))


def unknown_axes(path, text):
    """Names that end in capitals outside the legend; a 1 stands for an axis of length one."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        name = getattr(
            node, {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}.get(type(node), ""), ""
        )
        ending = re.fullmatch(r"_*[a-z]\w*_([A-Z][A-Z0-9]{0,5})", name)
        if ending and not set(ending[1]) <= axis_letters() | {"1"}:
            found.add(f"{path}:{node.lineno}: {name} has axes outside the legend")
    return sorted(found)


def missing_docstrings(path, text):
    """Modules, public classes and public functions that do not say what they are."""
    tree = ast.parse(text)
    offences = [] if ast.get_docstring(tree) else [f"{path}:1: the module has no docstring"]
    for node in tree.body:
        if isinstance(node, FUNCTIONS | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                offences.append(f"{path}:{node.lineno}: {node.name} has no docstring")
            # a method that fills in one of a base class is described there
            methods = node.body if isinstance(node, ast.ClassDef) and not node.bases else []
            offences += [
                f"{path}:{method.lineno}: {node.name}.{method.name} is longer than ten lines and has no docstring"
                for method in methods
                if isinstance(method, FUNCTIONS) and not method.name.startswith("_")
                if method.end_lineno - method.lineno > 10 and not ast.get_docstring(method)
            ]
    return offences


def oversized(path, text):
    """Files longer than one sitting and functions longer than one screen."""
    lines, most = len(text.splitlines()), LONGER.get(path, FILE_LINES)
    offences = [f"{path}: {lines} lines, at most {most}"] if lines > most else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= FUNCTION_LINES:
            offences.append(
                f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            )
    return offences


def runs_text(path, text):
    """eval and exec, which would run what a model or a file says."""
    return [
        f"{path}:{node.lineno}: {node.func.id}() runs text as code"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec")
    ]


def leftovers(path, text):
    """Unfinished work, and paths of one machine."""
    words = ("TODO", "FIXME", "NotImplementedError", "/work/", "/tmp/env", "shared/DESIGN")
    return [
        f"{path}:{number}: contains {word!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in words
        if word in line
    ]


# rule: (a file name, a sample that breaks it)
RULES = {
    high_imports: ("minglm/model/moe.py", "def f():\n    from minglm.train import loop\n"),
    undeclared_imports: (
        "minglm/kernels/x.py",
        "try:\n    import triton\nexcept ImportError:\n    triton = None\n",
    ),
    unknown_axes: ("minglm/model/moe.py", "def f(scores_TZ):\n    return scores_TZ\n"),
    missing_docstrings: ("minglm/model/moe.py", '"""A module."""\n\ndef f():\n    return 1\n'),
    oversized: ("minglm/model/moe.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
    runs_text: ("minglm/envs/code.py", "def f(answer):\n    return eval(answer)\n"),
    leftovers: ("minglm/model/moe.py", "def f():\n    raise NotImplementedError\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule):
    """Every module of minglm keeps every rule of the house."""
    offences = [offence for path, text in SOURCES.items() for offence in rule(path, text)]
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_flags_its_bad_sample(rule):
    """A rule that nothing can break would hold nothing."""
    assert rule(*RULES[rule])


def test_a_long_file_is_flagged_and_a_lazy_import_is_not():
    """The other half of two rules: file size counts lines, and an optional package inside a function is welcome."""
    assert oversized("minglm/model/moe.py", "x = 1\n" * (FILE_LINES + 1))
    assert not undeclared_imports(
        "minglm/kernels/x.py", "def f():\n    import triton\n    return triton\n"
    )
    assert not undeclared_imports("minglm/kernels/x_triton.py", "import triton\n")
    assert not unknown_axes(
        "minglm/model/moe.py", "scores_TE = weight_1V + self.last_id + MASK_Z\n"
    )


def test_legend_has_the_letters_of_the_design():
    """The legend can be read, and has at least width, tokens and experts."""
    assert {"B", "S", "T", "D", "N", "M", "A", "V", "E", "K", "F"} <= axis_letters()


def tracked():
    """Files under version control; outside a checkout there are none to look at."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


def test_every_text_file_is_finished_and_portable():
    """No file of the project names a path of one machine, or says that something is still to be done."""
    suffixes = {".py", ".md", ".toml", ".json", ".jsonl", ".yaml", ".html", ".sh", ""}
    files = [ROOT / name for name in tracked() if Path(name).suffix in suffixes]
    files = [
        file for file in files if file.exists() and file != Path(__file__)
    ]  # this one names the words
    offences = [
        o for file in files for o in leftovers(str(file.relative_to(ROOT)), file.read_text())
    ]
    assert not offences, "\n" + "\n".join(offences)


def test_top_level_holds_what_the_design_names():
    """A visitor finds five folders, the README, the package file and the licence; the rest are dot-files."""
    named = {
        "minglm",
        "lessons",
        "configs",
        "tests",
        "figures",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    extra = {Path(name).parts[0] for name in tracked()} - named
    assert all(name.startswith(".") for name in extra), extra


def test_import_is_light():
    """`import minglm` loads none of the optional packages and no test library."""
    optional = {
        "triton",
        "transformers",
        "ray",
        "uvicorn",
        "pyarrow",
        "trl",
        "hypothesis",
        "matplotlib.pyplot",
    }
    program = f"import sys, torch; old = set(sys.modules); import minglm; print({optional} & (sys.modules.keys() - old))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
