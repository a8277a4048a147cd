"""Tables whose columns are cosines and sines of the row's number times a frequency: what they are, instead of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

_NEAR = 1e-6
"""What f32 rounds of a cosine of an angle that is itself an f32 product."""


def sines(table: np.ndarray) -> dict[int, np.float32]:
    """Which columns of ``table`` [rows, columns] are sines, and of which frequencies."""
    if not _could_be(table):
        return {}
    found = {int(c): _fitted(table[:, c], "sin", _frequencies(table[:, c], np.arcsin)) for c in np.flatnonzero(table[0] == 0)}
    return {c: f for c, f in found.items() if f is not None}


def waves(table: np.ndarray, known: Iterable[np.float32] = ()) -> list[tuple[str, np.float32]] | None:
    """Of each column of ``table`` f32 [rows, columns], function and frequency: ``fn(row * frequency)``; None where one is
    anything else.

    Frequencies are those with which f32 products of row and frequency give the numbers back to 1e-6. A cosine's is that of a
    sine (in the table, or of ``known``) where one of them fits: cosines of small angles say nothing of these.
    """
    if not _could_be(table):
        return None
    of_sines = sines(table)
    first = list(dict.fromkeys([*of_sines.values(), *known]))
    found: list[tuple[str, np.float32]] = []
    for c in range(table.shape[1]):
        if c in of_sines:
            found.append(("sin", of_sines[c]))
            continue
        own = [*first, *_frequencies(table[:, c], np.arccos)]
        fit = _fitted(table[:, c], "cos", own) if table[0, c] == 1 else None
        if fit is None:
            return None
        found.append(("cos", fit))
    return found


def _could_be(table: np.ndarray) -> bool:
    edges = table[:1] if table.ndim == 2 else table
    return table.ndim == 2 and table.dtype == np.float32 and len(table) >= 4 and bool(((edges == 0) | (edges == 1)).all())


def _fitted(column: np.ndarray, fn: str, candidates: Iterable[np.float32]) -> np.float32 | None:
    rows = np.arange(len(column), dtype=np.float32)
    for f in candidates:
        for n in (32, len(column)):  # most are wrong early
            if not np.abs(getattr(np, fn)((rows[:n] * f).astype(np.float64)) - column[:n]).max() <= _NEAR:
                break
        else:
            return f
    return None


def _frequencies(column: np.ndarray, inverse: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.float32]:
    """Frequencies up to half a turn a row that the numbers suggest: those near one that gets more precise from row to row."""
    if not np.abs(column).max() <= 1:
        return
    phase = inverse(column.astype(np.float64))
    mirrored = np.pi - phase if inverse is np.arcsin else -phase
    for start in (phase[1], mirrored[1]) if inverse is np.arcsin else (phase[1],):
        f, row = float(start), 2
        while row < len(column):
            if abs(column[row]) < 0.9:  # near its turn it says little
                turns = [p + 2 * np.pi * np.round((f * row - p) / (2 * np.pi)) for p in (phase[row], mirrored[row])]
                f = min(turns, key=lambda t: abs(t - f * row)) / row
            row = max(row + 1, row * 5 // 4)
        step = np.spacing(np.float32(f))
        yield from (np.float32(f + i * step) for i in (0, 1, -1, 2, -2, 3, -3))
