"""Repair modules of Python's standard library, the same task with real code (paper 3.3).

    user: textwrap.shorten('a b', 4) gives '[...]', not 'a b'. Repair it.

A task is a module as it lies in the Python installation of this machine, whole, with one token of one
function changed (`bugs.py`), beside a file of tests. The tests are calls with drawn arguments, and the values
that the untouched function
gives: some fail with the bug and some pass, and so do those of the module's other functions. Difficulty 1 has
modules of at most SMALL lines, 2 has longer ones.

Choices: the modules are pure functions of plain values that stand alone, so that a sandbox without files can
run them. A module belongs to one split: its other functions show what its right text looks like. Another
Python version has another text, so it has other tasks.

A model that was pre-trained on the standard library has read the right text, and may repair from memory; the
score does not tell that from understanding. What it does rule out is a repair that is remembered from this
environment's training.
"""

import functools
import importlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.envs.base import Task, assistant, user
from minglm.envs.sandbox.pool import check_cases
from minglm.envs.swe.bugs import (
    Bug,
    Raised,
    behaviour,
    edit_that_repairs,
    find_function,
    module_behaviour,
    mutations,
    with_bug,
)
from minglm.envs.swe.episode import (
    Assignment,
    Check,
    RepairEnvironment,
    report_line,
    sandbox_case,
    test_file,
)

SMALL = 400
"""Lines of the longest module of difficulty 1."""
TESTS = 12
"""Calls of each function."""
SHOWN_TESTS = 6
SALT = 1510
"""Decides, with a module's name, the split that it belongs to; chosen so that each split has both difficulties."""
MOST_BUGS = 12
"""Mutations of a function that are tried."""

Draw = Callable[[random.Random], tuple[Any, ...]]
"""Draws the arguments of one call."""
WORDS = ("a", "the", "cat", "sat", "quick", "brown", "longest", "A-1", "x_y", "it's", "Zoo")


