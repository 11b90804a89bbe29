"""Memory, told how a server lives: a large load once, then pictures that come and go."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""
COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1 and later."""
MAPS = Path("/proc/self/smaps")
_HUGE = 2 << 20
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 +(?:\[heap\])?\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB$", re.M
)


def before_load() -> None:
    """Have what a model's file is read and parsed in go back to the system.

    Left alone, glibc takes the largest block that was ever freed, a whole model, for its measure of what to keep.
    """
    _set(_MMAP_THRESHOLD, 128 << 10)


def after_load() -> None:
    """Give back what loading left, and keep the memory of pictures from one to the next."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
    _set(_MMAP_THRESHOLD, 1 << 20)
    _set(_TRIM_THRESHOLD, 4 << 20)


def use_huge_pages() -> None:
    """Have what is loaded now lie in pages of 2 MB, where the kernel knows how.

    An engine goes through all of a model's weights for each picture, and looks up the address of every page: with 4 KB
    ones that is a thirtieth of EfficientNet-Lite0's time.
    """
    try:
        mappings = _MAPPING.findall(MAPS.read_text())
    except OSError:
        return
    libc = ctypes.CDLL(None)
    for first, last, size, resident in mappings:
        # a huge page is there as a whole: what is mostly empty would be filled up
        if 2 * int(resident) >= int(size):
            begin = -(-int(first, 16) // _HUGE) * _HUGE
            # one by one, for the kernel stops at the first that it cannot make
            for start in range(begin, int(last, 16) - _HUGE + 1, _HUGE):
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(_HUGE), COLLAPSE)


def _set(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    # other C libraries have no such thing
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
