"""What the C library does with memory that tensors have freed."""

import contextlib
import ctypes

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGEST_THRESHOLD_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor; with any other C library nothing changes.

    By default it gives blocks of some MB back to the system. On a CPU the page faults of getting them again take longer
    than the arithmetic of an activation or a sum, and as they come and go, so do timings.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD_BYTES)