def sentence(rng: random.Random, least: int = 1, most: int = 7) -> str:
    """Return a few random words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def odd(rng: random.Random) -> str:
    """Return a few random letters that often mean something to a parser."""
    return "".join(rng.choice("ab&<>\"'=?;# /%é+.~") for _ in range(rng.randint(0, 9)))


def indented(rng: random.Random) -> str:
    """Return lines with random indentation."""
    return "\n".join(
        " " * rng.choice((0, 2, 4)) + sentence(rng, 0, 3) for _ in range(rng.randint(1, 4))
    )


def path(rng: random.Random) -> str:
    """Return a random path."""
    start = rng.choice(("", "/", "//", "./", "C:/"))
    parts = [
        rng.choice(("a", "b.c", "..", ".", "d.tar.gz", ".e")) for _ in range(rng.randint(0, 4))
    ]
    return start + "/".join(parts) + rng.choice(("", "", "/"))


def numbers(rng: random.Random) -> list[int]:
    """Return a few random numbers."""
    return [rng.randint(0, 12) for _ in range(rng.randint(2, 8))]


def color(rng: random.Random) -> tuple[float, ...]:
    """Return three numbers from 0 to 1."""
    return tuple(rng.randint(0, 4) / 4 for _ in range(3))


def url(rng: random.Random) -> str:
    """Return a random address, absolute or relative."""
    start = rng.choice(("", "http://h", "http://u@h:80", "//k"))
    return start + path(rng) + rng.choice(("", "?q=1&r=a+b", "#f", ";p"))


def year(rng: random.Random) -> int:
    """Return a year, often one whose leap day is a question."""
    return rng.choice((1900, 2000, 2004, 2023, 2100, 1583, rng.randint(1600, 2400)))


def octets(rng: random.Random) -> bytes:
    """Return a few random bytes."""
    return bytes(rng.choice((0, 32, 61, 65, 97, 122, 200, 255)) for _ in range(rng.randint(0, 9)))


MODULES: dict[str, dict[str, Draw]] = {
    "base64": {
        "b32encode": lambda r: (octets(r),),
        "a85encode": lambda r: (octets(r),),
        "b85encode": lambda r: (octets(r),),
        "b16encode": lambda r: (octets(r),),
    },
    "calendar": {
        "isleap": lambda r: (year(r),),
        "leapdays": lambda r: (year(r), year(r)),
        "weekday": lambda r: (year(r), r.randint(1, 12), r.randint(1, 28)),
        "monthrange": lambda r: (year(r), r.randint(1, 12)),
    },
    "colorsys": dict.fromkeys(
        ("rgb_to_yiq", "yiq_to_rgb", "rgb_to_hls", "hls_to_rgb", "rgb_to_hsv", "hsv_to_rgb"), color
    ),
    "difflib": {
        "get_close_matches": lambda r: (r.choice(WORDS), list(WORDS), r.randint(1, 3), 0.25),
        "IS_CHARACTER_JUNK": lambda r: (r.choice(" \tab\n"),),
    },
    "email.base64mime": {
        "header_length": lambda r: (octets(r) * r.randint(1, 5),),
        "body_encode": lambda r: (octets(r) * r.randint(1, 20), r.choice((20, 76))),
        "header_encode": lambda r: (odd(r), "utf-8"),
    },
    "email.quoprimime": {
        "header_length": lambda r: (octets(r),),
        "body_length": lambda r: (octets(r),),
        "unquote": lambda r: (r.choice(("=41", "=e9", "=3D", "=20")),),
        "decode": lambda r: ("\n".join(r.choice(("a=", "=41b", "c =20", "")) for _ in range(4)),),
        "header_encode": lambda r: (octets(r),),
    },
    "email.utils": {
        "unquote": lambda r: (r.choice(('"a"', "<b>", "c", '"', '"a\\\\b"', "")),),
        "decode_rfc2231": lambda r: (r.choice(("us'en'a", "us'a", "a", "us'en'a'b")),),
    },
    "encodings.punycode": {
        "segregate": lambda r: (odd(r),),
        "punycode_encode": lambda r: (odd(r),),
        "adapt": lambda r: (r.randint(0, 900), r.random() < 0.5, r.randint(1, 9)),
        "selective_len": lambda r: (odd(r), r.randint(60, 240)),
        "T": lambda r: (r.randint(0, 3), r.randint(0, 80)),
    },
    "fnmatch": {
        "fnmatchcase": lambda r: (r.choice(WORDS), r.choice(("*", "c?t", "[a-q]*", "*t", "[!a]*"))),
        "filter": lambda r: (list(WORDS), r.choice(("*t", "?", "[!a-c]*", "*o*"))),
        "translate": lambda r: ("".join(r.choice("ab*?[]!-") for _ in range(r.randint(1, 6))),),
    },
    "genericpath": {
        "commonprefix": lambda r: ([path(r) for _ in range(r.randint(0, 3))],),
        "_splitext": lambda r: (path(r), "/", None, "."),
    },
    "heapq": {
        "nsmallest": lambda r: (r.randint(0, 4), numbers(r)),
        "nlargest": lambda r: (r.randint(0, 4), numbers(r)),
    },
    "html": {"escape": lambda r: (odd(r), r.random() < 0.5), "unescape": lambda r: (odd(r),)},
    "http.cookies": {"_quote": lambda r: (odd(r),), "_unquote": lambda r: (f'"{odd(r)}"',)},
    "locale": {
        "_strip_padding": lambda r: (" " * r.randint(0, 3) + "12" + " " * r.randint(0, 3), 2),
        "_append_modifier": lambda r: (
            r.choice(("ISO8859-1", "UTF-8", "x")),
            r.choice(("euro", "y")),
        ),
    },
    "mimetypes": {
        "guess_extension": lambda r: (r.choice(("text/plain", "image/png", "x/y", "a")),)
    },
    "ntpath": {
        "splitdrive": lambda r: (path(r).replace("/", r.choice("/\\")),),
        "split": lambda r: (path(r),),
        "join": lambda r: (path(r), path(r)),
        "basename": lambda r: (path(r),),
    },
    "nturl2path": {
        "url2pathname": lambda r: (r.choice(("///C|/a/b", "/a/b", "///D:/e", "//h/p", "a%20b")),),
        "pathname2url": lambda r: (r.choice(("C:\\a\\b", "\\\\h\\p", "a b", "D:", "\\x")),),
    },
    "posixpath": {
        "join": lambda r: (path(r), path(r), path(r)),
        "split": lambda r: (path(r),),
        "basename": lambda r: (path(r),),
        "dirname": lambda r: (path(r),),
        "commonpath": lambda r: (
            ["/a/b", "/a/c/../d", "/a/b/" + r.choice("xyz")][: r.randint(1, 3)],
        ),
        "normcase": lambda r: (path(r),),
    },
    "shlex": {
        "quote": lambda r: (r.choice((odd(r), r.choice(WORDS), "")),),
        "join": lambda r: ([odd(r) for _ in range(r.randint(1, 3))],),
        "split": lambda r: (sentence(r).replace("'", ""),),
    },
    "statistics": {
        "median": lambda r: (numbers(r),),
        "median_low": lambda r: (numbers(r),),
        "median_high": lambda r: (numbers(r),),
        "mode": lambda r: (numbers(r),),
        "multimode": lambda r: (numbers(r),),
        "quantiles": lambda r: (numbers(r),),
        "fmean": lambda r: (numbers(r),),
        "correlation": lambda r: ([1, 2, r.randint(3, 9)], [r.randint(0, 4), 2, 7]),
    },
    "string": {"capwords": lambda r: (sentence(r) + "  b", r.choice((None, " ", "t")))},
    "textwrap": {
        "dedent": lambda r: (indented(r),),
        "indent": lambda r: (indented(r), r.choice(("> ", "  "))),
        "shorten": lambda r: (sentence(r), r.randint(5, 30)),
        "wrap": lambda r: (sentence(r, 4, 12), r.randint(8, 30)),
        "fill": lambda r: (sentence(r, 4, 12), r.randint(8, 30)),
    },
    "urllib.parse": {
        "quote": lambda r: (odd(r),),
        "unquote": lambda r: (r.choice(("a%20b", "%41", "a%2", "%zz", "b+c", odd(r))),),
        "urljoin": lambda r: (url(r), url(r)),
        "parse_qsl": lambda r: (r.choice(("a=1&b=2", "a", "a=&b=c", odd(r))),),
        "unwrap": lambda r: (r.choice(("<URL:http://h>", "<a>", "b", " URL:c")),),
    },
    "wsgiref.headers": {
        "_formatparam": lambda r: ("p", r.choice((None, "", "a", 'b"c')), r.random() < 0.5)
    },
}
"""Module -> function -> how its arguments are drawn. A module or function that a Python version lacks is left out."""


class Module(NamedTuple):
    """A module of this Python installation."""

    name: str
    source: str
    checks: dict[str, list[Check]]
    """{function: its tests}."""

    @property
    def path(self) -> str:
        """Return its path in the repository."""
        return f"{self.name.replace('.', '/')}.py"

    @property
    def difficulty(self) -> int:
        """Return 1 for a short module, 2 for a long one."""
        return 1 if self.source.count("\n") <= SMALL else 2


class RepairLibrary(RepairEnvironment):
    """One wrong token in a module of the standard library; the difficulty is as in the module's header."""

    name = "swe:library"
    max_turns = 12
    difficulties = (1, 2)
    default_difficulties = difficulties
    seconds = 4.0

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return (messages, label); label: {"module", "function", "bug": [line, right, wrong]}."""
        while True:
            module = load(rng.choice(names_of(difficulty)))
            function = rng.choice(list(module.checks))
            bugs = bugs_of(module.name, function)
            if bugs:
                break
        bug, given = rng.choice(bugs)
        label = {"module": module.name, "function": function, "bug": list(bug)}
        pairs = list(zip(module.checks[function], given, strict=True))
        failing = [(check, value) for check, value in pairs if differs(value, check)]
        check, value = min(failing[: shown_of(failing)], key=lambda pair: len(str(pair)))
        says = f"raises {value.name}" if isinstance(value, Raised) else f"gives {value!r}"
        return [user(f"{module.name}.{report_line(check, says)}. Repair it.")], label

    def problem(self, messages: list[Message], label: dict[str, Any]) -> list[Any]:
        """Return the module: what it should say is shown in each of its tasks."""
        return [label["module"], SALT]

    def assignment(self, task: Task) -> Assignment:
        """Return the repository of a task."""
        return assign(json.dumps(task.label))

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Search for the function, view it, put the right token back, run the tests."""
        module = load(task.label["module"])
        bug = Bug(*task.label["bug"])
        calls = [call["name"] for message in conversation for call in message.get("tool_calls", ())]
        if not calls:
            where = f"def {task.label['function']}("
            return assistant("", "where is it?", [("search", {"text": where})])
        if "view" not in calls:
            lines = {"path": module.path, "line": max(1, bug.line - 20)}
            return assistant("", "read it", [("view", lines)])
        if "edit" not in calls:
            old, new = edit_that_repairs(with_bug(module.source, bug), bug)
            thought = f"not {bug.wrong.strip()} but {bug.right.strip()}"
            return assistant("", thought, [("edit", {"path": module.path, "old": old, "new": new})])
        if calls[-1] != "run_tests":
            return assistant("", "test it", [("run_tests", {})])
        return assistant("Repaired.", "all pass")


