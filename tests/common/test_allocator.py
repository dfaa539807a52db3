"""Freed memory stays in the process, in one of its own: the allocator's settings last as long as it does."""

import subprocess
import sys

from minglm.common import allocator

PROGRAM = """
import resource
import torch
from minglm.common.allocator import keep_freed_memory

asked = keep_freed_memory()

def step():
    # As many blocks at once as activations of a pass, all of which the backward pass frees.
    return sum(len(block) for block in [torch.ones(5 * 2**20) for _ in range(6)])

for _ in range(8):  # until the holes of the first steps are filled
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before if asked else 0)
"""


def test_freed_blocks_are_used_again():
    """A step takes no new pages where the library is glibc, which by default takes 30,000 of them in most processes."""
    words = [sys.executable, "-c", PROGRAM]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert int(printed) < 100


def test_other_libraries_are_left_alone(monkeypatch):
    """A C library without the function is not asked."""
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
