"""Hold a real git repository in a temporary folder, with the tools by which a model reads and edits it (paper 3.3).

    list_files()   view(path, first)   search(text)   edit(path, old, new)   diff()

All text that a model wrote is data here: it is searched for and written to files, never run. What it changed
is read off as a diff, and only a diff leaves the folder: the grader applies it to another, fresh repository.

Choices: an edit replaces one piece of text that must occur exactly once, so that nothing is changed by
accident. Paths lead to files of the repository and nowhere else, through no link. Files that decide what a
test means (the tests, `conftest.py`, settings of the test runner) are protected: an edit of them is refused,
and the diff leaves them out, so that even a way around the refusal earns nothing.

Git runs with the user's and the machine's configuration shut out and no hooks, so a repository is the same
everywhere. A repository that several episodes begin with is made once and copied.
"""

import fnmatch
import functools
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Self

from minglm.common.files import own_prefix
from minglm.envs.base import Misconfigured

PROTECTED = (
    *("test*.py", "*_test.py", "*_tests.py", "tests/*", "*/tests/*", "test/*", "*/test/*"),
    *("conftest.py", "*/conftest.py", "*pytest.ini", "*pytest.toml", "tox.ini", "setup.cfg"),
    *("pyproject.toml", "noxfile.py"),
    *("sitecustomize.py", "usercustomize.py", "*.pth", ".git*", "Makefile"),
)
"""Patterns of paths that nobody may edit; `test*.py` is where unittest looks for tests."""
VIEW_LINES = 60
"""Lines that one view shows."""
MOST_HITS = 20
"""Lines that one search shows."""
GIT_SECONDS = 60.0
"""After so long a git command counts as a failure of the machine."""
PLAIN_GIT = {
    **{"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"},
    **{"GIT_AUTHOR_NAME": "minglm", "GIT_AUTHOR_EMAIL": "minglm@localhost"},
    **{"GIT_COMMITTER_NAME": "minglm", "GIT_COMMITTER_EMAIL": "minglm@localhost"},
    **{"GIT_AUTHOR_DATE": "2025-07-28T00:00:00Z", "GIT_COMMITTER_DATE": "2025-07-28T00:00:00Z"},
    **{"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
}
"""The whole environment of git."""


def git(folder: Path, *words: str, text: str | None = None) -> str:
    """Run git in a folder and return what it prints.

    text: its standard input. Raises Misconfigured without git, RuntimeError when it fails or hangs.
    """
    plain = (f"core.hooksPath={os.devnull}", "core.autocrlf=false", "core.fsmonitor=false")
    command = ["git", *(word for setting in plain for word in ("-c", setting)), *words]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=PLAIN_GIT | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
            input=None if text is None else text.encode("utf-8", "surrogateescape"),
            capture_output=True,
            timeout=GIT_SECONDS,
        )
    except FileNotFoundError:
        raise Misconfigured("repositories need the program git, which is not installed") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"git {words[0]} took more than {GIT_SECONDS:g} seconds") from None
    if done.returncode:
        complaint = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(f"git {words[0]}: {complaint[0] if complaint else done.returncode}")
    return done.stdout.decode("utf-8", "surrogateescape")


class Refused(Exception):
    """A tool was asked for something that it does not do; the message is what the model reads."""


