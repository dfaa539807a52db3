"""C kernels for CPUs, compiled on first use and cached on disk (no section in the paper).

    cc -O3 -march=native -ffast-math *.c  ->  cache/minglm/cpu-<hash of sources, compiler, processor>.so  ->  ctypes

Compiling takes seconds, once for a machine, and without a compiler PyTorch is used. A cached library is loaded only if
it has the checksum it was compiled with; otherwise it is compiled again. Compiling is quick because the C code does not
include PyTorch's headers.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=gnu11", "-pthread")
GCC_FLAGS = ("--param=avoid-fma-max-bits=0",)
"""For some AMD processors GCC leaves products and sums apart in chains of fused multiply-adds, and which chain it sees
depends on the number of rows of a tile. An answer would then have other bits in another batch."""

SIGNATURES = {
    "decode": "p",
    "sample": "pppppqppp" + "ll",
    "log_probabilities": "ppppp" + "ll",
    "newton_schulz": "pppp" + "llll",
    "product": "pll" + "pll" + "pp" + "lll",
    "swiglu_forward": "ppp" + "l",
    "swiglu_backward": "ppppp" + "l",
    "sort_pairs": "ppp" + "ll",
    "experts_forward": "ppppppppp" + "llll",
    "experts_backward": "pppppppp" + "pppppp" + "llll",
    "norm_forward": "pppppp" + "ll" + "f",
    "norm_backward": "ppppppp" + "ll",
    "rotate_forward": "pppppp" + "lllll" + "f",
    "rotate_backward": "pppppp" + "pp" + "lllll",
    "attention_forward": "ppppppp" + "lllll",
    "attention_backward": "pppppp" + "pppp" + "lllll",
    "head_forward": "pppppp" + "lll" + "f",
    "head_backward": "pppp" + "ppp" + "lll" + "f",
    "head_loss": "pppp" + "ppp" + "lll",
    "choose": "ppp" + "lll",
}
"""Arguments of each function in order: p a pointer, l a long, q an int64, f a float."""


def cache_folder() -> Path:
    """Return where compiled libraries are kept: $XDG_CACHE_HOME/minglm, by default ~/.cache/minglm.

    Raises OSError for a user without a home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache) / "minglm"
    try:
        return Path.home() / ".cache" / "minglm"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _processor() -> str:
    """Return the properties of the processor that -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = (line for line in lines if line.startswith(("flags", "Features")))
        return platform.machine() + next(features, "")
    return platform.machine() + platform.processor()


def build(compiler: str, folder: Path) -> Path:
    """Compile the library into `folder`, if it is not there, and return its path.

    Raises OSError or CalledProcessError.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = sorted(FOLDER.glob("*.c"))
    headers = sorted(FOLDER.glob("*.h"))
    source_bytes = b"".join(file.read_bytes() for file in (*sources, *headers))
    flags = FLAGS if b"clang" in version else FLAGS + GCC_FLAGS
    settings = _processor().encode() + " ".join(flags).encode()
    digest = hashlib.sha256(source_bytes + version + settings).hexdigest()
    library = folder / f"cpu-{digest[:16]}.so"
    if is_whole(library):
        return library

    folder.mkdir(parents=True, exist_ok=True)
    # In two steps: a library linked with -ffast-math would change how the whole process treats tiny numbers.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compile_command = [compiler, *flags, "-c", *sources]
        subprocess.run(compile_command, capture_output=True, check=True, cwd=work)
        objects = Path(work).glob("*.o")
        linked = Path(work) / "cpu.so"
        link_command = [compiler, "-shared", "-pthread", *objects, "-o", linked, "-lm"]
        subprocess.run(link_command, capture_output=True, check=True)
        checksum = Path(work) / "checksum"
        checksum.write_text(checksum_of(linked), encoding="utf-8")
        os.replace(linked, library)
        os.replace(checksum, checksum_path(library))
    return library


def checksum_path(library: Path) -> Path:
    """Return the file beside a library that holds its checksum."""
    return library.with_suffix(".sha256")


def checksum_of(library: Path) -> str:
    """Return the SHA-256 of a library."""
    return hashlib.sha256(library.read_bytes()).hexdigest()


def is_whole(library: Path) -> bool:
    """Return whether a cached library is what was compiled. To load one that was cut short ends the process."""
    try:
        return checksum_of(library) == checksum_path(library).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def compiler() -> str | None:
    """Return $CC or the C compiler of this machine; None without one, and on Windows."""
    if sys.platform == "win32":
        return None
    return (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library. Without a compiler return None; so too, with one line on stderr, where it fails."""
    command = compiler()
    if command is None:
        return None
    try:
        try:
            path = build(command, cache_folder())
        except OSError:  # a home that cannot be written to
            path = build(command, Path(tempfile.mkdtemp(prefix="minglm-")))
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        print(
            f"minglm: PyTorch is used in place of C, because {command} failed: {error}",
            file=sys.stderr,
        )
        return None
    types = {"p": ctypes.c_void_p, "l": ctypes.c_long, "q": ctypes.c_int64, "f": ctypes.c_float}
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [types[letter] for letter in signature]
        function.restype = None
    return loaded


def loaded_library() -> ctypes.CDLL:
    """Return the library for a caller that was chosen because there is one."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the C kernels were called, but there is no C library on this machine")
    return loaded


@functools.cache
def lanes() -> int:
    """Return how many float32 numbers a vector of the library has."""
    return ctypes.c_long.in_dll(loaded_library(), "vector_lanes").value


def address(tensor: torch.Tensor | None, strided: bool = False) -> int | None:
    """Return where a tensor's numbers begin, None for None. C would misread another layout or dtype without a word.

    strided: the caller passes the strides too.
    """
    if tensor is None:
        return None
    # The result of a collective may still be on its way.
    wait = getattr(tensor, "trigger_wait", None)
    here: torch.Tensor = tensor if wait is None else wait()
    assert here.dtype in (torch.float32, torch.int64) and (strided or here.is_contiguous())
    assert here.data_ptr() or not here.numel(), "the numbers are not in this process"
    return here.data_ptr()
