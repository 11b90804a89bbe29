"""Huge pages: memory that is in use lies in them afterwards, memory that is mostly empty stays as it was."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from trivium.runtime import memory

HUGE = 2 << 20
SIZE = 4 * HUGE


def mapping(advice: int = mmap.MADV_NORMAL) -> mmap.mmap:
    made = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # the kernel makes one of neighbours that are alike
    made.madvise(advice)
    return made


def address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def in_huge_pages(mapped: mmap.mmap) -> int:
    """Bytes."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if first <= address(mapped) < last:
            found = re.search(r"AnonHugePages: +(\d+) kB", block)
            return 1024 * int(found[1]) if found else 0
    raise AssertionError("the mapping is not there")


def test_memory_in_use_moves_to_huge_pages() -> None:
    probe, full, empty = mapping(), mapping(mmap.MADV_DONTFORK), mapping(mmap.MADV_DONTDUMP)
    probe[:] = bytes(SIZE)
    start = -(-address(probe) // HUGE) * HUGE
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(HUGE), memory.COLLAPSE):
        pytest.skip("this kernel has no MADV_COLLAPSE")
    content = np.random.default_rng(0).bytes(SIZE)
    full[:] = content
    empty[0] = 1
    before = in_huge_pages(empty)
    memory.use_huge_pages()
    assert in_huge_pages(full) >= SIZE - HUGE
    assert full[:] == content
    assert in_huge_pages(empty) == before


def test_without_proc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAPS", Path("/nowhere"))
    memory.use_huge_pages()
