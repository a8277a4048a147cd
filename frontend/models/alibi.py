"""How steeply scores fall with distance (ALiBi, arXiv:2108.12409)."""

from __future__ import annotations

import math


def slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's, of a power of two 2^(-8/n), its powers; of other numbers those of the one below, and every other of the next."""
    below = 2 ** math.floor(math.log2(heads))
    found = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return tuple(found + [2.0 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)])
