"""Check the rules of the house against the source: no circles, rooms, axis letters, types, imports, leftovers.

A rule is a function from a file's name and text to a list of offences. It runs over the whole package, and on a small
bad sample that it must flag: a rule that cannot fail proves nothing.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "minglm").rglob("*.py"))
}

# What `pip install minglm` brings. Every other package is optional, and imported where it is used.
DEPENDENCIES = {
    "torch",
    "einops",
    "numpy",
    "tqdm",
    "matplotlib",
    "tokenizers",
    "safetensors",
    "tyro",
    "jsonschema",
    "referencing",
    "pygments",
    "minglm",
}

# Pairs of folders (importer, imported) that must stay apart, whatever the circles allow.
NEVER = [
    ("model", "parallel"),
    ("model", "train"),
    ("kernels", "model"),
    ("data", "envs"),
    ("data", "recipe"),
    ("inference", "serve"),
    ("envs", "rl"),
    ("rewards", "rl"),
    ("report", "bench"),
]

# Public names that only tests or lessons reach. The list may only get shorter.
WITHOUT_A_CALLER: set[str] = set()

# Files whose users are tests and lessons by design.
EQUIPMENT = ("minglm/testing/", "minglm/lesson.py", "minglm/kernels/toolchain/interpreter.py")

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
parse = functools.cache(ast.parse)  # every rule reads every file
Rule = Callable[[str, str], list[str]]


def module_name(path: str) -> str:
    """Return the dotted name of a source file: minglm/model/moe.py is minglm.model.moe."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted name, line, at top level) of every import statement, those inside functions included.

    An import under `if TYPE_CHECKING:` never runs, so it is not at top level either.
    """
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, FUNCTIONS | ast.Lambda)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) not in inside


# Circles


def module_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return {module: the modules of the package that it imports}, from the text of its files."""
    modules = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        me = module_name(path)
        graph[me] = set()
        for name, _, _ in imports(parse(text)):
            # `from minglm.data import packing` names a module, `from minglm.data.packing import fill` a name in one.
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != me:
                graph[me].add(target)
    return graph


def folder_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return {folder: the folders it imports} of the package; a loose module counts as a folder."""
    graph: dict[str, set[str]] = {}
    for me, targets in module_graph(sources).items():
        if me in ("minglm", "minglm.__main__"):  # the door, which leads everywhere
            continue
        folder = me.split(".")[1]
        others = {target.split(".")[1] for target in targets if target != "minglm"}
        graph.setdefault(folder, set()).update(others - {folder})
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph, its first name again at the end; an empty list where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def without_the_door(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Drop `minglm` itself, which shows names of the floors above to visitors, and every arrow to it."""
    return {me: targets - {"minglm"} for me, targets in graph.items() if me != "minglm"}


@functools.cache
def folders_of_the_package():
    """Return the graph of the package's folders."""
    return folder_graph(SOURCES)


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count."""
    assert not circle(without_the_door(module_graph(SOURCES)))


def test_no_folders_import_each_other_in_a_circle():
    """The floors of the house are what the imports make them; all that is asked is that there are floors."""
    assert not circle(folders_of_the_package())


@pytest.mark.parametrize(("importer", "imported"), NEVER)
def test_folders_that_stay_apart(importer, imported):
    """These pairs would close a circle later, or tie a component to one of its users."""
    assert imported not in folders_of_the_package()[importer]


def test_a_circle_is_found():
    """The broken twin: two modules that import each other, one of them inside a function."""
    twin = {
        "minglm/a/x.py": "from minglm.b.y import f\n",
        "minglm/b/y.py": "def f():\n    from minglm.a import x\n    return x\n",
    }
    assert circle(module_graph(twin)) and circle(folder_graph(twin))


# Rules of one file


def undeclared_imports(path: str, text: str) -> list[str]:
    """Return packages outside the dependencies that are imported as soon as the module is."""
    allowed = DEPENDENCIES | set(sys.stdlib_module_names)
    if path.startswith("minglm/testing/"):
        allowed |= {"hypothesis", "pytest"}
    kernel = Path(path).name.startswith(("triton_", "gluon_"))
    if path.startswith("minglm/kernels/") and kernel:  # imported when a tensor asks for that form
        allowed |= {"triton"}
    return [
        f"{path}:{line}: {name} is not a dependency; import it where it is used"
        for name, line, top in imports(parse(text))
        if top and name.split(".")[0] not in allowed
    ]


def axis_letters() -> set[str]:
    """Return the letters of the legend in minglm's docstring: one capital, two spaces, what it counts."""
    legend = ast.get_docstring(parse(SOURCES["minglm/__init__.py"])) or ""
    return set(re.findall(r"\b([A-Z])  (?=\w)", legend))


