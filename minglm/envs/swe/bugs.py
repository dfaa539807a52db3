"""Put one small bug into a Python function, and measure what the function does on given inputs (paper 3.3).

    return a + b          ->   return a - b            one token of the body is replaced
    while i < n:          ->   while i <= n:

The paper collects pull requests and issues from GitHub. Here a bug is a mutation of code that was right, so
its repair is known and its effect can be measured: a mutation counts as a bug if the function returns
something else, or raises, on some inputs and not on all.

Choices: tokens are replaced, not syntax trees, so every other letter of the file stays as its authors wrote
it. A function runs in this process, for at most STEPS lines; this is code of the Python installation, with
one token changed, never text of a model.
"""

import ast
import contextlib
import io
import sys
import tokenize
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

SWAPS: dict[str, tuple[str, ...]] = {
    **{
        "+": ("-",),
        "-": ("+",),
        "*": ("+",),
        "//": ("*",),
        "%": ("//",),
        "+=": ("-=",),
        "-=": ("+=",),
    },
    **{
        "<": ("<=", ">"),
        "<=": ("<",),
        ">": (">=", "<"),
        ">=": (">",),
        "==": ("!=",),
        "!=": ("==",),
    },
    **{"and": ("or",), "or": ("and",), "True": ("False",), "False": ("True",)},
    **{
        "break": ("continue",),
        "continue": ("break",),
        "min": ("max",),
        "max": ("min",),
        "0": ("1",),
        "1": ("0", "2"),
        "2": ("1", "3"),
    },
}
"""Token -> what may stand in its place."""
STEPS = 20_000
"""Lines that one call may execute before it counts as endless."""


class Bug(NamedTuple):
    """One line of a source file, as it was and with the bug."""

    line: int
    """Number of the line in the file, from 0."""
    right: str
    wrong: str


class Raised(NamedTuple):
    """What a call gave that did not return: the name of the exception, or "endless"."""

    name: str


class Endless(BaseException):
    """A call ran for more than STEPS lines.

    Not an Exception, so that the code under test does not catch it.
    """


class Function(NamedTuple):
    """One top-level function of a source file."""

    name: str
    first: int
    """Its first line in the file, from 0."""
    lines: list[str]
    body: int
    """First line of its body, after signature and docstring, counted within the function; past the end if it has none."""

    def source(self, bug: "Bug | None" = None) -> str:
        """Return its text, with a bug in it if one is given."""
        lines = list(self.lines)
        if bug is not None:
            lines[bug.line - self.first] = bug.wrong
        return "\n".join(lines) + "\n"


def find_function(source: str, name: str) -> Function:
    """Return a top-level function of a source file. Raises ValueError if there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = node.lineno - 1
            documented = isinstance(node.body[0], ast.Expr)
            body = node.body[documented:]
            start = body[0].lineno - 1 - first if body else node.end_lineno or 0
            return Function(name, first, source.splitlines()[first : node.end_lineno], start)
    raise ValueError(f"there is no function {name}")


def mutations(function: Function) -> list[Bug]:
    """Return every mutation of one token in the body of a function that still compiles, in the order of the text."""
    found = []
    tokens = list(tokenize.generate_tokens(io.StringIO(function.source()).readline))
    for before, token, after in zip([tokens[0], *tokens], tokens, tokens[1:], strict=False):
        row, start = token.start
        if row - 1 < function.body:
            continue
        for other in replacements(before.string, token.string, after.string):
            right = function.lines[row - 1]
            wrong = right[:start] + other + right[token.end[1] :]
            bug = Bug(function.first + row - 1, right, wrong)
            if _compiles(function.source(bug)):
                found.append(bug)
    return found


def replacements(before: str, token: str, after: str) -> tuple[str, ...]:
    """Return what may stand in the place of a token between two others."""
    if token == "not":
        return () if after == "in" or before == "is" else ("",)
    if token == "in" and before == "not":
        return ()
    if token == "is":
        return () if after == "not" else ("is not",)
    if token.isdecimal() and token not in SWAPS:
        return (str(int(token) + 1),)
    return SWAPS.get(token, ())


def with_bug(source: str, bug: Bug) -> str:
    """Return the source of a file with the wrong line in place of the right one."""
    lines = source.splitlines()
    lines[bug.line] = bug.wrong
    return "\n".join(lines) + "\n"


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def behaviour(
    source: str, function: str, names: dict[str, Any], inputs: Sequence[Sequence[Any]]
) -> list[Any]:
    """Return what a function gives for each input: its value, or `Raised`.

    source: text that defines the function. names: what it may refer to, the globals of its module.
    """
    scope = dict(names)
    with warnings.catch_warnings(action="ignore"):  # a bug may pass what is deprecated
        types.FunctionType(compile(source, function, "exec", dont_inherit=True), scope)()
        return [call(scope[function], arguments) for arguments in inputs]


def module_behaviour(
    source: str, names: dict[str, Any], calls: Sequence[tuple[str, Sequence[Any]]]
) -> list[Any]:
    """Return what calls of a module's top-level functions give, its value or `Raised`, where they call one another.

    source: the whole file. names: what else they may refer to, the globals of the module as it is.
    """
    scope = dict(names)
    with warnings.catch_warnings(action="ignore"):
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                code = compile(ast.Module([node], []), node.name, "exec", dont_inherit=True)
                # a default value may need a name that the module deletes at its end
                with contextlib.suppress(NameError):
                    types.FunctionType(code, scope)()
        return [call(scope[name], arguments) for name, arguments in calls]


def call(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Return the value of a call, or `Raised`; an endless call is stopped after STEPS lines."""
    previous = sys.gettrace()
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > STEPS:
            raise Endless
        return count

    sys.settrace(count)
    try:
        return function(*arguments)
    except Endless:
        return Raised("endless")
    except Exception as error:
        return Raised(type(error).__name__)
    finally:
        sys.settrace(previous)


def excerpts(text: str, line: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) lines, from 0, of ever larger parts of a text around one line."""
    last = len(text.splitlines()) - 1
    for size in range(last + 1):
        yield max(0, line - size), min(last, line + size)


def edit_that_repairs(wrong_text: str, bug: Bug) -> tuple[str, str]:
    """Return (old, new) that turns the wrong text into the right one; `old` occurs in it exactly once.

    It is the wrong line without its indentation, or the smallest block around it that occurs once.
    """
    if wrong_text.count(bug.wrong.strip()) == 1:
        return bug.wrong.strip(), bug.right.strip()
    lines = wrong_text.splitlines()
    for first, last in excerpts(wrong_text, bug.line):
        old = "\n".join(lines[first : last + 1])
        if wrong_text.count(old) == 1:
            new = list(lines)
            new[bug.line] = bug.right
            return old, "\n".join(new[first : last + 1])
    raise ValueError("a text occurs once in itself")
