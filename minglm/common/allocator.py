"""Let the C library keep the memory that PyTorch frees, for the next step to use (no section in the paper).

By default glibc returns large blocks to the kernel as soon as they are free, and asks for them again a moment
later. The kernel then has to clear every page: a step of the toy had 50,000 page faults, which took a tenth
of its time.
"""

import ctypes

M_TRIM_THRESHOLD = -1  # of mallopt: from how many free bytes at its end on the heap is made smaller
M_MMAP_THRESHOLD = -3  # of mallopt: from how many bytes on a block is not part of the heap
NEVER = 2**31 - 1
LARGEST_IN_HEAP = 2**25  # the most that glibc takes


def keep_freed_memory() -> bool:
    """Keep blocks of up to 32 MiB in this process; the memory at its peak stays the same.

    Return whether glibc does.

    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trims_less = mallopt(M_TRIM_THRESHOLD, NEVER)
    keeps_blocks = mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
    return bool(trims_less and keeps_blocks)
