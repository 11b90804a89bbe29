"""The C library's allocator, told how a server lives: a large load once, then pictures that come and go."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""


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


def _set(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    # other C libraries have no such thing
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