@functools.cache
def load(name: str) -> Module:
    """Return a module with the tests of its functions, without the functions that this Python lacks or has in C."""
    module = importlib.import_module(name)
    source = Path(inspect.getsourcefile(module) or "").read_text(encoding="utf-8")
    checks = {}
    for function, draw in MODULES[name].items():
        found = getattr(module, function, None)
        if not inspect.isfunction(found) or found.__module__ != name:
            continue
        made = draw_checks(source, function, vars(module), draw)
        if len({str(check.expected) for check in made}) > 1:
            checks[function] = made
    return Module(name, source, checks)


def draw_checks(source: str, function: str, names: dict[str, Any], draw: Draw) -> list[Check]:
    """Return tests of a function: different calls, and the values that it gives; without calls that raise."""
    rng = random.Random(f"tests/{function}")
    inputs = list(
        {repr(arguments): arguments for arguments in (draw(rng) for _ in range(40))}.values()
    )
    values = behaviour(find_function(source, function).source(), function, names, inputs)
    checks = []
    for arguments, value in zip(inputs, values, strict=True):
        check = Check(function, arguments, value)
        if not isinstance(value, Raised) and len(checks) < TESTS and can_be_sent(check):
            checks.append(check)
    return checks


def can_be_sent(check: Check) -> bool:
    """Return whether a test consists of plain values."""
    try:
        check_cases([sandbox_case(check)])
    except ValueError:
        return False
    return True