def unknown_axes(path: str, text: str) -> list[str]:
    """Return names that end in capitals outside the legend; a 1 means an axis of length one."""
    offences = set()
    attribute = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}
    for node in ast.walk(parse(text)):
        name = getattr(node, attribute.get(type(node), ""), "")
        ending = re.fullmatch(r"_*[a-z]\w*_([A-Z][A-Z0-9]{0,5})", name)
        if ending and not set(ending[1]) <= axis_letters() | {"1"}:
            offences.add(f"{path}:{node.lineno}: {name} has axes outside the legend")
    return sorted(offences)


def public_functions(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield (qualified name, function) of the public functions of a module and methods of its public classes."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                special = isinstance(method, FUNCTIONS) and method.name in ("__init__", "__call__")
                if isinstance(method, FUNCTIONS) and (special or not method.name.startswith("_")):
                    yield f"{node.name}.{method.name}", method


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether Triton compiles this function: its arguments have types of Triton's own, or none."""
    return any("jit" in ast.dump(decorator) for decorator in function.decorator_list)


def missing_types(path: str, text: str) -> list[str]:
    """Return public functions and methods with an argument or a result whose type is not given."""
    offences = []
    for name, function in public_functions(parse(text)):
        if is_kernel(function):
            continue
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        bare = [
            argument.arg
            for argument in arguments
            if argument is not None and argument.annotation is None
        ]
        bare = [argument for argument in bare if argument not in ("self", "cls", "ctx")]
        if function.returns is None and function.name != "__init__":
            bare.append("its result")
        if bare:
            offences.append(f"{path}:{function.lineno}: {name} has no type for {', '.join(bare)}")
    return offences


def missing_docstrings(path: str, text: str) -> list[str]:
    """Return modules, public classes and public functions that do not say what they are."""
    tree = parse(text)
    offences = [] if ast.get_docstring(tree) else [f"{path}:1: the module has no docstring"]
    for node in tree.body:
        if not isinstance(node, FUNCTIONS | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            offences.append(f"{path}:{node.lineno}: {node.name} has no docstring")
        # A method that fills in one of a base class is described there.
        methods = node.body if isinstance(node, ast.ClassDef) and not node.bases else []
        for method in methods:
            if not isinstance(method, FUNCTIONS) or method.name.startswith("_"):
                continue
            assert method.end_lineno is not None
            if method.end_lineno - method.lineno > 10 and not ast.get_docstring(method):
                offences.append(
                    f"{path}:{method.lineno}: {node.name}.{method.name} is longer than ten lines and has no docstring"
                )
    return offences


# First words of a docstring that describe a result or a state instead of saying what the function does.
NOT_A_VERB = (
    *(
        "The",
        "A",
        "An",
        "One",
        "What",
        "Whether",
        "How",
        "So",
        "Of",
        "For",
        "From",
        "As",
        "At",
        "In",
    ),
    *(
        "Where",
        "Which",
        "Those",
        "These",
        "This",
        "That",
        "All",
        "Every",
        "Each",
        "Some",
        "Any",
        "Its",
    ),
)


def docstrings_without_a_verb(path: str, text: str) -> list[str]:
    """Return docstrings of public functions that begin with an article or a question word (PEP 257: the imperative).

    A property is read like an attribute, so a noun phrase is right there.
    """
    offences = []
    for name, function in public_functions(parse(text)):
        docstring = ast.get_docstring(function)
        is_property = any(
            "property" in ast.dump(decorator) for decorator in function.decorator_list
        )
        if docstring and not is_property and docstring.split()[0].rstrip(",.:") in NOT_A_VERB:
            offences.append(f"{path}:{function.lineno}: {name}: {docstring.splitlines()[0][:60]}")
    return offences


def runs_text(path: str, text: str) -> list[str]:
    """Return calls of eval and exec, which would run what a model or a file says."""
    return [
        f"{path}:{node.lineno}: {node.func.id}() runs text as code"
        for node in ast.walk(parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec")
    ]


def text_without_encoding(path: str, text: str) -> list[str]:
    """Text files that are read or written in the encoding of the machine's locale, which differs between machines."""
    offences = []
    for node in ast.walk(parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        is_text = isinstance(called, ast.Attribute) and called.attr in ("read_text", "write_text")
        if isinstance(called, ast.Name) and called.id == "open":
            modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
            is_text = not any("b" in str(getattr(mode, "value", "")) for mode in modes)
        if is_text and not any(word.arg == "encoding" for word in node.keywords):
            offences.append(f"{path}:{node.lineno}: {ast.unparse(node)} names no encoding")
    return offences


def leftovers(path: str, text: str) -> list[str]:
    """Return unfinished work, packed lines that are defended from the formatter, and paths of one machine."""
    words = (
        "TODO",
        "FIXME",
        "NotImplementedError",
        "fmt: skip",
        "/work/",
        "/tmp/env",
        "shared/DESIGN",
    )
    return [
        f"{path}:{number}: contains {word!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in words
        if word in line
    ]


# rule: (a file name, a sample that breaks it)
RULES: dict[Rule, tuple[str, str]] = {
    undeclared_imports: (
        "minglm/kernels/x.py",
        "try:\n    import triton\nexcept ImportError:\n    triton = None\n",
    ),
    unknown_axes: ("minglm/model/moe.py", "def f(scores_TZ):\n    return scores_TZ\n"),
    missing_types: ("minglm/model/moe.py", "def f(x: int, y) -> int:\n    return x + y\n"),
    missing_docstrings: ("minglm/model/moe.py", '"""A module."""\n\ndef f():\n    return 1\n'),
    docstrings_without_a_verb: ("minglm/model/moe.py", 'def f():\n    """The number one."""\n'),
    text_without_encoding: ("minglm/data/x.py", "def f(path):\n    return path.read_text()\n"),
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
    """A rule that nothing can break would prove nothing."""
    assert rule(*RULES[rule])


def test_what_the_rules_allow():
    """An optional package inside a function, Triton in a kernel's file, a legend's letters, a property's noun phrase."""
    lazy = "def f():\n    import triton\n    return triton\n"
    assert not undeclared_imports("minglm/kernels/x.py", lazy)
    typing_only = "if TYPE_CHECKING:\n    from starlette.types import Send\n"
    assert not undeclared_imports("minglm/x.py", typing_only)
    assert not undeclared_imports("minglm/kernels/norm/triton_kernel.py", "import triton\n")
    assert not unknown_axes(
        "minglm/model/moe.py", "scores_TE = weight_1V + self.last_id + MASK_Z\n"
    )
    assert not text_without_encoding("minglm/data/x.py", 'open(path, "rb").read()\n')
    assert not missing_types("minglm/kernels/x.py", "@triton.jit\ndef f(x):\n    return x\n")
    noun = 'class C:\n    @property\n    def f(self):\n        """The number one."""\n'
    assert not docstrings_without_a_verb("minglm/model/moe.py", noun)


def test_legend_has_the_letters_of_the_design():
    """The legend can be read, and has at least width, tokens and experts."""
    assert {"B", "S", "T", "D", "N", "M", "A", "V", "E", "K", "F"} <= axis_letters()


# Callers


def names_read(text: str) -> set[str]:
    """Return every name that a file reads: variables, attributes, imported names."""
    names = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name.rpartition(".")[2])
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200
        ):
            # A dispatch table names its functions in strings, "minglm.kernels.norm.eager:norm".
            names.update(re.findall(r":(\w+)$", node.value))
    return names


def without_a_caller(sources: dict[str, str]) -> set[str]:
    """Return "module.name" of public functions and classes that no run, verb or server reaches.

    A name counts as reached when any module but `minglm.testing` reads it, its own module included.
    """
    readers = {
        path: text
        for path, text in sources.items()
        if path.startswith("configs/") or not path.startswith("minglm/testing/")
    }
    read = {path: names_read(text) for path, text in readers.items()}
    unused = set()
    for path, text in sources.items():
        if not path.startswith("minglm/") or path.startswith(EQUIPMENT):
            continue
        for node in parse(text).body:
            if isinstance(node, FUNCTIONS | ast.ClassDef) and not node.name.startswith("_"):
                if is_registered(node) or any(node.name in names for names in read.values()):
                    continue
                unused.add(f"{module_name(path)}.{node.name}")
    return unused


def is_registered(node: ast.AST) -> bool:
    """Tell whether a decorator hands the function to somebody who calls it."""
    return bool(getattr(node, "decorator_list", [])) and isinstance(node, FUNCTIONS)


def test_every_public_name_has_a_caller():
    """What is advertised is used by a run, a verb or the server. The list of exceptions may only get shorter."""
    configs = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "configs").glob("*.py")
    }
    unused = without_a_caller(SOURCES | configs)
    assert not sorted(unused - WITHOUT_A_CALLER), "new public names without a caller"
    assert not sorted(WITHOUT_A_CALLER - unused), (
        "these have a caller now, or are gone: shorten the list"
    )


def test_a_name_without_a_caller_is_found():
    """The broken twin: a public function that only a contract calls."""
    twin = {
        "minglm/a.py": "def used(): pass\n\ndef unused(): pass\n\nused()\n",
        "minglm/testing/a.py": "from minglm.a import unused\nunused()\n",
    }
    assert without_a_caller(twin) == {"minglm.a.unused"}


# The project as a whole


def tracked() -> list[str]:
    """Return the files under version control; outside a checkout there are none to look at."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


def test_every_text_file_is_finished_and_portable():
    """No file of the project names a path of one machine, or says that something is still to be done."""
    suffixes = {".py", ".md", ".toml", ".json", ".jsonl", ".yaml", ".html", ".sh", ""}
    files = [ROOT / name for name in tracked() if Path(name).suffix in suffixes]
    # This one names the words.
    files = [file for file in files if file.exists() and file != Path(__file__)]
    offences = [
        offence
        for file in files
        for offence in leftovers(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"))
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


def test_the_package_has_rooms():
    """At most three modules stand loose at the top of the package; all others are in the folder of their subject."""
    loose = {path.name for path in (ROOT / "minglm").glob("*.py")}
    assert loose <= {"__init__.py", "__main__.py", "lesson.py"}


def test_the_tests_mirror_the_package():
    """A folder of tests has the name of the folder it tests; `helpers` is shared, `mutations` holds mutate.py's records."""
    folders = {
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and path.name[0] not in "._"
    }
    rooms = {path.name for path in (ROOT / "minglm").iterdir() if path.is_dir()}
    assert folders <= rooms | {"helpers", "mutations"}
    loose = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert loose <= {
        "conftest.py",
        "mutate.py",
        "stress_server.py",
        "test_house.py",
        "test_readme.py",
        "test_lessons.py",
    }


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
