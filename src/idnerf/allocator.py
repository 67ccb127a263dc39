"""Keep freed memory in the process (Linux, glibc): large temporaries would otherwise be faulted in anew every time.

Rendering and training on the CPU make and drop buffers of tens of megabytes; returning each to the system costs more
than the arithmetic on it (benchmarks/NOTES.md).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell malloc to serve large blocks from its own heap and to keep it. Returns whether that was possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(name, value) for name, value in settings)