@functools.cache
def names_of(difficulty: int) -> list[str]:
    """Return the modules of a difficulty that this Python has."""
    found = []
    for name in MODULES:
        try:
            module = load(name)
        except (ImportError, OSError, TypeError):
            continue
        if module.checks and module.difficulty == difficulty:
            found.append(name)
    return found


@functools.cache
def bugs_of(name: str, function: str) -> list[tuple[Bug, list[Any]]]:
    """Return the bugs of a function that two of its tests notice, or more, and not all; each with what it then gives."""
    module = load(name)
    scope = vars(sys.modules[name])
    checks = module.checks[function]
    text = find_function(module.source, function)
    possible = mutations(text)
    random.Random(f"bugs/{name}/{function}").shuffle(possible)
    found = []
    for bug in possible[:MOST_BUGS]:
        inputs = [check.arguments for check in checks]
        given = behaviour(text.source(bug), function, scope, inputs)
        wrong = sum(map(differs, given, checks))
        if 1 < wrong < len(checks) and Raised("endless") not in given:
            found.append((bug, given))
    return found


def differs(given: Any, check: Check) -> bool:
    """Return whether a value is not the one that a test expects."""
    return isinstance(given, Raised) or given != check.expected


def shown_of(failing: Sequence[Any]) -> int:
    """Return how many of the tests that fail the model may read; the others are there for repairs that know only these."""
    return (len(failing) + 1) // 2


@functools.lru_cache(maxsize=64)
def assign(label_text: str) -> Assignment:
    """Return the repository of a label, given as JSON."""
    label = json.loads(label_text)
    module = load(label["module"])
    function = label["function"]
    bug = Bug(*label["bug"])
    source = with_bug(module.source, bug)
    own = module.checks[function]
    others = [c for name, checks in module.checks.items() if name != function for c in checks]
    calls = [(check.function, check.arguments) for check in (*own, *others)]
    given = module_behaviour(source, vars(sys.modules[module.name]), calls)
    pairs = list(zip((*own, *others), given, strict=True))
    failed = [check for check, value in pairs if differs(value, check)]
    passing = [check for check, value in pairs if not differs(value, check)]
    failing_here = [check for check in failed if check.function == function]
    shown = [*failing_here[: shown_of(failing_here)], *passing][:SHOWN_TESTS]
    last = module.name.rpartition(".")[2]
    files = {
        module.path: source,
        f"test_{last}.py": test_file(module.path, shown),
    }
    return Assignment(files, {module.path: shown}, {module.path: failed}, {module.path: passing})