class Folder:
    """A temporary folder that disappears with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=own_prefix("repository")))
        self.remove: Callable[[], object] = weakref.finalize(
            self, shutil.rmtree, self.path, ignore_errors=True
        )


class Repository:
    """A working copy with one commit, the state before the first edit."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.edited = False
        """Whether any edit was made."""

    @classmethod
    def create(cls, files: Mapping[str, str]) -> Self:
        """Return a new repository whose first commit has these files, {path: text}."""
        master = _master(tuple(sorted(files.items())))
        folder = Folder()
        shutil.copytree(master.path, folder.path, symlinks=True, dirs_exist_ok=True)
        return cls(folder)

    @classmethod
    def clone(cls, source: Path) -> Self:
        """Return a copy of the last commit of a user's repository; the original is only read."""
        folder = Folder()
        git(folder.path, "clone", "--quiet", "--no-hardlinks", "--depth=1", source.as_uri(), ".")
        return cls(folder)

    def close(self) -> None:
        """Remove the folder."""
        self.folder.remove()

    def list_files(self) -> str:
        """Return the paths of all files that git knows, one a line."""
        return "\n".join(self.paths())

    def paths(self) -> list[str]:
        """Return the paths of all files, those that were added included."""
        listed = git(
            self.folder.path, "ls-files", "-z", "--cached", "--others", "--exclude-standard"
        )
        return sorted(path for path in listed.split("\0") if path)

    def view(self, path: str, first: int = 1) -> str:
        """Return VIEW_LINES lines of a file, from line number `first`; it says how many follow."""
        lines = lines_of(self.read(path))
        start = max(0, first - 1)
        shown = lines[start : start + VIEW_LINES]
        more = len(lines) - start - len(shown)
        return "\n".join([*shown, f"({more} more lines)"] if more > 0 else shown)

    def search(self, text: str) -> str:
        """Return the lines that contain a text, as `path:line: text`, at most MOST_HITS."""
        if not text:
            raise Refused("search for what?")
        hits = []
        for path in self.paths():
            try:
                lines = lines_of(self.read(path))
            except Refused:
                continue  # not text
            for number, line in enumerate(lines, 1):
                if text in line:
                    hits.append(f"{path}:{number}: {line.strip()}")
        more = len(hits) - MOST_HITS
        return (
            "\n".join([*hits[:MOST_HITS], *([f"({more} more)"] if more > 0 else [])]) or "nothing"
        )

    def edit(self, path: str, old: str, new: str) -> str:
        """Replace one piece of text of a file; an empty `old` makes a new file. Raises Refused."""
        if is_protected(path):
            raise Refused("tests and their settings cannot be edited")
        if not old:
            self._add(path, new)
            return "ok"
        text = self.read(path)
        count = text.count(old)
        if count != 1:
            raise Refused(f"the old text occurs {count} times in {path}, not once")
        self._write(self._file(path), text.replace(old, new))
        return "ok"

    def diff(self) -> str:
        """Return all changes since the first commit as a patch, without those of protected files."""
        if not self.edited:
            return ""
        git(self.folder.path, "add", "--all", "--intent-to-add")
        excluded = [f":(exclude,glob,icase){_anywhere(pattern)}" for pattern in PROTECTED]
        return git(
            self.folder.path,
            *("diff", "--binary", "--no-ext-diff", "--no-renames", "HEAD", "--", ".", *excluded),
        )

    def apply(self, patch: str) -> None:
        """Apply what `diff` of another copy returned. Raises RuntimeError if it does not fit."""
        git(self.folder.path, "apply", "--whitespace=nowarn", "-", text=patch)

    def read(self, path: str) -> str:
        """Return the text of a file. Raises Refused if there is none, or it is not text."""
        try:
            return self._file(path).read_bytes().decode()
        except (OSError, ValueError):
            raise Refused(f"no such text file: {path}") from None

    def _file(self, path: str) -> Path:
        """Return the place of a file of the repository. Raises Refused for any other path."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or ".git" in parts or "\0" in path:
            raise Refused(f"not a path of the repository: {path}")
        place = self.folder.path.joinpath(*parts)
        try:
            found = place.resolve()
        except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
            found = None
        if found != self.folder.path.resolve().joinpath(*parts):
            raise Refused(f"not a path of the repository: {path}")  # through a link
        return place

    def _add(self, path: str, text: str) -> None:
        """Make a new file."""
        place = self._file(path)
        if os.path.lexists(place):
            raise Refused(f"{path} exists; say what to replace")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise Refused(f"no file can be made at {path}") from None
        self._write(place, text)

    def _write(self, place: Path, text: str) -> None:
        try:
            place.write_bytes(text.encode())
            self.edited = True
        except (OSError, ValueError):
            raise Refused("this text cannot be written") from None


def lines_of(text: str) -> list[str]:
    """Return the lines of a text as compilers and editors count them: `splitlines` would also end one at a form feed."""
    lines = re.split(r"\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def is_protected(path: str) -> bool:
    """Return whether a path belongs to the tests or to what decides how they run."""
    clean = "/".join(PurePosixPath(path).parts)
    name = clean.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(clean.lower(), pattern.lower())
        or fnmatch.fnmatchcase(name.lower(), pattern.lower())
        for pattern in PROTECTED
    )


def _anywhere(pattern: str) -> str:
    """Return the pattern of git for a pattern of PROTECTED: files of that name in any folder, folders with all in them."""
    pattern = pattern.removeprefix("*/")
    return f"**/{pattern}*" if pattern.endswith("/*") else f"**/{pattern}"


@functools.lru_cache(maxsize=64)
def _master(files: tuple[tuple[str, str], ...]) -> Folder:
    """Return a repository with one commit of these files, to be copied."""
    folder = Folder()
    for path, text in files:
        place = folder.path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8", newline="")
    git(folder.path, "init", "--quiet", "--template=", "--initial-branch=main")
    git(folder.path, "add", "--all")
    git(folder.path, "commit", "--quiet", "--message=The state before the repair")
    return folder
