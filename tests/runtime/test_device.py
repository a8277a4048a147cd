"""Memory for weights: aligned, zeroed, and in huge pages where the system gives them."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from wasat.runtime.device import ALIGNMENT, allocate

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("size", [0, 1, 100, 5 << 20])
def test_aligned_and_zeroed(size: int) -> None:
    memory = allocate(size)
    assert (memory.dtype, memory.shape) == (np.uint8, (size,))
    assert memory.ctypes.data % ALIGNMENT == 0
    assert not memory.any()
    memory[:] = 7


def huge_kilobytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system gives no huge pages")
def test_large_memory_gets_huge_pages() -> None:
    """As much as the same request gets when it is made by hand: a system may have none to spare."""
    size = 64 << 20
    before = huge_kilobytes()
    plain = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    plain.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(plain, np.uint8)[:: 4096] = 1
    by_hand = huge_kilobytes() - before
    memory = allocate(size)
    memory[::4096] = 1
    assert huge_kilobytes() - before - by_hand >= by_hand / 2
