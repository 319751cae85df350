"""Freed memory, kept by malloc for the next step, in pages of 2 MB.

A step on a CPU frees gigabytes of activations and allocates them again. By default glibc gives memory back to the
system whenever enough of it is free at once. Every page of it then causes a page fault in the next step: 13,000 for
`tiny` with 64 pairs, 3 % of the step's processor time. Memory in pages of 4 kB is also read and written more slowly:
its addresses do not fit into the processor's table of pages.

This changes the allocator of the whole process, so only commands that train call it, never `mvlm.pretrain` in Python.
"""

import contextlib
import ctypes

from mvlm.device import choose_device

# From glibc's malloc.h and Linux' mman.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_DEFAULT_TOP_PAD = 128 << 10
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_LARGEST_HEAP_BLOCK = 32 << 20  # glibc refuses more
_NEVER = (1 << 31) - 1
_RESERVED = 3 << 29  # more than _NEVER would be given back


def keep_freed_memory(device: str = "cpu") -> None:
    """Make glibc keep what this process frees, in blocks below 32 MB. Does nothing with another C library.

    The process then stays at its largest size, which every step reaches anyway. The next 1.5 GB of the heap get pages
    of 2 MB, if the system allows it; addresses that are never used take no memory.

    Args:
        device: where the process will compute: auto, cpu or cuda. Nothing is done for a GPU.
    """
    if choose_device(device).type != "cpu":
        return
    with contextlib.suppress(AttributeError):  # `mallopt` is glibc's
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        _use_huge_pages(libc)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserve addresses at the end of the heap, and ask the system for huge pages there."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    before = libc.sbrk(0)
    libc.mallopt(_M_TOP_PAD, _RESERVED)
    # A block that the free end of the heap cannot hold makes the heap grow, by the block and by the reserve.
    libc.free(libc.malloc(_LARGEST_HEAP_BLOCK // 2))
    libc.mallopt(_M_TOP_PAD, _DEFAULT_TOP_PAD)
    start, end = -(-before // _HUGE_PAGE) * _HUGE_PAGE, libc.sbrk(0)
    if end > start:  # else a limit of the process forbids so large a heap
        libc.madvise(start, end - start, _MADV_HUGEPAGE)
