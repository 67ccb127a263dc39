"""Keep freed memory in the process, in huge pages (Linux, glibc): both cost more than the arithmetic on it otherwise.

Rendering and training on the CPU make and drop buffers of tens of megabytes. Returned to the system, each would be
faulted in anew every time; in pages of 4 kB, a map of 20 MB is 5,000 addresses to translate, which in a virtual machine
is a walk through two tables each (benchmarks/NOTES.md).
"""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_MADV_HUGEPAGE = 14
HUGE_PAGE = 2 * 2**20
"""Bytes, on x86-64 and on ARM with pages of 4 kB."""
HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
HEAP_IN_HUGE_PAGES = 8 * 2**30
"""Address space of the heap that is asked to lie in huge pages, in bytes; no more than half of the machine's memory.
What is never used is never taken."""


def keep_freed_memory() -> bool:
    """Tell malloc to serve large blocks from its own heap, one for all threads, and to keep it.

    Returns whether malloc took that. It gives nothing back to the system until the process ends.

    Where the system lets processes ask for huge pages, which most distributions do, the heap asks for them. To be
    called before the first large tensor is made: what is there stays where it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 64 * 2**20))
    kept = all(mallopt(name, value) for name, value in settings)
    if kept and _may_reserve():
        _ask_for_huge_pages(libc, min(HEAP_IN_HUGE_PAGES, _memory() // 2))
    return kept


def _may_reserve() -> bool:
    """Whether there are huge pages of that size, and no limit counts what is reserved and not used."""
    import resource  # not on every system

    try:
        if int(HUGE_PAGE_SIZE.read_text()) != HUGE_PAGE:  # with pages of 64 kB it is 512 MB, too much to take at once
            return False
    except (OSError, ValueError):
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    try:
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        strict = False
    return not strict and all(limit == resource.RLIM_INFINITY for limit in limits)


def _memory() -> int:
    """Of the machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _ask_for_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """The heap grows by ``size``, says so, and has it all free again: later blocks come from there."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (block + size - first) // HUGE_PAGE * HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)
