"""Keep Python's standard library in memory, because a jailed program cannot open the files of the modules it imports.

A `Library` reads the compiled modules when a sandbox worker starts. A program that imports one runs its code
then, so what nobody imports costs nothing. Modules in C are imported at once: they come from shared
libraries, which the jail closes too.

Left out is what needs a terminal, a window, a database or a network library, and Python's own tests. What
remains can be imported, not more: `socket` and `subprocess` are there, and every call of theirs to the system
fails.
"""

import contextlib
import importlib.machinery
import importlib.util
import marshal
import mmap
import struct
import sys
import sysconfig
import tempfile
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    *("antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter"),
    *("turtle", "turtledemo", "venv"),
}
"""Modules in Python that no function needs."""
SKIPPED_IN_C = {
    *("_asyncio", "_crypt", "_curses", "_curses_panel", "_dbm", "_gdbm", "_posixshmem", "_sqlite3"),
    *("_ssl", "_tkinter", "audioop", "nis", "ossaudiodev", "readline", "spwd", "syslog", "termios"),
}
"""Modules in C that need more than memory, or import half of the library; asyncio has the same in Python."""
TESTS_IN_C = ("_test", "_ctypes_test", "_xx", "xx")
"""How the names of Python's own tests begin."""


class Entry(typing.NamedTuple):
    """One module of the library."""

    path: Path
    """Its source file."""
    compiled: bool
    """Whether its bytes are code as `marshal` writes it; else they are the source."""
    start: int
    end: int
    """Its bytes are those from `start` to `end`."""


class Library:
    """Finder and loader of modules that are held in memory.

    The bytes are a private mapping of a file without a name, which costs a fork nothing.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        with tempfile.TemporaryFile() as file:
            root = Path(sysconfig.get_path("stdlib"))
            for path in source_files(root):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                code = read_compiled(path)
                start = file.tell()
                file.write(path.read_bytes() if code is None else code)
                self.entries[name] = Entry(path, code is not None, start, file.tell())
            file.flush()
            # Private: what a program writes into its copy reaches no other program.
            self.bytes = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module of the library, None for any other."""
        if name not in self.entries:
            return None
        source = self.entries[name].path
        spec = importlib.machinery.ModuleSpec(
            name,
            typing.cast(typing.Any, self),
            origin=str(source),
            is_package=source.name == "__init__.py",
        )
        spec.has_location = True  # so that the module has a __file__
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of a module to Python."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the code of a module."""
        entry = self.entries[module.__name__]
        data = self.bytes[entry.start : entry.end]
        if entry.compiled:
            code = marshal.loads(data)
        else:
            code = compile(data, str(entry.path), "exec", dont_inherit=True)
        types.FunctionType(code, module.__dict__)()


def source_files(root: Path) -> Iterator[Path]:
    """Yield the source files of the library below `root`."""
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if (root / f"{name}.py").is_file():
            yield root / f"{name}.py"
        for path in sorted((root / name).rglob("*.py")):
            if not SKIPPED & {"tests", *path.relative_to(root).parts}:
                yield path


def read_compiled(path: Path) -> bytes | None:
    """Return the marshalled code of a source file from Python's cache, None if it is absent or of another source."""
    try:
        data = Path(importlib.util.cache_from_source(str(path))).read_bytes()
    except OSError:
        return None
    source = path.stat()
    flags, modified, size = 0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF
    header = importlib.util.MAGIC_NUMBER + struct.pack("<LLL", flags, modified, size)
    return data[16:] if data[:16] == header else None


def import_modules_in_c() -> None:
    """Import the modules of the standard library that are shared libraries, as far as they work on this machine."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in sorted(sys.stdlib_module_names - SKIPPED_IN_C):
        if name in sys.modules or name.startswith(TESTS_IN_C):
            continue
        with contextlib.suppress(ImportError):
            spec = importlib.util.find_spec(name)
            if spec and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
                importlib.import_module(name)
