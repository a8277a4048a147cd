"""Codes that make up for each other's errors: what rounding a feature does to a layer's results, the features that are not yet
rounded take back, as far as they go along with it in a text (GPTQ, arXiv:2210.17323). Then each code is looked at again, now
that all others are known: whether another is better beside them (coordinate descent, as in arXiv:2309.01885)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wasat.ir import QArray, QTensorType
from wasat.ir.quantizers import factored, inverse, normalized, symmetric
from wasat.ir.schemes import Parts
from wasat.ir.types import BlockArray

DAMPING = 0.01
"""Of the mean square of a feature, added to each one's: features that never differ from zero, and texts that are short."""
_PASSES = 2
"""How often each code is looked at again."""
_CLEAR = 1e-3
"""Of a step: so much more than half of one a code is off before it changes; half a step off it is as well as it was."""
_TOGETHER = 32
"""Features after which those outside of them are told."""
_STEP = 4096
"""Rows that are multiplied at once."""
_SLAB = 1 << 22
"""Elements that are worked on at once."""


def compensates(t: QTensorType) -> bool:
    """Whether weights of a type can be found so: matrices whose blocks have scales and nothing else."""
    return t.rank == 2 and not t.zeros and not t.offset and t.block <= 256


class Compensation:
    """For weights that read the same features, of which ``moments`` [k, k] holds the mean products."""

    def __init__(self, moments: NDArray[np.float64]) -> None:
        k = len(moments)
        mean = float(np.trace(moments)) / k or 1.0
        whole = moments + np.eye(k) * (DAMPING * mean)
        self._whole = whole.astype(np.float32)
        self._take = np.linalg.cholesky(np.linalg.inv(whole)).T.astype(np.float32)
        """Upper triangular: by how much the features right of the diagonal move for an error on it."""
        self._moments = moments.astype(np.float32)
        importance = normalized(np.diagonal(moments).astype(np.float32), k)
        self._importance = np.ones(k, np.float32) if importance is None else importance

    def __call__(self, x: np.ndarray, t: QTensorType) -> QArray:
        """x [n, k] in a type that :func:`compensates`."""
        n, k = x.shape
        step = max(1, _SLAB // k)
        parts = [self._rows(x[i : i + step], t) for i in range(0, n, step)]
        codes, scales, factors = (None if p[0] is None else np.concatenate(p) for p in zip(*parts))
        assert codes is not None
        assert scales is not None
        if t.stored is None:
            return QArray(t, codes, scales[..., 0])
        assert t.stored.write is not None
        blocks = codes.reshape(n, -1, t.stored.block)
        return BlockArray(t, t.stored.write(Parts(blocks, scales, factors)))

    def off(self, x: np.ndarray, y: np.ndarray) -> float:
        """What y instead of x changes in the layer's results, as a part of these: root mean squares over the text."""
        wrong, whole = (sum(self._energy(z[i : i + _STEP]) for i in range(0, len(z), _STEP)) for z in (y - x, x))
        return float(np.sqrt(max(wrong, 0.0) / whole)) if whole > 0 else 0.0

    def _energy(self, w: np.ndarray) -> float:
        return float(np.einsum("nk,nk->", w @ self._moments, w, dtype=np.float64))

    def _rows(self, x: np.ndarray, t: QTensorType) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes i8 [n, k], scales [n, blocks, 1], and factors i8 [n, blocks, groups] where the type has them."""
        n, k = x.shape
        s, group = t.stored, t.block
        block = group if s is None else s.block
        low, high = (s.low, s.high) if s is not None else (-127, 127) if t.scheme == "int8" else (-8, 7)
        limits = None if s is None else s.factors
        w = np.ascontiguousarray(x.T, np.float32)
        codes = np.empty((k, n), np.int8)
        scales = np.empty((n, -(-k // block), 1), np.float16 if s is not None else t.scale.np)
        factors = None if limits is None else np.empty((n, k // block, block // group), np.int8)
        for at in range(0, k, group):
            i, j = at // block, at % block // group
            end = min(at + group, k)
            if j == 0:
                found = self._scales(w, at, min(at + block, k), group, low, high)
                scales[:, i] = found if s is None else factored(found, limits)[0]
            each = self._scales(w, at, end, group, low, high)[:, 0]
            wide = scales[:, i, 0].astype(np.float32)
            if factors is not None and limits is not None:
                factors[:, i, j] = np.clip(np.rint(each * inverse(wide)), *limits)
                wide = wide * factors[:, i, j].astype(np.float32)
            errors = np.empty((end - at, n), np.float32)
            back = inverse(wide)
            for c in range(at, end):
                code = np.clip(np.rint(w[c] * back), low, high)
                codes[c] = code
                errors[c - at] = (w[c] - code * wide) / self._take[c, c]
                w[c + 1 : end] -= self._take[c, c + 1 : end, None] * errors[c - at]
            w[end:] -= self._take[at:end, end:].T @ errors
        each = scales.astype(np.float32)
        if factors is not None:
            each = each * factors.astype(np.float32)
        self._settle(x, codes, np.repeat(each.reshape(n, -1).T, group, axis=0)[:k], low, high)
        return np.ascontiguousarray(codes.T), scales, factors

    def _settle(self, x: np.ndarray, codes: np.ndarray, scales: np.ndarray, low: int, high: int) -> None:
        """Moves codes i8 [k, n] of x [n, k], ``scales`` [k, n] as they are, to where none alone can be better."""
        k = len(codes)
        now = codes.astype(np.float32)
        slope = self._whole @ (now * scales - x.T)
        back = inverse(scales)
        for _ in range(_PASSES):
            for at in range(0, k, _TOGETHER):
                end = min(at + _TOGETHER, k)
                moved = np.zeros((end - at, now.shape[1]), np.float32)
                for c in range(at, end):
                    best = now[c] - slope[c] * back[c] / self._whole[c, c]
                    new = np.where(np.abs(best - now[c]) > 0.5 + _CLEAR, np.clip(np.rint(best), low, high), now[c])
                    moved[c - at] = (new - now[c]) * scales[c]
                    now[c] = new
                    slope[at:end] += self._whole[at:end, c, None] * moved[c - at]
                slope[:at] += self._whole[:at, at:end] @ moved
                slope[end:] += self._whole[end:, at:end] @ moved
        codes[:] = now

    def _scales(self, w: np.ndarray, at: int, end: int, group: int, low: int, high: int) -> np.ndarray:
        """Searched scales [n, groups] of the features ``at`` to ``end``, as they stand now."""
        part = np.zeros((w.shape[1], -(-(end - at) // group), group), np.float32)
        weights = np.ones((1, *part.shape[1:]), np.float32)
        part.reshape(len(part), -1)[:, : end - at] = w[at:end].T
        weights.reshape(-1)[: end - at] = self._importance[at:end]
        return symmetric(part, weights, low, high)
