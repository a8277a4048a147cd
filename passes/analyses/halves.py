"""Whether a narrow float holds a weight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from wasat.ir import DType


def range_of_rows(dtype: DType) -> tuple[float, float]:
    """How small and how large the largest element of a row may be, to be right to 1% in a narrow float."""
    info = ml_dtypes.finfo(dtype.np)
    return float(info.smallest_subnormal) * 64, float(info.max)


def float_holds(w: np.ndarray, dtype: DType) -> bool:
    """Whether no finite element of w overflows in a narrow float, and each row that is not 0 stays right to 1% of its largest
    element. Works through w in slabs."""
    least, most = range_of_rows(dtype)
    if not w.size:
        return True
    rows = w.reshape(-1, w.shape[-1])
    step = max(1, (1 << 20) // rows.shape[1])
    for i in range(0, len(rows), step):
        part = np.abs(rows[i : i + step].astype(np.float32))
        top = np.where(np.isfinite(part), part, 0).max(1)
        if not ((top == 0) | ((top >= least) & (top <= most))).all():
            return False
    return True
